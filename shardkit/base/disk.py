"""Reading files into memory of our own: past the page cache where the file system allows it.

Of a model larger than memory, the page cache keeps nothing until it is needed again, and takes the memory
that could hold weights for good.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from shardkit.base.errors import CheckpointError, reading

# Direct reads want offset, length and address aligned to the disk's blocks; a page suits all disks.
PAGE = mmap.PAGESIZE
CHUNK_BYTES = 16 << 20
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def own_memory(nbytes: int) -> mmap.mmap:
    """Return page-aligned memory of this process alone; its pages exist once they are written to."""
    made = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # not on every system
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


def pages_of(nbytes: int, offset: int = 0) -> int:
    """Return the bytes of all pages that `nbytes` touch which begin at an offset."""
    return (-(-(offset + nbytes) // PAGE) - offset // PAGE) * PAGE


class DiskFile:
    """One file, opened twice: past the page cache, and through it (`cached`) for small reads."""

    def __init__(self, path: str) -> None:
        self._direct = -1
        with reading(path):
            self.cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError, AttributeError):  # not on every system, nor every file system
            os.posix_fadvise(self.cached, 0, 0, os.POSIX_FADV_RANDOM)
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def __del__(self) -> None:
        for handle in (self._direct, getattr(self, "cached", -1)):
            if handle >= 0:
                os.close(handle)

    def read(self, buffer: memoryview, offset: int) -> int:
        """Read into a page-aligned buffer of pages, and leave nothing in the page cache; return how much."""
        if offset % PAGE == 0:  # it is not after a read that was interrupted
            try:
                return self.read_direct(buffer, offset)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        count = os.preadv(self.cached, [buffer], offset)
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self.cached, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def read_direct(self, buffer: memoryview, offset: int) -> int:
        """Read past the page cache; an OSError where the file system does not allow that."""
        if self._direct < 0:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.preadv(self._direct, [buffer], offset)


def measured_rate(paths: Iterable[str], seconds: float = 1.0) -> int:
    """Return how many bytes a second are read from files, one after the other, past the page cache.

    It takes so many `seconds`, or less where the files end before. A CheckpointError if a file cannot be
    read that way, or all of them are empty.
    """
    buffer, done, path = memoryview(own_memory(CHUNK_BYTES)), 0, ""
    begin = time.perf_counter()
    for path in paths:
        file, offset = DiskFile(path), 0
        while time.perf_counter() < begin + seconds:
            try:
                count = file.read_direct(buffer, offset)
            except OSError as error:
                why = f"does not show the disk's rate past the page cache ({error.strerror}): state the rate"
                raise CheckpointError(why, file=path) from error
            offset, done = offset + count, done + count
            if count < CHUNK_BYTES:  # the end
                break
    if not done:
        raise CheckpointError("has no bytes that would show the disk's rate", file=path)
    return int(done / (time.perf_counter() - begin))
