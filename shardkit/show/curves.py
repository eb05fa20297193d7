"""Pictures of memory over time: lines for each variant's typical run, named where they end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from shardkit.checkpoint.hosts import memory_limits
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.samples import Samples
from shardkit.show.canvas import (
    apart,
    color,
    ink,
    new_axes,
    say_empty,
    scale,
    short_names,
    summed_up,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ANONYMOUS = "peak_anonymous_bytes"
_NEAR, _IN_VIEW = (0.5, 1.25), 2.5  # times the largest reading: hosts' limits that are drawn, others'
_HEADROOM = 1.12
_LABEL_SHARE = 0.075  # of the height, for each name
_NAMES_SHARE = 0.27  # of the width
_MOST_WITH_FILES = 3
_PROFILER_MARKS = 24
_MARKERS = {LOAD: "o", FIRST_TOKEN: "D"}
_EXPLAINED = "● loaded, ◆ first token; filled: cannot be evicted, broken: with file pages"


_End = tuple[float, float, str, Any]  # of a line: when, how much, its name and color


class _Curve(NamedTuple):
    """Readings of a typical run from a start on, until its last phase ended; in the unit of the axis."""

    run: LoadMeasurement
    start: float
    number: int
    seconds: list[float]
    anonymous: list[float]
    total: list[float]

    @property
    def died(self) -> str:
        """What is to be said after its name, if it did not load."""
        return "" if self.run.ok else f" ({self.run.outcome})"

    def end(self, phase: str) -> tuple[float, float] | None:
        """Return where a phase ended: when, and with how much in all."""
        if (found := self.run.phase(phase)) is None:
            return None
        at = found.end_seconds - self.start
        nearest = min(zip(self.seconds, self.total, strict=True), key=lambda point: abs(point[0] - at))
        return at, nearest[1]


def plot_memory(runs: Samples, ax: Axes | None = None) -> Axes:
    """Draw resident memory over time of each variant's typical run, from the start of its load.

    Where a variant prefetches, and so works before its load, from the start of its process. Filled: anonymous
    memory, which cannot be evicted. Broken, above it: all that is resident, with the file pages that the
    kernel may drop. Shaded across: what Python and its libraries held before the load. Limits in force are
    drawn, and those of free hosts that are near.
    """
    ax = new_axes() if ax is None else ax
    curves, one, unit = _curves(runs)
    tidy(ax, unit, _finding(runs, curves, one, unit), curves)
    begin = "process" if runs.reads_ahead else "load"
    words = f"seconds since the start of the {begin}\n{_EXPLAINED}"
    ax.set_xlabel(words, color=ink(ax), fontsize=9, loc="left")
    if not curves:
        say_empty(ax)
        return ax
    held = _held_before(curves)
    for curve in curves.values():
        _plot_curve(ax, curve, held)
    top = max(max(curve.total) for curve in curves.values())
    end = max(curve.seconds[-1] for curve in curves.values())
    limits = _limits(runs, top * one, one, unit)
    for limit in limits:
        ax.plot([0, end], [limit] * 2, color=ink(ax), linewidth=1, linestyle=(0, (7, 3)), zorder=1)
    ends = [(end, size, words, ink(ax)) for size, words in limits.items()]
    if held > 0:
        ax.fill_between([0, end], [held] * 2, color=ink(ax), alpha=0.25, linewidth=0, zorder=0)
        ends.append((end, held / 2, "Python and libraries", ink(ax)))
    ax.set_ylim(0, _HEADROOM * max(top, *limits, 0))
    _name_ends(ax, [*ends, *_ends(curves)], end)
    return ax


def _curves(runs: Samples) -> tuple[dict[str, _Curve], float, str]:
    """Return the curve of each variant that has one, by its short name; the unit of the axis, its name."""
    typical, curves = runs.typical_runs, {}
    one, unit = scale("bytes", (size for run in typical.values() for _, _, size in _points(run, 0.0)))
    for number, (name, short) in enumerate(zip(runs.names, short_names(runs.names), strict=True)):
        if (run := typical.get(name)) is not None:
            start = 0.0 if runs.reads_ahead else run.load_start_seconds or 0.0
            if points := list(_points(run, start)):
                seconds, *sizes = zip(*points, strict=True)
                held, total = ([size / one for size in column] for column in sizes)
                curves[short] = _Curve(run, start, number, list(seconds), held, total)
    return curves, one, unit


def _points(run: LoadMeasurement, start: float) -> Iterator[tuple[float, float, float]]:
    """Yield when, anonymous and all resident memory; without such a split, what memory_profiler read."""
    curve, end = run.curve, max((phase.end_seconds for phase in run.phases if run.ok), default=math.inf)
    split = zip(curve.seconds, curve.anonymous_bytes, curve.file_bytes, strict=True)
    points = [(at, float(held), held + file) for at, held, file in split] or [
        (at, math.nan, size) for at, size in zip(curve.profiler_seconds, curve.profiler_bytes, strict=True)
    ]
    return ((at - start, held, total) for at, held, total in points if start <= at <= end)


def _finding(runs: Samples, curves: Mapping[str, _Curve], one: float, unit: str) -> str:
    """Say what cannot be evicted, in the figures that the bars have."""
    held = []
    for short, curve in curves.items():
        size = (runs.mean(runs.names[curve.number], _ANONYMOUS) or max(curve.anonymous) * one) / one
        if not math.isnan(size):
            held.append((f"{short}{curve.died}", f"{size:.3g} {unit}", size))
    return f"Memory that cannot be evicted: {summed_up(held)}" if held else "Memory over time"


def _plot_curve(ax: Axes, curve: _Curve, before: float) -> None:
    own, above = color(curve.number), [max(held, before) for held in curve.anonymous]
    ax.fill_between(curve.seconds, above, before, color=own, alpha=0.3, linewidth=0)
    ax.plot(curve.seconds, curve.anonymous, color=own, linewidth=2)
    ax.plot(curve.seconds, curve.total, "--", color=own, linewidth=1.2)
    for phase, marker in _MARKERS.items():
        if (end := curve.end(phase)) is not None:
            ax.plot(*end, marker, color=own, markeredgecolor=ink(ax), markersize=7, clip_on=False, zorder=4)


def _limits(runs: Samples, largest: float, one: float, unit: str) -> dict[float, str]:
    typical, (least, most) = runs.typical_runs.values(), _NEAR
    hosts = memory_limits().items()
    limits = {size: f"memory of {name}" for name, size in hosts if least <= size / largest <= most}
    limits |= {run.max_memory_bytes: "budget" for run in typical if run.max_memory_bytes}
    limits |= {run.memory_limit_bytes: "memory limit" for run in typical if run.memory_limit_bytes}
    near = {size / one: name for size, name in limits.items() if size <= _IN_VIEW * largest}
    return {size: f"{name}, {size:.3g} {unit}" for size, name in near.items()}


def _held_before(curves: Mapping[str, _Curve]) -> float:
    """Return the anonymous memory that Python and its libraries held when the load began."""
    before = []
    for curve in curves.values():
        began = (curve.run.load_start_seconds or 0.0) - curve.start
        before += [held for at, held in zip(curve.seconds, curve.anonymous, strict=True) if at >= began][:1]
    return min(before, default=math.nan)


def _ends(curves: Mapping[str, _Curve]) -> Iterator[_End]:
    """Yield where lines end, and their names; of many variants, only where those of anonymous memory do."""
    for name, curve in curves.items():
        lines = [(curve.anonymous, f"{name}{curve.died}"), (curve.total, f"{name}, with file pages")]
        for line, words in lines if len(curves) <= _MOST_WITH_FILES else lines[:1]:
            if not math.isnan(line[-1]):
                yield curve.seconds[-1], line[-1], words, color(curve.number)


def _name_ends(ax: Axes, ends: Sequence[_End], right: float) -> None:
    top = ax.get_ylim()[1]
    places = apart([y for _, y, _, _ in ends], min(_LABEL_SHARE, 1 / len(ends)) * top, top)
    for (x, y, words, own), place in zip(ends, places, strict=True):
        line = {"arrowstyle": "-", "color": own, "linewidth": 0.6, "alpha": 0.7, "relpos": (0, 0.5)}
        ax.annotate(words, (x, y), (1.03 * right, place), arrowprops=line, va="center", fontsize=9, color=own)
    ax.set_xlim(0, right / (1 - _NAMES_SHARE))
    ax.set_xticks([at for at in ax.get_xticks() if at <= right])
    ax.spines["bottom"].set_bounds(0, right)


def plot_profiler(runs: Samples, ax: Axes | None = None) -> Axes:
    """Draw all resident memory of each typical run, and as crosses what memory_profiler read of it."""
    ax = new_axes() if ax is None else ax
    curves, one, unit = _curves(runs)
    tidy(ax, unit, "All resident memory: lines are our readings, crosses memory_profiler's")
    ax.set_xlabel("seconds", color=ink(ax), loc="left")
    if not curves:
        say_empty(ax)
        return ax
    for curve in curves.values():
        own, readings = color(curve.number), curve.run.curve
        ax.plot(curve.seconds, curve.total, color=own, linewidth=1.2)
        seen = zip(readings.profiler_seconds, readings.profiler_bytes, strict=True)
        points = [(at - curve.start, size / one) for at, size in seen if size]
        shown = [point for point in points if 0 <= point[0] <= curve.seconds[-1]]
        every = -(-len(shown) // _PROFILER_MARKS) or 1  # more would hide the line that they confirm
        ax.plot(*([point[i] for point in shown[::every]] for i in (0, 1)), "x", color=own, markersize=5)
    ax.set_ylim(0)
    ends = [(c.seconds[-1], c.total[-1], f"{name}{c.died}", color(c.number)) for name, c in curves.items()]
    _name_ends(ax, ends, max(curve.seconds[-1] for curve in curves.values()))
    return ax
