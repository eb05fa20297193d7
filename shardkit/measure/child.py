"""A child process that is watched while it runs, and never outlives its caller."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from shardkit.base.errors import Cancelled
from shardkit.measure.events import read_events
from shardkit.measure.limit import Limited, limited
from shardkit.measure.measurement import MemoryCurve, SamplerCost
from shardkit.measure.sampler import PortableSampler, Reading, StatusSampler
from shardkit.measure.spec import LoadSpec

_TAIL_BYTES = 4000
_ASK_EVERY_SECONDS = 0.2
_EVENTS_BYTES = 4_000_000
_CURVE_POINTS = 500
# A load from a folder has no business on the network, whose delays would count as the load's.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
# The end of its stdin says that we were killed: then it ends the child's group, and removes the folder; and
# the control group, with what has left the child's.
_GUARD = """
read _; kill -s KILL -- -"$0"; rm -rf "$1"
for _ in 1 2 3 4 5 6 7 8 9; do
    test -d "$2" || exit
    kill -s KILL $(cat "$2/cgroup.procs"); rmdir "$2" || sleep 0.1
done
"""


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended and what was seen of it; moments are `time.monotonic()` seconds.

    The return code is Popen's, or None if it could not be started, and then the output says why. Where the
    child is only a wrapper, and another process says hello, there are no readings.
    """

    started_at: float
    ended_at: float
    return_code: int | None
    timed_out: bool = False
    limit_kills: int | None = None
    events: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: read_events(b""))
    output: str = ""
    readings: Sequence[Reading] = ()
    portable_readings: Sequence[tuple[float, int]] = ()
    sampler_cpu_seconds: float = 0.0
    sampled_until: float = 0.0

    def sampler_cost(self, load_at: float) -> SamplerCost:
        """Return how closely a load that began at a moment was watched."""
        times = [reading.at for reading in self.readings]
        looks = [*times, max(self.sampled_until, *times)] if times else []
        gaps = [later - earlier for earlier, later in pairwise(looks) if later > load_at]
        share = self.sampler_cpu_seconds / (self.ended_at - self.started_at)
        return SamplerCost(len(times), max(gaps, default=None), share)

    def curve(self) -> MemoryCurve:
        """Return its memory over time."""
        fine = [(r.at, r.anonymous_bytes, r.file_bytes) for r in self.readings]
        return MemoryCurve(*self._columns(fine, 3), *self._columns(self.portable_readings, 2))

    def _columns(self, readings: Sequence[tuple[float, ...]], count: int) -> list[tuple[Any, ...]]:
        """Return times and sizes, thinned to 500 points, each with the peaks of those it stands for."""
        step = -(-len(readings) // _CURVE_POINTS) or 1
        groups = (readings[first : first + step] for first in range(0, len(readings), step))
        points = [tuple(map(max, zip(*group, strict=True))) for group in groups]
        times, *sizes = zip(*points, strict=True) if points else [()] * count
        return [tuple(round(at - self.started_at, 4) for at in times), *sizes]


def run_child(
    command: Sequence[str],
    job: Mapping[str, Any],
    spec: LoadSpec,
    stop: Callable[[], bool] | None,
    environment: Mapping[str, str] | None = None,
) -> ChildEnd:
    """Start `command`, give it `job` and the path of a results file, sample it until it ends.

    The command gets one more argument: the path of a file with `job` as JSON, "results" added. When it ends,
    its process group is killed; a daemon that has left its session escapes, unless a memory limit's control
    group holds it.
    """
    import memory_profiler  # noqa: F401 - now: while the child runs, the import would hold up the samplers

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardkit-")))
        limit = stack.enter_context(limited(spec.memory_limit_bytes))
        # Held open from the start: whatever the child puts in their place is not what we read.
        results, printed = (
            stack.enter_context((folder / name).open("w+b", buffering=0)) for name in ("results", "printed")
        )
        (folder / "job").write_text(json.dumps({**job, "results": str(folder / "results")}))
        started_at = time.monotonic()
        try:
            child = _start([*command, str(folder / "job")], limit, printed, environment or {})
        except (OSError, ValueError) as error:
            return ChildEnd(started_at, time.monotonic(), None, output=str(error))
        fine, portable = StatusSampler(child.pid), PortableSampler(child)
        with _gone_after(child, folder, limit.group):
            for sampler in (fine, portable):
                sampler.start()
            timed_out = _runs_out_of_time(child, fine, spec.timeout, stop)
        for sampler in (fine, portable):
            sampler.join()
        ended_at = time.monotonic()
        events = read_events(os.pread(results.fileno(), _EVENTS_BYTES, 0))
        printed.seek(-min(_TAIL_BYTES, printed.seek(0, os.SEEK_END)), os.SEEK_END)
        is_child = all(hello["pid"] == child.pid for hello in events["hello"])
        return ChildEnd(
            started_at,
            ended_at,
            child.returncode,
            timed_out,
            limit.kills(),
            events,
            printed.read(_TAIL_BYTES).decode("utf-8", "replace"),
            fine.readings if is_child else (),
            portable.readings if is_child else (),
            fine.cpu_seconds,
            fine.ended_at,
        )


def _start(
    command: Sequence[str], limit: Limited, printed: FileIO, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - the interpreter is the caller's choice
        limit.command(command),
        stdin=subprocess.DEVNULL,  # a library that asks a question gets no answer
        stdout=printed,
        stderr=subprocess.STDOUT,
        env={**os.environ, **_ENVIRONMENT, **environment},
        start_new_session=True,  # a group of its own, so that all of it can be killed
    )


@contextmanager
def _gone_after(child: subprocess.Popen[bytes], folder: Path, group: Path | None) -> Iterator[None]:
    """End the child, and what it may have left running, whatever happens inside, or to us."""
    guard = ["/bin/sh", "-c", _GUARD, str(child.pid), str(folder), str(group or "")]
    quiet: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with child:
        try:
            with subprocess.Popen(guard, start_new_session=True, **quiet) as guarding:  # noqa: S603
                try:
                    yield
                finally:
                    guarding.kill()
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)


def _runs_out_of_time(
    child: subprocess.Popen[bytes],
    sampler: StatusSampler,
    timeout: float | None,
    stop: Callable[[], bool] | None,
) -> bool:
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    while (left := end - time.monotonic()) > 0:
        seconds = min(left, _ASK_EVERY_SECONDS)
        sampler.join(seconds)  # it sees the end; `child.wait` would look for it 50 times a second
        if not sampler.is_alive():
            with suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
                return False
        if stop is not None and stop():
            raise Cancelled("stopped in the middle of a load")
    return True
