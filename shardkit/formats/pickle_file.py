"""Checkpoints in torch's pickle format: what is in them, and their bytes, by torch's safe reader alone.

Zip pickles are mapped, so that their tensors stay on disk until they are copied. Legacy pickles (before
torch 1.6) cannot be mapped: they are loaded one file at a time. Only `weights_only=True` is ever used.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import CheckpointError, reading
from shardkit.base.record import listed, plural, printable
from shardkit.formats.pickle_guard import check_pickle
from shardkit.formats.safetensors import check_name, refuse_lfs_pointer, tensor_bytes
from shardkit.formats.tensor import DTYPE_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_MOST_EXPANDED = 1 << 30  # of a tensor that repeats what its file holds
PIECE_BYTES = 1 << 20  # what a core has close at hand

Scan = tuple[dict[str, TensorInfo], dict[str, str], tuple[str, ...]]


def scan_pickles(folder: Path, files: tuple[str, ...]) -> Scan:
    """List the tensors of pickle files: tensors by name, aliases, notes.

    A name whose storage, offset, shape and strides are those of an earlier one is an alias of it. It is a
    tensor like any other: what shares storage may be tied again by a load, and may not.

    Raises
    ------
    CheckpointError
        If a file is damaged, or wants more than tensors when loaded.
    """
    names = {f"torch.{name}": dtype for dtype, name in DTYPE_NAMES.items()}
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    notes: list[str] = []
    for file in files:
        path = str(folder / file)
        first: dict[object, str] = {}
        loaded, mapped, skipped = _load(path)
        if not mapped:
            notes.append(f"{file} is a legacy pickle: it is loaded whole, one such file at a time")
        if skipped:
            count = plural(len(skipped), "value")
            notes.append(f"{file} holds {count} that are not tensors, left out: {listed(skipped)}")
        for name, tensor in loaded.items():
            dtype = names.get(str(tensor.dtype))
            if dtype is None:
                raise CheckpointError(f"safetensors has no dtype for {tensor.dtype}", file=path, tensor=name)
            if (other := tensors.pop(name, None)) is not None:
                notes.append(twice_note(name, other.file, file))
                aliases.pop(name, None)
            shape = _shape(tensor, dtype)
            tensors[name] = TensorInfo(name, dtype, shape, file, None, tensor_bytes(dtype, shape))
            kept = first.setdefault(_identity(tensor), name) if tensor.numel() else name
            if kept != name:
                aliases[name] = kept
    return tensors, aliases, tuple(notes)


def twice_note(name: str, first: str, last: str) -> str:
    """Say which of two tensors of one name is meant: the last that transformers reads."""
    return f"{name} is in {first} and in {last}: that of {last} is taken, as transformers does"


def read_tensor(path: str, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
    """Yield bytes of one tensor of the pickle at `path`: as they lie there, or gathered piece by piece.

    Pieces of a tensor that is not contiguous have at most `PIECE_BYTES`, or one element; their buffer is used
    again.
    """
    import numpy as np
    import torch

    tensor = _OPEN.get(path)[name].detach()
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        # One element counts as contiguous whatever its stride, with which it could not be viewed as bytes.
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8) if tensor.numel() else tensor
        yield memoryview(flat.numpy()).toreadonly()[offset : offset + nbytes]
        return
    size = tensor.element_size()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    first, end = offset // size, -(-(offset + nbytes) // size)
    most, position = max(1, PIECE_BYTES // size), first * size
    buffers = np.empty((2, min(most, end - first)), f"i{size}")
    for piece in _pieces(tensor, first, end, most):
        # Copied by numpy: torch would wait for a thread of its own on each core, which are busy.
        data = _gathered(piece.resolve_conj().resolve_neg().view(whole).numpy(), buffers)
        yield data[max(0, offset - position) : offset + nbytes - position]
        position += len(data)


def _pieces(tensor: torch.Tensor, first: int, end: int, most: int) -> Iterator[torch.Tensor]:
    """Cut elements `first` to `end`, in row-major order, into views of at most `most` elements each."""
    if end - first <= 0:
        return
    if tensor.dim() == 0:
        yield tensor
        return
    row = tensor.numel() // len(tensor)
    at = first
    while at < end:
        number, inside = divmod(at, row)
        rows = min(most, end - at) // row
        if inside or not rows:  # part of a row, or one that is too long
            stop = min(end, (number + 1) * row)
            yield from _pieces(tensor[number], inside, stop - number * row, most)
        else:
            stop = at + rows * row
            yield tensor[number : number + rows]
        at = stop


def _gathered(piece: NDArray[Any], buffers: NDArray[Any]) -> memoryview:
    """Copy a piece into a buffer; first in the order in which it lies, so that each page is read once."""
    order = sorted(range(piece.ndim), key=piece.strides.__getitem__, reverse=True)
    for buffer in buffers[:, : piece.size]:
        lying = buffer.reshape([piece.shape[axis] for axis in order])
        lying[...] = piece.transpose(order)
        piece, order = lying.transpose(sorted(order, key=order.__getitem__)), sorted(order)
        if piece.flags.c_contiguous:
            break
    return piece.reshape(-1).view("u1").data.toreadonly()


def _shape(tensor: torch.Tensor, dtype: str) -> tuple[int, ...]:
    """Return the shape in elements; torch counts float4 in pairs, along the last dimension."""
    shape = tuple(tensor.shape)
    return (*shape[:-1], shape[-1] * 2) if dtype == "F4" and shape else shape


def _identity(tensor: torch.Tensor) -> object:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _load(path: str) -> tuple[Mapping[str, torch.Tensor], bool, tuple[str, ...]]:
    """Return the tensors of a file, whether they are mapped, not in memory, and what is no tensor."""
    with reading(path), open(path, "rb") as file:
        refuse_lfs_pointer(file.read(16), path)
    mapped = check_pickle(path)
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever its parsers do
        raise CheckpointError(
            f"not a pickle of tensors alone, refused: {_reason(error)}", file=path
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]  # as trainers save it; transformers itself loads none of that
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a map of tensors", file=path)
    tensors = {n: v for n, v in loaded.items() if isinstance(n, str) and isinstance(v, torch.Tensor)}
    skipped = tuple(printable(str(name))[:200] for name in loaded if name not in tensors)
    if skipped and not tensors:
        raise CheckpointError(f"holds no tensors by name, only {listed(skipped)}", file=path)
    if unnamed := [
        name for name, value in loaded.items() if isinstance(value, torch.Tensor) and name not in tensors
    ]:
        raise CheckpointError(f"holds a tensor whose name is {unnamed[0]!r}, not text", file=path)
    for name, value in tensors.items():
        check_name(name, path)
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise CheckpointError(
                "is sparse, quantised, nested or without data, not a plain tensor", file=path, tensor=name
            )
        held, size = value.untyped_storage().nbytes(), os.path.getsize(path)
        if held > size or value.nbytes > max(size, _MOST_EXPANDED):
            raise CheckpointError(
                f"claims {value.nbytes} bytes, on a storage of {held} in {size}: save it contiguous",
                file=path,
                tensor=name,
            )
    return tensors, mapped, skipped


def _reason(error: Exception) -> str:
    """Say why torch refused, without its advice to load the file all the same."""
    text = str(error)
    if asked := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {asked[1]}, which is more than tensors"
    if said := re.search(r"WeightsUnpickler error: *(.+)", text):
        return said[1][:300]
    first = text.strip().split("\n")[0][:300]
    return type(error).__name__ if not first or "weights_only" in first else first


class _OpenPickles:
    """Keeps pickles open between tensors: several mapped ones, but only one that is in memory."""

    def __init__(self, mapped: int) -> None:
        self._limit, self._lock = mapped, threading.Lock()
        self._files: dict[tuple[str, int, int], tuple[Mapping[str, torch.Tensor], bool, tuple[str, ...]]] = {}

    def get(self, path: str) -> Mapping[str, torch.Tensor]:
        with self._lock:
            status = os.stat(path)
            key = (path, status.st_mtime_ns, status.st_size)
            if key not in self._files:
                in_memory = [k for k, (_, mapped, _) in self._files.items() if not mapped]
                oldest = list(self._files)[: max(0, len(self._files) - self._limit + 1)]
                for old in {*in_memory, *oldest}:
                    del self._files[old]
                self._files[key] = _load(path)
            return self._files[key][0]

    def clear(self) -> None:
        with self._lock:
            self._files.clear()


_OPEN = _OpenPickles(mapped=4)
close_pickles = _OPEN.clear
