"""Reading files into the page cache while something else goes on, such as imports that take seconds.

A same-dtype load maps its files and reads almost nothing; the first forward pass then waits for the disk
page by page. Read ahead by several threads, the same bytes come at the disk's full speed.

Stands alone: the process that measures a load runs it by path, without the rest of shardkit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

JOB_BYTES = 16 << 20
BUFFER_BYTES = 1 << 20


class Prefetch:
    """Reads files, in order, in threads of its own, and keeps nothing but what the page cache keeps.

    Parameters
    ----------
    files
        Paths. One that cannot be read is left to whoever needs it, and their error.
    limit_bytes
        The most bytes to read; more than the page cache holds would push out what it has just read.
    threads
        How many read at once.
    """

    def __init__(self, files: Sequence[str], *, limit_bytes: int | None = None, threads: int = 4) -> None:
        self._jobs = _jobs(files, limit_bytes)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="shardkit-prefetch", daemon=True) for _ in range(threads)
        ]

    def start(self) -> Prefetch:
        """Begin, and return at once."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End it where it is; returns when no thread runs any more."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Wait until all is read."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        buffer = bytearray(BUFFER_BYTES)
        while not self._stopped.is_set():
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            with suppress(OSError):
                self._read(*job, buffer)

    def _read(self, file: str, start: int, stop: int, buffer: bytearray) -> None:
        handle = os.open(file, os.O_RDONLY)
        try:
            while start < stop and not self._stopped.is_set():
                count = os.preadv(handle, [memoryview(buffer)[: stop - start]], start)
                if not count:
                    return
                start += count
        finally:
            os.close(handle)


def _jobs(files: Sequence[str], limit_bytes: int | None) -> Iterator[tuple[str, int, int]]:
    left = limit_bytes
    for file in files:
        size = 0
        with suppress(OSError):
            size = os.stat(file).st_size
        if left is not None:
            size = min(size, left)
            left -= size
        yield from ((file, start, min(start + JOB_BYTES, size)) for start in range(0, size, JOB_BYTES))
