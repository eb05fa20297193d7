"""The format's rules, held against the reference reader wherever both have something to say."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.base.errors import CheckpointError
from shardkit.formats.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    Entry,
    Header,
    build_header,
    tensor_bytes,
)
from shardkit.formats.safetensors import read_header as read_header_of
from shardkit.formats.tensor import DTYPE_NAMES
from shardkit.sources.local import LocalFiles
from tests.support import (
    DTYPES,
    FreshFolder,
    Tensor,
    Tensors,
    bits,
    file_bytes,
    header_of,
    safetensors_bytes,
    tensors,
)


def written(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    return path


def read_header(path: Path) -> Header:
    return read_header_of(LocalFiles(path.parent).ranged(path.name))


def test_every_dtype_of_the_format_is_carried() -> None:
    assert set(DTYPE_BITS) == set(DTYPES) == set(DTYPE_NAMES)
    assert {dtype: bits(dtype) for dtype in DTYPES} == DTYPE_BITS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", range(9))
def test_size_of_a_tensor_is_what_the_reference_reader_demands(dtype: str, elements: int) -> None:
    def accepts(nbytes: int) -> bool:
        try:
            safetensors.deserialize(safetensors_bytes({"t": Tensor(dtype, (elements,), bytes(nbytes))}))
        except safetensors.SafetensorError:
            return False
        return True

    accepted = [nbytes for nbytes in range(73) if accepts(nbytes)]
    if accepted:
        assert [tensor_bytes(dtype, (elements,))] == accepted
    else:  # 4 and 6 bit elements that end inside a byte
        with pytest.raises(ValueError, match="whole bytes"):
            tensor_bytes(dtype, (elements,))


def test_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    assert (tensor_bytes("F32", ()), tensor_bytes("F32", (0,)), tensor_bytes("I64", (3, 0, 5))) == (4, 0, 0)


@settings(max_examples=60)
@given(made=tensors())
def test_header_lists_every_tensor_where_it_is(made: Tensors, fresh_folder: FreshFolder) -> None:
    with fresh_folder() as folder:
        path = written(folder, safetensors_bytes(made, {"format": "pt", "by": "hand"}))
        header, raw = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt", "by": "hand"}
    found = {
        name: Tensor(dtype, shape, raw[header.data_start + begin : header.data_start + end])
        for name, dtype, shape, begin, end in header.entries
    }
    assert found == made


@settings(max_examples=60)
@given(made=tensors())
def test_header_we_write_is_read_alike_by_the_reference_reader(made: Tensors) -> None:
    entries = [Entry(n, t.dtype, t.shape, *e["data_offsets"]) for (n, t), e in zip(
        made.items(), header_of(made).values(), strict=True)]  # fmt: skip
    header = build_header(entries)
    assert len(header) % 8 == 0
    found = safetensors.deserialize(header + b"".join(tensor.data for tensor in made.values()))
    assert {n: Tensor(v["dtype"], tuple(v["shape"]), bytes(v["data"])) for n, v in found} == made


def test_key_order_padding_and_unknown_fields_do_not_matter(tmp_path: Path) -> None:
    header = {
        "b": {"data_offsets": [1, 3], "shape": [2], "dtype": "U8", "note": "unknown"},
        "__metadata__": {"z": ""},
        "a": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]},
    }
    raw = file_bytes(json.dumps(header).encode() + b"  \n\t  ", b"xyz")
    assert len(safetensors.deserialize(raw)) == 2
    entries = read_header(written(tmp_path, raw)).entries
    assert entries == (Entry("a", "I8", (), 0, 1), Entry("b", "U8", (2,), 1, 3))


def test_file_without_tensors_is_legal(tmp_path: Path) -> None:
    assert read_header(written(tmp_path, file_bytes({}))).entries == ()


def entry(begin: object, end: object, shape: object = (2,), dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty file": (b"", ["has 0 bytes", "to byte 8", "incomplete"]),
    "cut in the length": (b"\x10\0\0", ["has 3 bytes", "to byte 8"]),
    "cut in the header": (file_bytes({"a": entry(0, 2)}, b"xy")[:40], ["has 40 bytes", "incomplete"]),
    "header beyond the limit": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        [str(MAX_HEADER_BYTES + 1), str(MAX_HEADER_BYTES), "not a safetensors file"],
    ),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", [str(2**64 - 1)]),
    "another format": (b"GGUF\x03\0\0\0" + bytes(64), ["not a safetensors file"]),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n",
        ["Git LFS pointer", "git lfs pull"],
    ),
    "no JSON": (file_bytes(b"{]"), ["not valid JSON"]),
    "no UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), ["not valid JSON"]),
    "nested too deeply": (file_bytes(b'{"a":' + b"[" * 200_000), ["nested"]),
    "number of 10,000 digits": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"x"),
        ["not valid JSON"],
    ),
    "not a number": (file_bytes(b'{"__metadata__":{},"a":NaN}'), ["NaN"]),
    "an array": (file_bytes([]), ["not a JSON object"]),
    "metadata of numbers": (file_bytes({"__metadata__": {"format": 1}}), ["map of strings"]),
    "duplicate key": (
        file_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 2)).encode(),) * 2), b"xy"),
        ["'a'", "twice"],
    ),
    "cut in the data": (
        file_bytes({"a": entry(0, 9, [9])}, b"12345"),
        ["byte 9", "has 5", "incomplete"],
    ),
    "bytes after the last tensor": (
        file_bytes({"a": entry(0, 2)}, b"xyz"),
        ["byte 2", "has 3", "1 bytes belong to no tensor"],
    ),
    "hole at the start": (file_bytes({"a": entry(1, 3)}, b"xyz"), ["'a'", "byte 1", "ends at 0", "gap"]),
    "hole between": (
        file_bytes({"a": entry(0, 2), "b": entry(3, 5)}, b"vwxyz"),
        ["'b'", "byte 3", "ends at 2", "gap"],
    ),
    "overlap": (
        file_bytes({"a": entry(0, 2), "b": entry(1, 3)}, b"xyz"),
        ["'b'", "byte 1", "ends at 2", "overlaps"],
    ),
    "out of range": (
        file_bytes({"a": entry(0, 2), "b": entry(2, 10**15, [10**15 - 2])}, b"wxyz"),
        [str(10**15), "has 4", "incomplete"],
    ),
    "wrong size for the shape": (
        file_bytes({"a": entry(0, 2, [2], "F32")}, b"xy"),
        ["'a'", "2 bytes", "F32 [2] needs 8"],
    ),
    "end before begin": (file_bytes({"a": entry(2, 0)}, b"xy"), ["'a'", "-2 bytes", "needs 2"]),
    "negative offset": (file_bytes({"a": entry(-2, 0)}, b"xy"), ["'a'", "[-2, 0]", "not two non-negative "
                                                                                   "integers"]),
    "negative zero": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', b"xy"),
        ["'a'", "not two non-negative integers"],
    ),
    "three offsets": (
        file_bytes({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1, 2]}}, b"xy"),
        ["'a'", "[0, 1, 2]"],
    ),
    "offset of a fraction": (file_bytes({"a": entry(0.0, 2)}, b"xy"), ["'a'", "[0.0, 2]"]),
    "offset of true": (file_bytes({"a": entry(False, True, [1])}, b"x"), ["'a'", "not two non-negative "
                                                                                 "integers"]),
    "negative shape": (file_bytes({"a": entry(0, 2, [-1, -2])}, b"xy"), ["'a'", "[-1, -2]"]),
    "shape that overflows": (
        file_bytes({"a": entry(0, 0, [2**32, 2**32])}),
        ["'a'", "2**60 elements"],
    ),
    "shape of a word": (file_bytes({"a": entry(0, 2, "2")}, b"xy"), ["'a'", "shape is '2'"]),
    "unknown dtype": (file_bytes({"a": entry(0, 2, dtype="U9")}, b"xy"), ["'a'", "'U9'", "BF16"]),
    "dtype of a number": (file_bytes({"a": entry(0, 2, dtype=8)}, b"xy"), ["'a'", "dtype is 8"]),
    "half a byte": (file_bytes({"a": entry(0, 2, [3], "F4")}, b"xy"), ["'a'", "3 elements of 4 bits"]),
    "entry of a list": (file_bytes({"a": [0, 2]}, b"xy"), ["'a'", "not a JSON object"]),
    "entry without a shape": (
        file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"xy"),
        ["'a'", "shape is None"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_with_place_and_numbers(case: str, tmp_path: Path) -> None:
    raw, words = DAMAGED[case]
    path = written(tmp_path, raw)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500
    assert caught.value.file == str(path)
    assert caught.value.tensor in (None, "a", "b")


# The reference reader takes the last of two entries of one name; such a file is not what it claims to be.
@pytest.mark.parametrize("case", sorted(set(DAMAGED) - {"duplicate key"}))
def test_reference_reader_refuses_the_same_damage(case: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(DAMAGED[case][0])


def monster(count: int, unit: Callable[[int], str], before: str = "", after: str = "") -> bytes:
    return file_bytes(f"{{{before}{','.join(map(unit, range(count)))}{after}}}".encode())


MONSTERS = {
    "two million commas": (lambda: monster(2_000_000, str, '"a":[', "]"), "brackets and commas"),
    "a million keys": (lambda: monster(900_000, lambda i: f'"{i}":0'), "900000 colons"),
    "a string of 9 MB": (
        lambda: monster(1, lambda _: '"\U00010400' + "a" * 9_000_000 + '":0'),
        "4000000 bytes",
    ),
    "a name of 5,000 characters": (lambda: monster(1, lambda _: f'"{"a" * 5000}":0'), "5000 characters"),
    "metadata in every shard": (
        lambda: monster(20_000, lambda i: f'"{i}":""', '"__metadata__":{', "}"),
        "20000 entries",
    ),
    "an infinite unknown key": (lambda: monster(4, lambda i: f'"{i}":1e999', '"a":{', "}"), "infinite"),
    "a long dtype": (
        lambda: file_bytes({"a": entry(0, 0, [0], "F" * 1_000_000)}),
        "'FFF",
    ),
    "a long shape": (lambda: file_bytes({"a": entry(0, 0, [1.5] * 500_000)}), "[1.5, 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", MONSTERS)
def test_header_that_would_take_seconds_or_gigabytes_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    raw, words = MONSTERS[case]
    with pytest.raises(CheckpointError) as caught:
        read_header(written(tmp_path, raw()))
    assert words in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 600


def test_header_of_a_hundred_thousand_tensors_is_read(tmp_path: Path) -> None:
    name = "model.layers.{}.block_sparse_moe.experts.weight"
    made = {name.format(i): entry(0, 0, [0, 1, 2, 3, 4]) for i in range(100_000)}
    assert len(read_header(written(tmp_path, file_bytes(made))).entries) == 100_000


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\0", "a\u202eb", "\ud800"])
def test_name_that_would_deceive_a_terminal_is_refused(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, file_bytes(json.dumps({name: entry(0, 2)}).encode(), b"xy"))
    with pytest.raises(CheckpointError, match="unprintable") as caught:
        read_header(path)
    assert str(caught.value).isprintable()


@pytest.mark.timeout(20)
def test_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["absent.safetensors", "."])
def test_file_that_cannot_be_opened_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / name)
    assert caught.value.file == str(tmp_path / name)


_SWAPS = st.sampled_from(
    [(b"0", b"1"), (b"1", b"0"), (b"[", b""), (b",", b""), (b'"', b""), (b"U8", b"F64"),
     (b"}", b"}}"), (b"2", b"99999999999999999999"), (b":", b":{"), (b"[", b"[null,"), (b"[", b"[0,"),
     (b"{", b" {"), (b"0", b"0.0"), (b"1", b"1e0"), (b"shape", b"dtype"), (b"a", b"__metadata__")]
)  # fmt: skip


@settings(max_examples=250)
@given(made=tensors(max_size=4), data=st.data())
def test_what_we_accept_the_reference_reader_accepts(
    made: Tensors, data: st.DataObject, fresh_folder: FreshFolder
) -> None:
    raw = safetensors_bytes(made, {"a": "0"})
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    for _ in range(data.draw(st.integers(1, 3))):
        old, new = data.draw(_SWAPS)
        places = [i for i in range(len(header)) if header.startswith(old, i)]
        if places:
            at = data.draw(st.sampled_from(places))
            header = header[:at] + new + header[at + len(old) :]
    mutated = file_bytes(header, raw[8 + int.from_bytes(raw[:8], "little") :])
    with fresh_folder() as folder:
        try:
            entries = read_header(written(folder, mutated)).entries
        except CheckpointError:
            return
    reference = {n: (v["dtype"], tuple(v["shape"])) for n, v in safetensors.deserialize(mutated)}
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == reference
