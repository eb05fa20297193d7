"""A cast is what torch's own `.to()` gives, bit for bit, however it is cut into chunks."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shardkit import shard_checkpoint
from shardkit.errors import CastError, PlanError
from shardkit.formats.cast import Caster
from shardkit.shard import tasks
from shardkit.sources import local
from tests.support import FreshFolder

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TARGETS = ("F16", "BF16", "F32")


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits, or NaN both.

    NaN is compared as NaN: of the four NaNs 7f800001, 7fc00001, ffc00000 and 7fffffff, torch 2.13 on x86
    makes the bfloat16 7fc0 one at a time, and ffff in a tensor long enough for its vector code.
    """
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    bits = UNSIGNED[ours.itemsize]
    nan = theirs.isnan()
    return bool((ours.isnan() == nan).all() and (ours.view(bits)[~nan] == theirs.view(bits)[~nan]).all())


def cast_by_us(values: torch.Tensor, target: str) -> tuple[torch.Tensor, int, int]:
    dtype = next(name for name, known in TORCH.items() if known == values.dtype)
    data = values.view(torch.uint8).numpy().tobytes()
    result = Caster(dtype, target, len(data)).cast(data)
    return torch.frombuffer(bytearray(result.data), dtype=TORCH[target]), result.overflowed, result.flushed


def assert_cast_as_torch_does(values: torch.Tensor, target: str) -> None:
    ours, overflowed, flushed = cast_by_us(values, target)
    theirs = values.to(TORCH[target])
    assert same_bits(ours, theirs)
    assert overflowed == int((values.isfinite() & theirs.isinf()).sum())
    assert flushed == int(((values != 0) & (theirs == 0)).sum())


def patterns(dtype: torch.dtype, seed: int, count: int = 1 << 18) -> torch.Tensor:
    """Random bit patterns: every exponent is as likely as any other, subnormals and NaN included."""
    generator = torch.Generator().manual_seed(seed)
    size = (count * dtype.itemsize,)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype)


def around(values: torch.Tensor) -> torch.Tensor:
    """Each value with its neighbours on both sides."""
    up, down = (torch.tensor(x, dtype=values.dtype) for x in (torch.inf, -torch.inf))
    return torch.cat([values, values.nextafter(up), values.nextafter(down)])


def edges(dtype: torch.dtype, target: torch.dtype) -> torch.Tensor:
    """Finite values of `target`, the midpoints between them (ties), all that lies next to those, infinity."""
    finite = (
        torch.arange(0x7C00 if target == torch.float16 else 0x7F80, dtype=torch.int16).view(target).to(dtype)
    )
    points = torch.cat(
        [finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([torch.inf, torch.nan], dtype=dtype)]
    )
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    near = around(torch.cat([points, largest, finite[-1:] + (finite[-1:] - finite[-2:-1]) / 2]))
    return torch.cat([near, -near])


