"""Reading tensors into memory of our own: past the page cache where the file system allows it.

Of a model larger than memory, the page cache keeps nothing until it is needed again, and takes the memory
that could hold weights for good.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress

from shardkit.base.errors import CheckpointError, reading
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.strided import read_strided
from shardkit.formats.tensor import TensorInfo
from shardkit.sources.fileset import State
from shardkit.sources.local import file_state

# Direct reads want offset, length and address aligned to the disk's blocks; a page suits all disks.
PAGE = mmap.PAGESIZE
_CHUNK_BYTES = 16 << 20
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def own_memory(nbytes: int) -> mmap.mmap:
    """Return page-aligned memory of this process alone; its pages exist once they are written to."""
    made = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # not on every system
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


def pages_of(tensor: TensorInfo) -> int:
    """Return the bytes of all pages of its file that a contiguous tensor touches."""
    return (-(-(tensor.offset + tensor.nbytes) // PAGE) - tensor.offset // PAGE) * PAGE


class WeightFiles:
    """The weight files of a checkpoint, open for reading: what is deleted stays readable.

    Raises
    ------
    CheckpointError
        If a file is gone, or is no longer what the checkpoint was opened from.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = {
            name: _OpenFile(checkpoint.path(name), checkpoint.seen.get(name)) for name in checkpoint.files
        }

    def read(
        self, tensor: TensorInfo, buffer: memoryview, may_hold: Callable[[int], bool] = lambda _: True
    ) -> None:
        """Read the pages of a contiguous tensor into a page-aligned buffer of their size.

        Parameters
        ----------
        may_hold
            Called before so many bytes more of the buffer are filled; False ends the reading.

        Raises
        ------
        CheckpointError
            If a file ends too early, was changed, or cannot be read; names file, tensor and numbers.
        """
        self._files[tensor.file].read_pages(tensor, tensor.offset, tensor.nbytes, buffer, may_hold)

    def read_range(
        self, tensor: TensorInfo, begin: int, nbytes: int, buffer: memoryview
    ) -> tuple[bytearray | memoryview, int]:
        """Read bytes of a tensor, and return what they are in, and where; raises as `read` does.

        The page-aligned buffer, two pages larger than they, is used where they lie together in the file.
        """
        if tensor.layout is None:
            first = tensor.offset + begin
            self._files[tensor.file].read_pages(tensor, first, nbytes, buffer, lambda _: True)
            return buffer, first % PAGE
        pieces = read_strided(self._files[tensor.file].path, tensor.offset, tensor.layout, begin, nbytes)
        return bytearray().join(map(bytes, pieces)), 0

    def read_row(self, tensor: TensorInfo, begin: int, buffer: memoryview) -> None:
        """Read a few bytes of a tensor, from its byte `begin` on; raises as `read` does."""
        self._files[tensor.file].read_part(tensor, begin, buffer)


class _OpenFile:
    """One file, opened twice: past the page cache, and through it for small reads."""

    def __init__(self, path: str, seen: State | None) -> None:
        self.path, self._direct = path, -1
        with reading(path):
            self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError, AttributeError):  # not on every system, nor every file system
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._state = seen or file_state(os.fstat(self._cached))
        self._check("")

    def __del__(self) -> None:
        for handle in (self._direct, getattr(self, "_cached", -1)):
            if handle >= 0:
                os.close(handle)

    def read_pages(
        self, tensor: TensorInfo, first: int, nbytes: int, buffer: memoryview, may_hold: Callable[[int], bool]
    ) -> None:
        start = first // PAGE * PAGE
        needed, done, held = first + nbytes - start, 0, 0
        self._check(tensor.name)
        while done < needed:
            end = min(done + _CHUNK_BYTES, -(-needed // PAGE) * PAGE)
            if end > held and not may_hold(end - held):
                return
            held = max(end, held)
            with reading(self.path, tensor.name):
                count = self._read(buffer[done:end], start + done)
            done += self._counted(count, tensor)

    def read_part(self, tensor: TensorInfo, begin: int, buffer: memoryview) -> None:
        done = 0
        self._check(tensor.name)
        while done < len(buffer):
            with reading(self.path, tensor.name):
                count = os.preadv(self._cached, [buffer[done:]], tensor.offset + begin + done)
            done += self._counted(count, tensor)

    def _read(self, buffer: memoryview, offset: int) -> int:
        if self._direct >= 0 and offset % PAGE == 0:  # it is not after a read that was interrupted
            try:
                return os.preadv(self._direct, [buffer], offset)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        count = os.preadv(self._cached, [buffer], offset)
        with suppress(OSError, AttributeError):
            os.posix_fadvise(self._cached, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _counted(self, count: int, tensor: TensorInfo) -> int:
        if count:
            return count
        size, end = os.fstat(self._cached).st_size, tensor.offset + tensor.nbytes
        raise CheckpointError(
            f"ends at byte {size}, but its data extends to byte {end}: it was truncated while in use",
            file=self.path,
            tensor=tensor.name,
        )

    def _check(self, tensor: str) -> None:
        now = file_state(os.fstat(self._cached))
        if now[:2] != self._state[:2]:
            raise CheckpointError(
                f"was changed while in use: it had {self._state[0]} bytes, and has {now[0]} now; load the "
                "model again",
                file=self.path,
                tensor=tensor or None,
            )
