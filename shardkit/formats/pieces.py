"""Tensors in pieces: blocks of a tensor in several files, as the ranks of a training run write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from shardkit.formats.strided import blocks

Read = Callable[[str, int, int], bytes]  # of a file, from a byte on, so many


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor: begins at the item `starts`, and lies as it is written at `offset` of a file."""

    file: str
    offset: int
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, block: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return what a block of the tensor has of it, in the tensor's items; empty slices for nothing."""
        parts = zip(block, self.starts, self.shape, strict=True)
        return tuple(slice(max(b.start, start), min(b.stop, start + length)) for b, start, length in parts)

    def index(self, item: tuple[int, ...]) -> int:
        """Return the number of an item of the tensor in the piece."""
        number = 0
        for at, start, length in zip(item, self.starts, self.shape, strict=True):
            number = number * length + at - start
        return number


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of a tensor of this shape, which cover it, in order of their first items."""

    shape: tuple[int, ...]
    itemsize: int
    pieces: tuple[Piece, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether they lie one after the other in the tensor, too: it was cut along its first dimension."""
        return all(piece.shape[1:] == self.shape[1:] for piece in self.pieces)

    def read(self, read: Read, begin: int, nbytes: int, most: int) -> Iterator[memoryview]:
        """Yield bytes of the tensor as it is written, from byte `begin` on, at most `most` at a time.

        Of a piece, a block has one range: it is complete in all dimensions after the one it is cut in.
        """
        import numpy as np

        size = self.itemsize
        position = begin // size * size
        for block in blocks(self.shape, begin // size, -(-(begin + nbytes) // size), max(1, most // size)):
            items = np.empty([part.stop - part.start for part in block], f"<u{size}")
            for piece in self.pieces:
                common = piece.within(block)
                lengths = [part.stop - part.start for part in common]
                if all(length > 0 for length in lengths):
                    at = piece.offset + piece.index(tuple(part.start for part in common)) * size
                    data = np.frombuffer(read(piece.file, at, prod(lengths) * size), items.dtype)
                    inside = zip(common, block, strict=True)
                    target = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in inside)
                    items[target] = data.reshape(lengths)
            written = items.reshape(-1).view("u1").data.toreadonly()
            yield written[max(0, begin - position) : begin + nbytes - position]
            position += len(written)
