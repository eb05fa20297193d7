"""What samplers saw of a child, as a measurement keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from shardkit.measure.child import ChildEnd
from shardkit.measure.measurement import MemoryCurve, SamplerCost

_CURVE_POINTS = 500


def sampler_cost(end: ChildEnd, load_at: float) -> SamplerCost:
    """Return how closely a load that began at a moment was watched."""
    times = [reading.at for reading in end.readings]
    looks = [*times, max(end.sampled_until, *times)] if times else []
    gaps = [later - earlier for earlier, later in pairwise(looks) if later > load_at]
    share = end.sampler_cpu_seconds / (end.ended_at - end.started_at)
    return SamplerCost(len(times), max(gaps, default=None), share)


def curve_of(end: ChildEnd) -> MemoryCurve:
    """Return the memory of a child over time."""
    fine = [(r.at, r.anonymous_bytes, r.file_bytes) for r in end.readings]
    return MemoryCurve(
        *_columns(fine, 3, end.started_at), *_columns(end.portable_readings, 2, end.started_at)
    )


def _columns(readings: Sequence[tuple[float, ...]], count: int, started_at: float) -> list[tuple[Any, ...]]:
    """Return times and sizes, thinned to at most 500 points: each has the peaks of those it stands for."""
    step = -(-len(readings) // _CURVE_POINTS) or 1
    groups = (readings[first : first + step] for first in range(0, len(readings), step))
    points = [tuple(map(max, zip(*group, strict=True))) for group in groups]
    times, *sizes = zip(*points, strict=True) if points else [()] * count
    return [tuple(round(at - started_at, 4) for at in times), *sizes]
