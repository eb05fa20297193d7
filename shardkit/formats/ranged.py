"""A file read in ranges, wherever it lies: few reads, and each of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shardkit.base.errors import CheckpointError

Span = tuple[int, int]  # offset, nbytes
Reader = Callable[[Sequence[Span]], Iterable[bytes]]

BLOCK_BYTES = 1 << 16
_GAP_BYTES = 1 << 14  # read past sooner than in a read of its own
_AT_ONCE = 64


class RangedFile:
    """Bytes of a file by range. What was read along with a range is kept, for it is asked for next.

    Attributes
    ----------
    size
        Of the file, in bytes.
    where
        What errors call it.
    """

    def __init__(self, read: Reader, size: int, where: str) -> None:
        self._read, self.size, self.where = read, size, where
        self._blocks: list[tuple[int, bytes]] = []

    def get(self, offset: int, nbytes: int) -> bytes:
        """Return the bytes of a range.

        Raises
        ------
        CheckpointError
            If the file does not go that far.
        """
        if (known := self._kept(offset, nbytes)) is not None:
            return known
        if offset < 0 or offset + nbytes > self.size:
            raise self._cut(offset + nbytes)
        count = min(max(nbytes, BLOCK_BYTES), self.size - offset)
        (block,) = self._read([(offset, count)])
        if len(block) < nbytes:
            raise self._cut(offset + nbytes)
        self._blocks.append((offset, block))
        return block[:nbytes]

    def has(self, offset: int, nbytes: int) -> bool:
        """Whether a range was read already."""
        return self._kept(offset, nbytes) is not None

    def each(self, spans: Iterable[Span]) -> dict[int, bytes]:
        """Return small ranges by their offsets; those that lie close together are read at once."""
        found: dict[int, bytes] = {}
        groups: list[list[Span]] = []
        end = -1
        for offset, nbytes in sorted(spans):
            if (known := self._kept(offset, nbytes)) is not None:
                found[offset] = known
                continue
            if groups and offset - end <= _GAP_BYTES and offset + nbytes - groups[-1][0][0] <= BLOCK_BYTES:
                groups[-1].append((offset, nbytes))
            else:
                groups.append([(offset, nbytes)])
            end = offset + nbytes
        for first in range(0, len(groups), _AT_ONCE):
            batch = groups[first : first + _AT_ONCE]
            ranges = [(group[0][0], sum(group[-1]) - group[0][0]) for group in batch]
            for group, block in zip(batch, self._read(ranges), strict=True):
                start = group[0][0]
                found |= {at: block[at - start : at - start + nbytes] for at, nbytes in group}
        return found

    def _kept(self, offset: int, nbytes: int) -> bytes | None:
        for start, block in self._blocks:
            if start <= offset and offset + nbytes <= start + len(block):
                return block[offset - start : offset - start + nbytes]
        return None

    def _cut(self, end: int) -> CheckpointError:
        return CheckpointError(
            f"has {self.size} bytes, but its contents extend to byte {end}: the file may be incomplete",
            file=self.where,
        )