def test_the_few_that_are_not_normal_among_weights_are_cast_and_counted() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    usual = (every.abs() >= 2**-14) & (every.abs() < 2**16)
    for rest in every[~usual].split(3000):
        assert_cast_as_torch_does(torch.cat([every[usual].repeat(4), rest, every[usual]]), "F16")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_16_bit_patterns_are_cast_as_torch_casts_them(dtype: torch.dtype, target: str) -> None:
    assert_cast_as_torch_does(torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_16_bit_patterns_are_cast_among_ordinary_weights(dtype: torch.dtype) -> None:
    weights = torch.randn(9 << 16, generator=torch.Generator().manual_seed(4)).to(dtype) / 8
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    for target in TARGETS:
        assert_cast_as_torch_does(torch.cat([weights, every]), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_patterns_are_cast_as_torch_casts_them(dtype: torch.dtype, target: str) -> None:
    assert_cast_as_torch_does(patterns(dtype, seed=1), target)
    assert_cast_as_torch_does(
        torch.randn(1 << 18, dtype=dtype, generator=torch.Generator().manual_seed(2)), target
    )


@pytest.mark.parametrize("target", ["F16", "BF16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_subnormals_and_the_largest_values_are_cast_as_torch_casts_them(
    dtype: torch.dtype, target: str
) -> None:
    assert_cast_as_torch_does(edges(dtype, TORCH[target]), target)


def test_float64_is_rounded_by_way_of_float32_as_in_torch() -> None:
    # Just above a tie of float16: rounded once it goes up; by way of float32 it is a tie, goes to even.
    value = torch.tensor([1 + 2**-11 + 2**-40] * 64, dtype=torch.float64)
    assert value.to(torch.float16)[0] == 1
    assert cast_by_us(value, "F16")[0][0] == 1


def made(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(sorted(TORCH)),
    target=st.sampled_from(["float16", "bfloat16", "float32"]),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    chunk=st.sampled_from([8, 16, 64, 1024]),
    task=st.sampled_from([8, 64, 104, 4096]),
    seed=st.integers(0, 99),
)
def test_chunks_and_tasks_leave_no_seam(
    dtype: str, target: str, sizes: list[int], chunk: int, task: int, seed: int, fresh_folder: FreshFolder
) -> None:
    tensors = {f"t{i}": patterns(TORCH[dtype], seed + i, count=size) for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch, fresh_folder() as folder:
        patch.setattr(local, "CHUNK_BYTES", chunk)
        patch.setattr(tasks, "TASK_BYTES", task)
        source = made(folder / "source", tensors)
        report = shard_checkpoint(source, folder / "out", dtype=target, allow_overflow=True)
        found = load_file(folder / "out" / "model.safetensors")
    lost = {loss.tensor: (loss.overflowed, loss.flushed) for loss in report.lost}
    for name, values in tensors.items():
        expected = values.to(getattr(torch, target))
        assert same_bits(found[name], expected)
        overflowed = int((values.isfinite() & expected.isinf()).sum())
        flushed = int(((values != 0) & (expected == 0)).sum())
        assert lost.pop(name, (0, 0)) == (overflowed, flushed)
    assert lost == {}


def test_tensor_of_several_chunks_and_a_half_is_cast_whole(tmp_path: Path) -> None:
    count = 5 * local.CHUNK_BYTES // 4 // 2 + 3
    tensors = {"before": torch.ones(3), "large": torch.randn(count), "after": torch.ones(5)}
    shard_checkpoint(made(tmp_path / "source", tensors), tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(found[name], values.bfloat16()) for name, values in tensors.items())


def test_only_floating_tensors_are_cast(tmp_path: Path) -> None:
    tensors = {
        "int64": torch.arange(-3, 3),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex64": torch.tensor([1 + 2j]),
        "float32": torch.tensor([1.5]),
        "float64": torch.tensor([1.5], dtype=torch.float64),
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
    }
    shard_checkpoint(made(tmp_path / "source", tensors), tmp_path / "out", dtype="float16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("int64", "uint8", "bool", "complex64"):
        assert found[name].dtype == tensors[name].dtype
        assert torch.equal(found[name], tensors[name])
    assert {found[name].dtype for name in ("float32", "float64", "bfloat16")} == {torch.float16}


OVERFLOWING = {
    "fits": torch.tensor([65504.0, -65504.0, torch.inf, -torch.inf, torch.nan]),
    "layers.3.up": torch.tensor([1e5, -7e4, 65520.0, 1.0, torch.inf]),
    "tiny": torch.tensor([1e-9, -1e-30, 0.0, -0.0, 6e-8]),
}


def test_overflow_names_the_tensor_and_how_many_values(tmp_path: Path) -> None:
    source = made(tmp_path / "source", OVERFLOWING)
    with pytest.raises(CastError) as caught:
        shard_checkpoint(source, tmp_path / "out", dtype="float16")
    message = str(caught.value)
    assert str(source) in message
    assert "layers.3.up (3 values)" in message
    assert "fits" not in message
    assert "bfloat16" in message  # what to do
    assert not (tmp_path / "out").exists()  # what is finished waits for a run that allows it


@pytest.mark.parametrize(
    ("stored", "target", "advice"),
    [
        (torch.float32, "float16", "choose bfloat16 or float32, or leave out dtype, or allow it"),
        (torch.bfloat16, "float16", "choose bfloat16 or float32, or leave out dtype, or allow it"),
        (torch.float32, "bfloat16", "; choose float32, or leave out dtype, or allow it"),
        (torch.float64, "bfloat16", "; leave out dtype, or allow it"),
        (torch.float64, "float32", "; leave out dtype, or allow it"),
    ],
)
def test_overflow_is_answered_by_advice_that_fits_the_target(
    stored: torch.dtype, target: str, advice: str, tmp_path: Path
) -> None:
    largest = torch.full((3,), torch.finfo(stored).max, dtype=stored)
    source = made(tmp_path / "source", {"w": torch.ones(4, dtype=torch.float64), "mask": largest})
    with pytest.raises(CastError) as caught:
        shard_checkpoint(source, tmp_path / "out", dtype=target)
    assert f"a cast to {target} turns finite values infinite in mask (3 values)" in str(caught.value)
    assert f"{advice} with allow_overflow=True" in str(caught.value)


def test_overflow_that_is_allowed_is_reported_by_tensor(tmp_path: Path) -> None:
    source = made(tmp_path / "source", OVERFLOWING)
    report = shard_checkpoint(source, tmp_path / "out", dtype="float16", allow_overflow=True)
    lost = {loss.tensor: (loss.overflowed, loss.flushed) for loss in report.lost}
    assert lost == {"layers.3.up": (3, 0), "tiny": (0, 2)}
    assert load_file(tmp_path / "out" / "model.safetensors")["layers.3.up"].isinf().sum() == 4
    assert "layers.3.up" in str(report)


def test_values_that_become_zero_are_counted_but_no_error(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {"tiny": OVERFLOWING["tiny"]})
    report = shard_checkpoint(source, tmp_path / "out", dtype="float16")
    assert [(loss.tensor, loss.overflowed, loss.flushed) for loss in report.lost] == [("tiny", 0, 2)]


def test_overflow_in_two_tasks_of_one_tensor_is_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "TASK_BYTES", 64)
    source = made(tmp_path / "source", {"w": torch.full((100,), 1e30)})
    report = shard_checkpoint(source, tmp_path / "out", dtype="float16", allow_overflow=True)
    assert [(loss.tensor, loss.overflowed) for loss in report.lost] == [("w", 100)]


def test_quantized_checkpoint_is_not_cast(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(4).to(torch.float8_e4m3fn), "scale": torch.ones(1)}
    source = made(tmp_path / "source", tensors)
    with pytest.raises(PlanError, match="quantized"):
        shard_checkpoint(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert shard_checkpoint(source, tmp_path / "out").verification is not None  # as it is, it can be sharded
