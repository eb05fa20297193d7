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

_THREADS = 4
_JOB_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20


class Prefetch:
    """Reads files, in order, in threads of its own, and keeps nothing but what the page cache keeps.

    More bytes than that holds would push out what was just read: `limit_bytes` is the most to read. A file
    that cannot be read is left to whoever needs it, and their error.
    """

    def __init__(self, files: Sequence[str], limit_bytes: int) -> None:
        self._jobs = _jobs(files, limit_bytes)
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Begin, and return at once."""
        for _ in range(_THREADS):
            threading.Thread(target=self._work, name="shardkit-prefetch", daemon=True).start()

    def stop(self) -> None:
        """End it where it is."""
        self._stopped.set()

    def _work(self) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while not self._stopped.is_set():
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            with suppress(OSError):
                self._read(*job, buffer)

    def _read(self, file: str, start: int, stop: int, buffer: memoryview) -> None:
        with open(file, "rb", buffering=0) as handle:
            handle.seek(start)
            while start < stop and not self._stopped.is_set():
                count = handle.readinto(buffer[: stop - start])
                if not count:
                    return
                start += count


def _jobs(files: Sequence[str], limit_bytes: int) -> Iterator[tuple[str, int, int]]:
    for file in files:
        size = 0
        with suppress(OSError):
            size = min(os.stat(file).st_size, limit_bytes)
        limit_bytes -= size
        yield from ((file, start, min(start + _JOB_BYTES, size)) for start in range(0, size, _JOB_BYTES))
