"""Tensors that do not lie in their file as they are written: gathered, piece by piece, in bounded memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

    if not nbytes:
        return
    size, end = layout.itemsize, begin + nbytes
    strides = [stride * size for stride in layout.strides]
    tensor: NDArray[Any] = np.ndarray(layout.shape, f"<u{size}", data, offset, strides)
    most = max(1, PIECE_BYTES // size)
    pieces: Any = np.nditer(tensor, ["external_loop", "buffered", "ranged"], order="C", buffersize=most)
    pieces.iterrange = begin // size, -(-end // size)
    position = begin // size * size
    for items in pieces:
        written = np.ascontiguousarray(items).view("u1").data
        yield written[max(0, begin - position) : end - position]
        position += len(written)
