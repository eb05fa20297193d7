"""Tensors that do not lie in their file as they are written: gathered, piece by piece, in bounded memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import CheckpointError, reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_BYTES = 1 << 20  # what a core has close at hand
MAX_RECEIVED_SPAN = 1 << 24  # of a tensor that is received from elsewhere, to be gathered in memory


@dataclass(frozen=True, slots=True)
class Layout:
    """How items of `itemsize` bytes lie in a file: shape and strides count items (of float4, pairs)."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def span(self) -> int:
        """Bytes of the file from its first item to the end of its last."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.itemsize


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether items lie one after the other, in the order in which they are written."""
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return 0 in shape
        step *= length
    return True


def read_strided(path: str, offset: int, layout: Layout, begin: int, nbytes: int) -> Iterator[memoryview]:
    """Yield bytes of a tensor as they are written, from byte `begin` on, given where its first item is."""
    with reading(path), open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) < offset + layout.span:
            raise CheckpointError(
                f"ends at byte {size}, but its data extends to byte {offset + layout.span}: it was "
                "truncated while being read",
                file=path,
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Left to be closed when nothing views it any more: who stops in the middle keeps a view.
    yield from gather(mapped, offset, layout, begin, nbytes)


def gather(data: Any, offset: int, layout: Layout, begin: int, nbytes: int) -> Iterator[memoryview]:
    """Yield bytes as `read_strided`, out of a buffer; pieces have at most `PIECE_BYTES`, or one item."""
    import numpy as np

    if nbytes <= 0:
        return
    size = layout.itemsize
    strides = [stride * size for stride in layout.strides]
    tensor: NDArray[Any] = np.ndarray(layout.shape, f"<u{size}", data, offset, strides)
    first, end = begin // size, -(-(begin + nbytes) // size)
    most, position = max(1, PIECE_BYTES // size), first * size
    buffers = np.empty((2, min(most, end - first)), f"<u{size}")
    for block in blocks(layout.shape, first, end, most):
        items = _gathered(np.asarray(tensor[block]), buffers)  # of no dimensions, it is a number
        written = items.view("u1").data.toreadonly()
        yield written[max(0, begin - position) : begin + nbytes - position]
        position += len(written)


def blocks(shape: Sequence[int], first: int, end: int, most: int) -> Iterator[tuple[slice, ...]]:
    """Cut items `first` to `end` of a tensor, in row-major order, into blocks of at most `most` items each.

    A block is cut in one dimension, complete in those after it, and one item long in those before it.
    """
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    at = first
    while at < end:
        number, inside = divmod(at, row)
        rows = min(most, end - at) // row
        if inside or not rows:  # part of a row, or one that is too long
            stop = min(end, (number + 1) * row)
            for rest in blocks(shape[1:], inside, stop - number * row, most):
                yield slice(number, number + 1), *rest
        else:
            stop = at + rows * row
            yield slice(number, number + rows), *(slice(0, length) for length in shape[1:])
        at = stop


def _gathered(piece: NDArray[Any], buffers: NDArray[Any]) -> NDArray[Any]:
    """Copy a piece into a buffer; first in the order in which it lies, so that each page is read once."""
    order = sorted(range(piece.ndim), key=piece.strides.__getitem__, reverse=True)
    for buffer in buffers[:, : piece.size]:
        lying = buffer.reshape([piece.shape[axis] for axis in order])
        lying[...] = piece.transpose(order)
        piece, order = lying.transpose(sorted(order, key=order.__getitem__)), sorted(order)
        if piece.flags.c_contiguous:
            break
    return piece.reshape(-1)
