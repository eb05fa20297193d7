"""A child process that is watched while it runs, and never outlives the one who asked for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.errors import Cancelled
from shardkit.measure.limit import limited
from shardkit.measure.sampler import PortableSampler, Reading, StatusSampler

_TAIL_BYTES = 4000
_ASK_EVERY_SECONDS = 0.2
_EVENTS_BYTES = 4_000_000


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended and what was seen of it.

    Attributes
    ----------
    started_at, ended_at
        `time.monotonic()` seconds.
    return_code
        As Popen's: minus the signal's number for a killed child; None if it could not be started.
    timed_out
        Whether it was killed for taking too long.
    limit_kills
        How often the kernel killed for the memory limit; None without one, or where it does not say.
    events
        What it reported, whole lines only.
    output
        The end of what it printed, stdout and stderr together; or why it could not be started.
    readings, portable_readings, sampler_cpu_seconds
        What the samplers saw, and what the finer one cost.
    """

    started_at: float
    ended_at: float
    return_code: int | None
    timed_out: bool
    limit_kills: int | None
    events: list[dict[str, Any]]
    output: str
    readings: list[Reading]
    portable_readings: list[tuple[float, int]]
    sampler_cpu_seconds: float


def run_child(
    command: Sequence[str],
    job: Mapping[str, Any],
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    memory_limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> ChildEnd:
    """Start `command`, give it `job` and the path of a results file, sample it until it ends.

    Parameters
    ----------
    command
        Program and arguments. It gets `job` with "results" added, as one line of JSON on stdin.
    timeout
        Seconds after which it and all its children are killed; None for no limit.
    environment
        Variables added to our own.
    memory_limit
        Bytes that the child and all its children may have; None for no limit.
    stop
        Asked a few times a second; True kills the child.

    Raises
    ------
    Cancelled
        If `stop` said so.
    MeasurementError
        If this system does not let us limit memory.
    """
    import memory_profiler  # noqa: F401 - now: while the child runs, the import would hold up the samplers

    with tempfile.TemporaryDirectory(prefix="shardkit-") as folder, limited(memory_limit) as limit:
        results, printed = Path(folder, "results"), Path(folder, "printed")
        results.touch()
        started_at = time.monotonic()
        try:
            with printed.open("wb") as output:
                child = subprocess.Popen(  # noqa: S603 - the interpreter is the caller's choice
                    limit.command(command),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,  # a group of its own, so that all of it can be killed
                )
        except (OSError, ValueError) as error:
            return ChildEnd(started_at, time.monotonic(), None, False, None, [], str(error), [], [], 0.0)
        samplers = (StatusSampler(child.pid), PortableSampler(child))
        timed_out = _watch(child, samplers, {**job, "results": str(results)}, timeout, stop)
        ended_at = time.monotonic()
        fine, portable = samplers
        return ChildEnd(
            started_at,
            ended_at,
            child.returncode,
            timed_out,
            limit.kills(),
            _read_events(results),
            _read_tail(printed),
            fine.readings,
            portable.readings,
            fine.cpu_seconds,
        )


def _watch(
    child: subprocess.Popen[bytes],
    samplers: tuple[StatusSampler, PortableSampler],
    job: Mapping[str, Any],
    timeout: float | None,
    stop: Callable[[], bool] | None,
) -> bool:
    """Wait for the child and return whether it ran out of time; whatever happens, it is gone after."""
    timed_out = False
    try:
        for sampler in samplers:
            sampler.start()
        with suppress(BrokenPipeError):  # a child that does not listen ends without a result
            _lifeline(child).write(json.dumps(job).encode() + b"\n")
            _lifeline(child).flush()
        _wait(child, timeout, stop)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _kill_group(child)
        child.wait()
        with suppress(BrokenPipeError):
            _lifeline(child).close()
        for sampler in samplers:
            if sampler.ident is not None:
                sampler.join()
    return timed_out


def _wait(child: subprocess.Popen[bytes], timeout: float | None, stop: Callable[[], bool] | None) -> None:
    end = float("inf") if timeout is None else time.monotonic() + timeout
    while stop is not None and (left := end - time.monotonic()) > _ASK_EVERY_SECONDS:
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(left, _ASK_EVERY_SECONDS))
            return
        if stop():
            raise Cancelled("stopped as asked, in the middle of a load")
    child.wait(None if timeout is None else max(0.0, end - time.monotonic()))


def _lifeline(child: subprocess.Popen[bytes]) -> Any:
    return child.stdin


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    # Also after a normal end: what the child may have left running goes with it.
    if sys.platform == "win32":
        child.kill()
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _read_events(path: Path) -> list[dict[str, Any]]:
    events = []
    with path.open("rb") as file:
        lines = file.read(_EVENTS_BYTES).split(b"\n")[:-1]
    for line in lines:
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                events.append(event)
    return events


def _read_tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read(_TAIL_BYTES).decode("utf-8", "replace")
