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

from shardkit.errors import CheckpointError, reading
from shardkit.pickle_guard import check_pickle
from shardkit.safetensors_file import check_name, refuse_lfs_pointer, tensor_bytes
from shardkit.tensor import DTYPE_NAMES, TensorInfo

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

PIECE_BYTES = 1 << 20  # what a core has close at hand

Scan = tuple[dict[str, TensorInfo], dict[str, str], tuple[str, ...]]


def scan_pickles(folder: Path, files: tuple[str, ...], ties_weights: bool) -> Scan:
    """List the tensors of pickle files: tensors by name, aliases (dropped to kept), notes.

    Names that share one storage, shape and strides are aliases. Transformers writes only one of them,
    the module that was registered first, and ties the others to it after loading; so do we, unless the
    config says that it does not tie (`ties_weights` false), when each is written.

    Raises
    ------
    CheckpointError
        If a file is damaged, holds anything but tensors, or wants more than tensors when loaded.
    """
    names = {f"torch.{name}": dtype for dtype, name in DTYPE_NAMES.items()}
    tensors: dict[str, TensorInfo] = {}
    aliases: dict[str, str] = {}
    notes: list[str] = []
    for file in files:
        path = str(folder / file)
        first: dict[object, str] = {}
        loaded, mapped = _load(path)
        if not mapped:
            notes.append(f"{file} is a legacy pickle: it is loaded whole, one such file at a time")
        for name, tensor in loaded.items():
            if name in tensors or name in aliases:
                raise CheckpointError("is in two files", file=path, tensor=name)
            dtype = names.get(str(tensor.dtype))
            if dtype is None:
                raise CheckpointError(f"safetensors has no dtype for {tensor.dtype}", file=path, tensor=name)
            kept = first.setdefault(_identity(tensor), name) if tensor.numel() else name
            if kept != name and ties_weights:
                aliases[name] = kept
            else:
                shape = _shape(tensor, dtype)
                tensors[name] = TensorInfo(name, dtype, shape, file, None, tensor_bytes(dtype, shape))
    return tensors, aliases, tuple(notes)


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


def _load(path: str) -> tuple[Mapping[str, torch.Tensor], bool]:
    """Return the tensors of a file, and whether they are mapped rather than in memory."""
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
        loaded = loaded["state_dict"]  # as trainers save it; transformers looks there, too
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds a {type(loaded).__name__}, not a map of tensors", file=path)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name!r} is a {type(value).__name__}, not a tensor", file=path)
        check_name(name, path)
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise CheckpointError(
                "is sparse, quantised, nested or without data, not a plain tensor", file=path, tensor=name
            )
        if max(value.nbytes, value.untyped_storage().nbytes()) > os.path.getsize(path):
            raise CheckpointError(
                f"claims {value.nbytes} bytes, on a storage of {value.untyped_storage().nbytes()}",
                file=path,
                tensor=name,
            )
    return loaded, mapped


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
        self._files: dict[tuple[str, int, int], tuple[Mapping[str, torch.Tensor], bool]] = {}

    def get(self, path: str) -> Mapping[str, torch.Tensor]:
        with self._lock:
            status = os.stat(path)
            key = (path, status.st_mtime_ns, status.st_size)
            if key not in self._files:
                in_memory = [k for k, (_, mapped) in self._files.items() if not mapped]
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
