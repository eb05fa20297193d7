"""Memory of another process over time.

Both samplers are threads of the parent. In the child a sampler would wait for the child's interpreter
lock just when loading is busiest, its work would count as the load's CPU time, and its curve would die
with the child. From outside, `/proc/<pid>/status` costs the child nothing: the kernel reads counters
without walking its page tables (as `smaps_rollup` would).
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import suppress
from typing import NamedTuple

_INTERVAL_SECONDS = 0.01
_PORTABLE_INTERVAL_SECONDS = 0.2
# A pause is at least this many times what a reading costs, waking up included: 1.25 % of a core at most.
_REST = 80
_FIELDS = (b"VmHWM:", b"VmRSS:", b"RssAnon:", b"RssFile:", b"RssShmem:")
_FIELDS_BYTES = 160  # they follow each other


class Reading(NamedTuple):
    """One moment; shared memory counts as anonymous, as neither can be dropped and read again."""

    at: float
    peak_total_bytes: int
    anonymous_bytes: int
    file_bytes: int


def parse_status(status: bytes, at: float) -> Reading | None:
    """Return what `/proc/<pid>/status` says from VmHWM on; None if that is not all there."""
    words = status.split(None, 3 * len(_FIELDS))
    if tuple(words[0:15:3]) != _FIELDS:
        return None
    peak, _, anonymous, file, shared = (int(word) * 1024 for word in words[1:15:3])
    return Reading(at, peak, anonymous + shared, file)


class StatusSampler(threading.Thread):
    """Reads a process's `/proc` status every few milliseconds until it ends.

    It makes sense of what it read only then: while the process runs, each microsecond may be taken from it.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(name="shardkit-sampler", daemon=True)
        self._pid = pid
        self.readings: list[Reading] = []
        self.cpu_seconds, self.ended_at = 0.0, 0.0

    def run(self) -> None:
        """Sample until the process is gone."""
        seen: list[tuple[bytes, float]] = []
        # The open descriptor stays with this process, whoever gets its number later.
        with suppress(OSError), open(f"/proc/{self._pid}/status", "rb", buffering=0) as file:
            while (found := (status := os.pread(file.fileno(), 4096, 0)).find(_FIELDS[0])) >= 0:
                seen.append((status[found : found + _FIELDS_BYTES], time.monotonic()))
                self.cpu_seconds = time.thread_time()  # of this thread, which does nothing else
                time.sleep(max(_INTERVAL_SECONDS, _REST * self.cpu_seconds / len(seen)))
        self.ended_at = time.monotonic()
        read = (parse_status(fields, at) for fields, at in seen)
        # A process that is about to end has no memory.
        self.readings = [now for now in read if now and now.anonymous_bytes + now.file_bytes]


class PortableSampler(threading.Thread):
    """memory_profiler's curve of a child's resident memory: coarser, but there on every system.

    `memory_usage` is given the Popen, never a function (a fast function it runs several times), and a
    stream, so that readings survive the error with which it meets a process that has just gone.
    """

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        super().__init__(name="shardkit-memory-profiler", daemon=True)
        self._child = child
        self._clock_offset = time.monotonic() - time.time()
        self.readings: list[tuple[float, int]] = []

    def run(self) -> None:
        """Sample until the child is gone."""
        import psutil
        from memory_profiler import memory_usage

        with suppress(psutil.Error, OSError):
            memory_usage(self._child, interval=_PORTABLE_INTERVAL_SECONDS, timestamps=True, stream=self)

    def write(self, line: str) -> None:
        """Take one line of memory_profiler's: ``MEM <MiB> <seconds since 1970>``."""
        _, mebibytes, at = line.split()
        if float(mebibytes) > 0:  # else it was gone already
            self.readings.append((float(at) + self._clock_offset, round(float(mebibytes) * 2**20)))

    def flush(self) -> None:
        """Nothing is held back."""
