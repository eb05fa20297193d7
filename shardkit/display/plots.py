"""Pictures of a comparison: times and peaks as bars, memory over time as areas.

Colours are Okabe and Ito's, told apart by colour-blind readers, and never alone: bars also differ by
hatching, areas by direct labels. Text takes its colour from the axes it is drawn on, so that it can be
read on a dark theme; figures made here are white, whatever the theme.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from shardkit.errors import MeasurementError
from shardkit.measure.comparison import ARMS, QUANTITIES, ArmName, Comparison
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement, format_seconds
from shardkit.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_COLORS = (BLUE, VERMILION, GREEN, PURPLE)
_TIMES = ("load_wall_seconds", "time_to_first_token_seconds")
_PEAKS = ("peak_anonymous_bytes", "peak_total_bytes")
_WIDTH = 0.42
_LEAD_SECONDS = 0.2
_PROFILER_MARKS = 24
_MARKERS = {LOAD: "o", FIRST_TOKEN: "D"}


@contextmanager
def _white() -> Iterator[Any]:
    """Give pyplot with black on white, whatever theme the notebook has set."""
    import matplotlib.pyplot as plt

    black = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with plt.rc_context(
        {"figure.facecolor": "white", "axes.facecolor": "white", **dict.fromkeys(black, "black")}
    ):
        yield plt


def _axes(ax: Axes | None) -> Any:
    if ax is not None:
        return ax
    with _white() as plt:
        return plt.subplots(figsize=(8, 4), layout="constrained")[1]


def _ink(ax: Axes) -> Any:
    return ax.xaxis.label.get_color()


def _tidy(ax: Axes, unit: str, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, color=_ink(ax))
    ax.set_ylabel(unit, color=_ink(ax))
    ax.spines[["top", "right"]].set_visible(False)


def plot_bars(comparison: Comparison, ax: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw wall time and peak memory side by side: a bar for the median, a dot for each run.

    Parameters
    ----------
    ax
        Two axes, for times and for peaks; None makes a figure.

    Returns
    -------
    The two axes.
    """
    if ax is None:
        with _white() as plt:
            ax = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")[1]
    _plot_quantities(comparison, ax[0], _TIMES, 1, "seconds", "Wall time (bar: median, dots: runs)")
    _plot_quantities(comparison, ax[1], _PEAKS, 1e9, "GB", "Peak memory (bar: median, dots: runs)")
    return ax


def _plot_quantities(
    comparison: Comparison, ax: Axes, quantities: Sequence[str], scale: float, unit: str, title: str
) -> None:
    ink, ticks = _ink(ax), {}
    for place, quantity in enumerate(quantities):
        for side, arm in zip((-1, 1), ARMS, strict=True):
            told = [getattr(measurement, quantity) for measurement in comparison.measurements(arm)]
            if values := [value / scale for value in told if value is not None]:
                x = place + side * _WIDTH * 0.52
                _bar(ax, x, values, arm)
                shown = format_seconds if scale == 1 else format_size
                ticks[x] = shown(median(values) * scale)
    # Medians stand under their bars, where neither a dot nor a neighbour can be in the way.
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=9)
    names = [f"\n{QUANTITIES[quantity][0]}" for quantity in quantities]
    ax.set_xticks(range(len(quantities)), names, minor=True)
    ax.tick_params(axis="x", which="both", length=0)
    ax.set_xlim(-0.6, len(quantities) - 0.4)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.15)
    _tidy(ax, unit, title)
    if ticks:
        ax.legend(frameon=False, fontsize=9, ncols=2, labelcolor=ink, loc="upper left")
    else:
        ax.text(0.5, 0.5, "nothing was measured", transform=ax.transAxes, ha="center", color=ink)


def _bar(ax: Axes, x: float, values: list[float], arm: ArmName) -> None:
    label = arm if arm not in ax.get_legend_handles_labels()[1] else None
    hatch, color = ("", BLUE) if arm == "original" else ("///", VERMILION)
    ax.bar(
        x, median(values), _WIDTH, color=color, hatch=hatch, edgecolor=_ink(ax), linewidth=0.8, label=label
    )
    spread = [x + _WIDTH * 0.5 * ((run + 0.5) / len(values) - 0.5) for run in range(len(values))]
    ax.scatter(spread, values, s=16, color="white", edgecolor="black", linewidth=0.9, zorder=3)


