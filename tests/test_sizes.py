import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.base.errors import SizeError
from shardkit.base.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("500MB", 500_000_000),
        ("1.5GiB", 1_610_612_736),
        ("2gb", 2_000_000_000),
        (" 2 GB ", 2_000_000_000),
        ("1kib", 1024),
        ("3KB", 3000),
        ("1TB", 10**12),
        ("2TiB", 2 << 40),
        ("2_000_000_000", 2_000_000_000),
        ("512", 512),
        ("512B", 512),
        ("0.5MB", 500_000),
        ("100M", 100_000_000),
        ("2 g", 2_000_000_000),
        ("2Gi", 2 << 30),
        (2_000_000_000, 2_000_000_000),
    ],
)
def test_sizes_are_read_as_users_write_them(written: int | str, expected: int) -> None:
    assert parse_size(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        "GB",
        "2 GBs",
        "two",
        "-1GB",
        "1,5GB",
        "1e9",
        "1Gb/s",
        "٣GB",
        "2..5GB",
        None,
        True,
        2.5,
        b"2GB",
        [2],
    ],
)
def test_wrong_size_says_what_is_accepted(written: object) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(written)  # type: ignore[arg-type]
    assert repr(written) in str(caught.value)
    assert all(example in str(caught.value) for example in ("500MB", "2GB", "1.5GiB"))


@pytest.mark.parametrize("written", [0, -1, "0", "0GB", "0.4B"])
def test_size_below_one_byte_is_refused(written: int | str) -> None:
    with pytest.raises(SizeError, match="above zero"):
        parse_size(written)


@pytest.mark.parametrize("written", ["9" * 400, "9" * 5000 + "EB", 10**400])
def test_size_beyond_all_disks_is_refused_in_a_line(written: int | str) -> None:
    with pytest.raises(SizeError, match="is too large") as caught:
        parse_size(written)
    assert len(str(caught.value)) < 300


def test_fraction_of_a_gigabyte_is_exact() -> None:
    assert parse_size("4.35GB") == 4_350_000_000  # 4.35 * 10**9 in floating point is one byte less


@given(st.integers(1, 10**9), st.sampled_from(["KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]))
def test_unit_is_a_power_in_any_letter_case(number: int, unit: str) -> None:
    power = " KMGT".index(unit[0])
    expected = number * (1024 if "i" in unit else 1000) ** power
    assert {parse_size(f"{number}{u}") for u in (unit, unit.lower(), unit.upper())} == {expected}


@given(st.integers(1, 2**63))
def test_what_is_shown_can_be_read_back_to_three_digits(number: int) -> None:
    shown = format_size(number)
    assert parse_size(shown) == pytest.approx(number, rel=0.0051)
    assert "e" not in shown


def test_size_shows_the_unit_it_rounds_up_to() -> None:
    assert (format_size(999_499), format_size(999_999), format_size(0)) == ("999 KB", "1 MB", "0 B")
