"""The smallest memory in which a load succeeds: bisected with real loads under real limits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardkit.base.errors import Cancelled, MeasurementError
from shardkit.base.machine import usable_memory
from shardkit.base.record import Record, Summary, Table, plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.scan import refuse_gguf
from shardkit.formats.tensor import LoadDtypeLike
from shardkit.measure.launch import run_load
from shardkit.measure.limit import why_unlimited
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.quantities import format_seconds
from shardkit.measure.spec import LoadSpec, check, share

TOLERANCE = 0.05
_TOO_FINE, _SMALLEST_LIMIT = 0.005, 1_000_000
_FAR = 32  # times the prediction, where the system does not say what memory it has
_WIDEST_STEP = 12
_GOALS = ("loaded", "generated")
# A load that lives only by reading the same pages again and again is no success.
_PATIENCE, _LEAST_SECONDS = 5, 60.0


@dataclass(frozen=True)
class LimitedRun:
    """One load under a limit: whether it loaded, and came to its first token; seconds; how it ended."""

    limit_bytes: int
    loaded: bool
    generated: bool
    seconds: float
    end: str


@dataclass(frozen=True)
class MemoryFloor(Record):
    """The smallest memory limits under which a load succeeded.

    Attributes
    ----------
    source, dtype
        What was loaded, and the requested dtype.
    predicted_bytes
        Peak anonymous memory as `Checkpoint.estimate` has it, from the headers alone.
    load_bytes, first_token_bytes
        Smallest limit under which `from_pretrained` succeeded; under which it gave a token as well.
    load_failed_bytes, first_token_failed_bytes
        Largest limit below that under which it did not.
    free_seconds
        How long the load with its first token took without a limit, imports and all.
    runs
        Every limited load, in order.
    stack
        What loaded.
    notes
        What weakens the result, as the load without a limit reported it.
    has_first_token
        Whether the load without a limit came to a first token; else the limits for it are those of the load.
    """

    source: str
    dtype: str | None
    predicted_bytes: int
    load_bytes: int
    load_failed_bytes: int
    first_token_bytes: int
    first_token_failed_bytes: int
    free_seconds: float
    runs: tuple[LimitedRun, ...]
    stack: str
    notes: tuple[str, ...] = ()
    has_first_token: bool = True

    def summary(self) -> Summary:
        """Return the floors, the prediction, and every run."""
        token, end = _between(self.first_token_bytes, self.first_token_failed_bytes), "first token"
        if not self.has_first_token:
            token, end = "not reached without a limit either", "its end"
        facts = (
            ("source", shown_path(self.source)),
            ("requested", self.dtype or "no dtype"),
            ("predicted", f"{format_size(self.predicted_bytes)} (peak anonymous, from the headers)"),
            ("to load", _between(self.load_bytes, self.load_failed_bytes)),
            ("to the first token", token),
            ("without a limit", f"{format_seconds(self.free_seconds)} from process start to {end}"),
            ("stack", self.stack),
        )
        rows = tuple(
            (
                format_size(run.limit_bytes),
                *("yes" if done else "no" for done in (run.loaded, run.generated)),
                format_seconds(run.seconds),
                run.end,
            )
            for run in sorted(self.runs, key=lambda run: run.limit_bytes)
        )
        table = Table(("limit", "loaded", "first token", "after", "end"), rows)
        return Summary("Smallest memory limit for a load", facts, (table,), self.notes)


def _between(succeeded: int, failed: int) -> str:
    return f"{format_size(succeeded)} ({format_size(failed)} is too little)"


def minimum_memory(
    source: str | os.PathLike[str],
    *,
    dtype: LoadDtypeLike | None = None,
    python: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    loader: str | os.PathLike[str] | None = None,
    within_budget: bool = False,
    tolerance: float = TOLERANCE,
    progress: Callable[[LimitedRun], bool | None] | None = None,
) -> MemoryFloor:
    """Find the smallest memory limit under which a load succeeds, and one with a generated token.

    Searches outwards from the prediction, then by bisection, each time with a fresh process under the limit
    and a cold page cache, until the last failure is within `tolerance` of the last success. At the default
    tolerance, 20 loads are enough even if the prediction is off by a factor of ten. A load that takes more
    than five times as long as without a limit counts as failed.

    Parameters
    ----------
    source, dtype, python, options, loader
        As for `measure_load`.
    within_budget
        Whether to load each time with the limit as `max_memory` too.
    tolerance
        Relative precision: 0.05 for 5 %.
    progress
        Called with each run; returning False stops the search.

    Returns
    -------
    MemoryFloor
        The smallest limits that succeeded, the largest that failed, in bytes, and every run.

    Raises
    ------
    MeasurementError
        If memory cannot be limited here, or the load fails without a limit; the first says what is
        predicted.
    CheckpointError
        If `source` is not a checkpoint.
    Cancelled
        If `progress` asked to stop.

    Examples
    --------
    >>> floor = minimum_memory("sharded", dtype="float16")
    >>> floor.load_failed_bytes < floor.load_bytes
    True
    """
    check({"tolerance": tolerance}, {"tolerance": share(_TOO_FINE, 1)})
    source, checkpoint = os.fspath(source), Checkpoint.open(source)
    spec = LoadSpec(dtype, python=python, options=options or {}, loader=loader)
    refuse_gguf(checkpoint.format, checkpoint.source)
    predicted = checkpoint.estimate(spec.dtype).peak_anonymous_bytes
    if why := why_unlimited():
        raise MeasurementError(
            f"no memory limit can be set here: {why}; from the headers, loading {source} takes about "
            f"{format_size(predicted)} of anonymous memory"
        )
    free = run_load(source, spec)
    if not free.ok:
        raise MeasurementError(f"{source} does not load without a limit: {free.reason}")
    free_seconds = free.start_to_first_token_seconds or _seconds(free)
    patience = max(_LEAST_SECONDS, _PATIENCE * free_seconds)
    runs: list[LimitedRun] = []

    def run(limit: int) -> None:
        budget = limit if within_budget else None
        found = run_load(source, replace(spec, memory_limit=limit, timeout=patience, max_memory=budget))
        loaded, generated = (found.phase(name) is not None for name in (LOAD, FIRST_TOKEN))
        runs.append(LimitedRun(limit, loaded, generated or found.ok, _seconds(found), found.end))
        if progress is not None and progress(runs[-1]) is False:
            raise Cancelled(f"stopped after {plural(len(runs), 'limited load')}")

    most = 2 * (usable_memory() or _FAR * predicted)
    if (odd := _search(run, runs, predicted, tolerance, most)) is not None:
        raise MeasurementError(
            f"no smallest memory limit for {source}: in {format_size(odd.limit_bytes)} it ended as {odd.end}"
        )
    (load_failed, load), (token_failed, token) = (_bracket(runs, goal) for goal in _GOALS)
    return MemoryFloor(
        source=free.source,
        dtype=spec.dtype,
        predicted_bytes=predicted,
        load_bytes=load,
        load_failed_bytes=load_failed,
        first_token_bytes=token,
        first_token_failed_bytes=token_failed,
        free_seconds=free_seconds,
        runs=tuple(runs),
        stack=free.stack(),
        notes=free.warnings(),
        has_first_token=free.phase(FIRST_TOKEN) is not None,
    )


def _seconds(found: LoadMeasurement) -> float:
    ends = (phase.end_seconds for phase in found.phases)
    return max((*found.curve.seconds, *ends), default=0.0)


def _search(
    run: Callable[[int], object], runs: Sequence[LimitedRun], guess: int, tolerance: float, most: int
) -> LimitedRun | None:
    """Run under limits until both floors are known closely enough; return the run that rules a floor out.

    Each run adds itself to `runs`. What loads under no limit up to `most`, or under the smallest one, has no
    floor.
    """
    for goal in _GOALS:  # the second begins with all that the first has seen: its floor is no lower
        outwards = 0
        while (limit := _step(*_bracket(runs, goal), guess, outwards, tolerance)) is not None:
            limit = min(max(limit, _SMALLEST_LIMIT), most)
            if seen := next((one for one in runs if one.limit_bytes == limit), None):
                return seen
            run(limit)
            outwards += len(runs) > 1  # the guess itself is no step
    return None


def _step(failed: int, succeeded: int, guess: int, outwards: int, tolerance: float) -> int | None:
    """Step outwards from what is known until it is a bracket, then bisect; None once it is close enough.

    The first step is the tolerance, for a guess that is right; the third is wide enough for one that is
    wrong by ten times, and the second lies between them.
    """
    if not failed and not succeeded:
        return guess
    if failed and succeeded:
        return None if succeeded <= failed * (1 + tolerance) else math.isqrt(failed * succeeded)
    near, far = math.log1p(0.9 * tolerance), math.log(_WIDEST_STEP)
    stride = math.exp((near, math.sqrt(near * far), far)[min(outwards, 2)])
    return int(failed * stride) or int(succeeded / stride)


def loads_left(runs: Sequence[LimitedRun], tolerance: float = TOLERANCE) -> int | None:
    """Return about how many more limited loads a search needs; None before it has seen both ends."""
    found = [_bracket(runs, goal) for goal in _GOALS]
    if not all(map(all, found)):
        return None
    steps = (math.log(succeeded / failed) / math.log1p(tolerance) for failed, succeeded in set(found))
    return sum(math.ceil(math.log2(count)) for count in steps if count > 1)


def _bracket(runs: Sequence[LimitedRun], goal: str) -> tuple[int, int]:
    """Return the largest limit that failed below the smallest that succeeded, and that; 0 for none."""
    succeeded = min((run.limit_bytes for run in runs if getattr(run, goal)), default=0)
    failures = (run.limit_bytes for run in runs if not getattr(run, goal))
    return max((limit for limit in failures if not succeeded or limit < succeeded), default=0), succeeded
