"""Whether bytes are read from the disk or from memory: pages are dropped, and `mincore` asked what is left.

A copy that is read back from memory would prove what was written, not what the disk holds. Without numpy, as
sharding is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

_WINDOW_BYTES = 1 << 30
_PROBE_PAGES = 16
_RESIDENT = bytes(flags & 1 for flags in range(256))  # the other bits of a page mean nothing here
_MOSTLY = 0.5  # opening a file reads its header, and the kernel reads on from there


def drop(files: Iterable[str | os.PathLike[str]]) -> int | None:
    """Drop the pages of files from memory; return of how many some are left, None where that is not shown."""
    files = list(files)
    for file in files:
        with suppress(OSError, AttributeError), open(file, "rb") as handle:  # what is left is counted below
            with suppress(OSError):  # dirty pages stay; a read-only file system has none, and refuses
                os.fsync(handle)
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _sum(_resident_bytes(file) > 0 for file in files)


def mostly_resident(files: Iterable[str | os.PathLike[str]]) -> int | None:
    """Return how many of the files are mostly in memory; None where the system does not show it."""
    return _sum(_resident_bytes(file) > _MOSTLY * os.stat(file).st_size for file in files)


def resident_bytes(files: Iterable[str | os.PathLike[str]]) -> int | None:
    """Return how many bytes of the files are in memory; None where the system does not show it."""
    return _sum(map(_resident_bytes, files))


def _sum(counts: Iterable[int]) -> int | None:
    try:
        return sum(counts)
    except (OSError, AttributeError):
        return None


def _resident_bytes(file: str | os.PathLike[str]) -> int:
    # To anyone who neither owns a file nor may write it, Linux calls every page resident.
    if os.geteuid() not in (0, os.stat(file).st_uid) and not os.access(file, os.W_OK):
        raise PermissionError(file)
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        pages = sum(
            _resident_pages(handle.fileno(), start, min(_WINDOW_BYTES, size - start), _mincore()).count(1)
            for start in range(0, size, _WINDOW_BYTES)
        )
    return min(size, pages * mmap.PAGESIZE)


@cache
def _mincore() -> Callable[..., int]:
    """Return the system call, unless it calls all pages resident, as some do: those never touched are not."""
    try:
        mincore: Callable[..., int] = ctypes.CDLL(None, use_errno=True).mincore
    except TypeError:  # on Windows
        raise OSError("no mincore") from None
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(_PROBE_PAGES * mmap.PAGESIZE))
        file.truncate(1 << 22)
        pages = _resident_pages(file.fileno(), 0, 1 << 22, mincore)
    if not all(pages[:_PROBE_PAGES]) or any(pages[-_PROBE_PAGES:]):
        raise OSError("mincore does not know what is in memory")
    return mincore


def _resident_pages(handle: int, start: int, length: int, mincore: Callable[..., int]) -> bytes:
    # A private copy, of which nothing is made: only what may be written gives its address away.
    with mmap.mmap(handle, length, access=mmap.ACCESS_COPY, offset=start) as window:
        flags: Any = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(window)))
        if mincore(address, ctypes.c_size_t(length), flags):
            raise OSError(ctypes.get_errno(), "mincore failed")
    return bytes(flags).translate(_RESIDENT)
