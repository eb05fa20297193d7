"""A file read in ranges, wherever it lies: few reads, and each of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shardkit.base.errors import CheckpointError

Span = tuple[int, int]  # offset, nbytes
Reader = Callable[[Sequence[Span]], Iterable[bytes]]

BLOCK_BYTES = 1 << 16
_AT_ONCE = 64
_MAX_READ_BYTES = 16_000_000  # of the directory of an archive: room for 150,000 records


class RangedFile:
    """Bytes of a file by range. What was read along with a range is kept, for it is asked for next."""

    def __init__(self, read: Reader, size: int, where: str) -> None:
        self._read, self.size, self.where = read, size, where
        self._blocks: list[tuple[int, bytes]] = []
        self._at = 0

    def get(self, offset: int, nbytes: int) -> bytes:
        """Return the bytes of a range; refuse one beyond the end of the file."""
        for start, block in self._blocks:
            if start <= offset and offset + nbytes <= start + len(block):
                return block[offset - start : offset - start + nbytes]
        if offset < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"has {self.size} bytes, but its contents extend to byte {offset + nbytes}: the file may be "
                "incomplete",
                file=self.where,
            )
        (block,) = self._read([(offset, min(max(nbytes, BLOCK_BYTES), self.size - offset))])
        self._blocks.append((offset, block))
        return block[:nbytes]

    def each(self, spans: Iterable[Span]) -> dict[int, bytes]:
        """Return small ranges by their offsets; those that lie close together are read at once."""
        groups: list[list[Span]] = []
        for offset, nbytes in sorted(spans):
            if not groups or offset + nbytes - groups[-1][0][0] > BLOCK_BYTES:
                groups.append([])
            groups[-1].append((offset, nbytes))
        found: dict[int, bytes] = {}
        for first in range(0, len(groups), _AT_ONCE):
            batch = groups[first : first + _AT_ONCE]
            ranges = [(group[0][0], sum(group[-1]) - group[0][0]) for group in batch]
            for (start, _), group, block in zip(ranges, batch, self._read(ranges), strict=True):
                found |= {at: block[at - start : at - start + nbytes] for at, nbytes in group}
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move as a file does."""
        self._at = offset + (0, self._at, self.size)[whence]
        if self._at < 0:
            raise OSError(f"{self._at} is before the beginning")
        return self._at

    def tell(self) -> int:
        """Return where `read` begins."""
        return self._at

    def read(self, nbytes: int = -1) -> bytes:
        """Read as a file does, but in bounded memory."""
        if nbytes > _MAX_READ_BYTES:
            raise CheckpointError(
                f"has a directory of {nbytes} bytes, more than the limit of {_MAX_READ_BYTES}",
                file=self.where,
            )
        left = max(0, self.size - self._at)
        data = self.get(self._at, left if nbytes < 0 else min(nbytes, left))
        self._at += len(data)
        return data