def plot_memory(source: Comparison | Sequence[LoadMeasurement], ax: Axes | None = None) -> Axes:
    """Draw resident memory over time, all loads on one axis of time that starts with each load.

    Solid and filled: anonymous memory, which must exist. Dashed: all that is resident, with the file
    pages that the kernel may drop. Crosses: the same, as
    memory_profiler reads it.

    Parameters
    ----------
    source
        A comparison, of which each arm's run with the median time to first token is drawn; or
        measurements.
    ax
        Axes to draw on; None makes a figure.
    """
    ax = _axes(ax)
    if isinstance(source, Comparison):
        chosen = {str(arm): typical for arm in ARMS if (typical := source.typical(arm, _TIMES[1]))}
    else:
        chosen = {f"run {number}": run for number, run in enumerate(source, 1)}
    for (label, run), color in zip(chosen.items(), cycle(_COLORS)):
        _plot_curve(ax, label, run, color)
    ax.set_xlabel("seconds since the start of the load", color=_ink(ax))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    _tidy(ax, "GB", "Memory over time")
    if chosen:
        _explain_marks(ax)
    return ax


def _plot_curve(ax: Axes, label: str, run: LoadMeasurement, color: str) -> None:
    curve, ink = run.curve, _ink(ax)
    start = load.start_seconds if (load := run.phase(LOAD)) else 0.0
    split = zip(curve.seconds, curve.anonymous_bytes, curve.file_bytes, strict=True)
    points = [
        (at - start, anonymous / 1e9, (anonymous + file) / 1e9)
        for at, anonymous, file in split
        if at - start >= -_LEAD_SECONDS
    ]
    if points:
        seconds, anonymous, total = zip(*points, strict=True)
        ax.fill_between(seconds, anonymous, color=color, alpha=0.2, linewidth=0)
        ax.plot(seconds, anonymous, color=color, linewidth=2, label=f"{label}: anonymous")
        ax.plot(seconds, total, "--", color=color, linewidth=1.4, label=f"{label}: with file pages")
        for phase in run.phases:
            if phase.name in _MARKERS:
                end = phase.start_seconds + phase.wall_seconds - start
                nearest = min(points, key=lambda point: abs(point[0] - end))
                ax.plot(end, nearest[2], _MARKERS[phase.name], color=color, markeredgecolor=ink, markersize=7)
        if not run.ok:
            ax.annotate(run.outcome, (seconds[-1], total[-1]), color=ink, ha="right", va="bottom")
    readings = zip(curve.profiler_seconds, curve.profiler_bytes, strict=True)
    shown = [(at - start, size / 1e9) for at, size in readings if at - start >= -_LEAD_SECONDS and size]
    if shown:
        every = -(-len(shown) // _PROFILER_MARKS)  # more would hide the line that they confirm
        ax.plot(*zip(*shown, strict=True), "x", color=color, markersize=4, markevery=every)


def _explain_marks(ax: Axes) -> None:
    """Put the legend where no curve can be: under the axes."""
    ink = _ink(ax)
    for name, marker in _MARKERS.items():
        ax.plot([], [], marker, color="none", markeredgecolor=ink, label=f"end of {name}")
    ax.plot([], [], "x", color=ink, markersize=4, label="memory_profiler")
    handles, _ = ax.get_legend_handles_labels()
    handles.insert(2, handles.pop())  # columns fill downwards: one for each run, one for the ends
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.05, -0.16)}
    ax.legend(handles=handles, frameon=False, fontsize=9, ncols=3, labelcolor=ink, **place)


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str] | None = None) -> Sequence[Axes]:
    """Draw times, peaks and memory curves in one figure; save it if `path` is given.

    Returns
    -------
    The three axes.

    Raises
    ------
    MeasurementError
        If the picture cannot be written there.
    """
    with _white() as plt:
        figure = plt.figure(figsize=(8, 7), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.15))
        bars = [figure.add_subplot(grid[0, column]) for column in range(2)]
        curves = figure.add_subplot(grid[1, :])
        plot_bars(comparison, bars)
        plot_memory(comparison, curves)
        if path is not None:
            try:
                figure.savefig(path, dpi=150)
            except (OSError, ValueError) as error:
                raise MeasurementError(
                    f"{os.fspath(path)}: the picture cannot be written: {error}"
                ) from error
    return [*bars, curves]
