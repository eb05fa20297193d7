"""Reading files into the page cache while something else goes on, such as imports that take seconds.

A same-dtype load maps its files and reads almost nothing; the first forward pass then waits for the disk
page by page. Read ahead by several threads, the same bytes come at the disk's full speed.

Stands alone: the process that measures a load runs it by path, without the rest of shardkit.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

_THREADS = 4
_JOB_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20


def prefetch(files: Sequence[str], limit_bytes: int) -> Callable[[], None]:
    """Begin to read files, in order, in threads, and return at once: with what ends it after the next bytes.

    Nothing is kept but what the page cache keeps. More bytes than that holds would push out what was just
    read: `limit_bytes` is the most to read. A file that cannot be read is left to whoever needs it, and their
    error.
    """
    jobs = deque(_jobs(files, limit_bytes))
    for _ in range(_THREADS):
        threading.Thread(target=_work, args=(jobs,), name="shardkit-prefetch", daemon=True).start()
    return jobs.clear


def _jobs(files: Sequence[str], limit_bytes: int) -> Iterator[tuple[str, int, int]]:
    for file in files:
        size = 0
        with suppress(OSError):
            size = min(os.stat(file).st_size, limit_bytes)
        limit_bytes -= size
        yield from ((file, start, min(start + _JOB_BYTES, size)) for start in range(0, size, _JOB_BYTES))


def _work(jobs: deque[tuple[str, int, int]]) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with suppress(IndexError):  # no job is left
        while True:
            file, start, stop = jobs.popleft()
            with suppress(OSError), open(file, "rb", buffering=0) as handle:
                handle.seek(start)
                while start < stop and (count := handle.readinto(buffer[: stop - start])):
                    start += count
