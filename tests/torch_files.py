"""What tests of torch's files share: state dicts of every kind, and a file that counts what is read of it."""

import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st

from shardkit.formats.ranged import RangedFile
from shardkit.formats.strided import read_strided
from shardkit.formats.torch_file import TorchFile, read_torch_file

SIGNED = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
COMMON = [*SIGNED, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NEW = [
    torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


class Counted:
    """Reads ranges of a file, as a reader of torch's files wants them, and keeps count."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, ranges: Sequence[tuple[int, int]]) -> Iterable[bytes]:
        self.ranges += ranges
        with open(self.path, "rb") as file:
            return [os.pread(file.fileno(), nbytes, offset) for offset, nbytes in ranges]

    def open(self, exact: bool = True) -> TorchFile:
        return read_torch_file(RangedFile(self, self.size, str(self.path)), self.path.name, exact=exact)


def contents(path: Path) -> dict[str, bytes]:
    """Every tensor of a file as it would be written, by shardkit."""
    found = {}
    for tensor in Counted(path).open().tensors:
        if tensor.layout is None:
            with open(path, "rb") as file:
                found[tensor.name] = os.pread(file.fileno(), tensor.nbytes, tensor.offset)
        else:
            pieces = read_strided(str(path), tensor.offset, tensor.layout, 0, tensor.nbytes)
            found[tensor.name] = b"".join(map(bytes, pieces))
        assert len(found[tensor.name]) == tensor.nbytes
    return found


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor as safetensors would have them, by torch."""
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(whole.reshape(-1).view(torch.uint8).numpy()) if whole.numel() else b""


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are the same: zero is not minus zero."""
    return (ours.dtype, ours.shape, raw(ours)) == (theirs.dtype, theirs.shape, raw(theirs))


@st.composite
def _views(draw: st.DrawFn, base: torch.Tensor, in_parts: bool) -> torch.Tensor:
    """Draw a view: a part, of any shape, permuted, with steps, expanded."""
    length = base.numel()
    start = draw(st.integers(0, length))
    view = base[start : draw(st.integers(start, length))]
    sizes = [n for n in range(1, view.numel() + 1) if view.numel() % n == 0] or [1]
    is_whole = view.dtype != torch.float4_e2m1fn_x2  # which safetensors cannot have as a scalar
    if view.numel() == 1 and is_whole and draw(st.booleans()):
        view = view.reshape(())
    elif view.numel():
        rows = draw(st.sampled_from(sizes))
        columns = draw(st.sampled_from([n for n in sizes if view.numel() // rows % n == 0]))
        view = view.view(rows, columns, -1).squeeze(
            draw(st.sampled_from([(), 0, (0, 1, 2) if is_whole else 1]))
        )
    if view.dim():
        view = view.permute(draw(st.permutations(range(view.dim()))))
        axis = draw(st.integers(0, view.dim() - 1))
        view = view.movedim(axis, 0)[draw(st.integers(0, 2)) :: draw(st.integers(1, 3))].movedim(0, axis)
    if draw(st.integers(0, 5)) == 0:
        view = view.expand(draw(st.integers(0, 3)), *view.shape)
    if view.dtype == torch.complex64:
        parts = [view.real, view.imag]  # of another dtype: torch saves no storage as two
        view = draw(st.sampled_from(parts if in_parts else [view]))
    return view


def _kept(view: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor as models keep it: plain, a parameter (with or without a gradient), or marked."""
    if how == "parameter" and view.is_floating_point():
        return torch.nn.Parameter(view, requires_grad=False)
    if how == "trained" and view.dtype in SIGNED:
        return torch.nn.Parameter(view)
    if how == "marked":
        view = view[...]
        view._is_hf_initialized = True  # type: ignore[attr-defined]  as transformers marks its own
    return view


@st.composite
def state_dicts(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> dict[str, torch.Tensor]:
    """Draw a state dict: views of a few storages, of any bits, some of them shared."""
    source = random.Random(draw(st.integers(0, 1 << 16)))
    state: dict[str, torch.Tensor] = {}
    for group in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(dtypes))
        nbytes = source.choice([0, 1, 3, 24, 60]) * dtype.itemsize
        base = torch.frombuffer(bytearray(source.randbytes(nbytes) + b"\0"), dtype=torch.uint8)[
            :nbytes
        ].clone()
        base = (base & 1).bool() if dtype == torch.bool else base.view(dtype)
        in_parts = draw(st.booleans())
        for number in range(draw(st.integers(1, 3))):
            how = draw(st.sampled_from(["plain", "plain", "parameter", "trained", "marked"]))
            state[f"layers.{group}.{draw(st.sampled_from('wbé'))}{number}"] = _kept(
                draw(_views(base, in_parts)), how
            )
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(state)))
        state["tied"] = state[name]
    return state
