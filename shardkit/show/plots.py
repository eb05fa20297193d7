"""Pictures of loads and of many results: bars, and memory over time as areas."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import MeasurementError
from shardkit.measure.intervals import mean_interval
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.quantities import Quantity, Unit
from shardkit.measure.samples import Samples
from shardkit.show.canvas import (
    bare_figure,
    blacken,
    ink,
    look,
    new_axes,
    new_figure,
    say_empty,
    short_names,
    tidy,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("--", ":", "-.")
_SIDE_BY_SIDE = 3  # with more variants, what stands side by side stands one below the other
_BARS: dict[Unit, tuple[float, str, str]] = {
    "seconds": (1, "seconds", "Wall time"),
    "bytes": (1e9, "GB", "Peak memory"),
}
_GROUP_WIDTH = 0.88  # of all variants' bars for one quantity
_TALLEST_INCHES = 200  # matplotlib draws no more than 65,535 pixels
_LEAD_SECONDS = 0.2
_PROFILER_MARKS = 24
_MARKERS = {LOAD: "o", FIRST_TOKEN: "D"}


def plot_bars(runs: Samples, ax: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw wall time and peak memory, each on axes of its own: bars for geometric means, dots for runs."""
    if ax is None:
        ax = new_axes(2, 1, (8, 7.2)) if _is_crowded(runs) else new_axes(1, 2, (8, 3.6))
    for one, unit in zip(ax, _BARS, strict=True):
        _plot_quantities(runs, one, unit)
    return ax


def _is_crowded(runs: Samples) -> bool:
    return len(runs.names) > _SIDE_BY_SIDE


def _plot_quantities(runs: Samples, ax: Axes, unit: Unit) -> None:
    scale, shown_unit, title = _BARS[unit]
    quantities = {quantity: why for quantity, why in runs.drawn().items() if quantity.unit == unit}
    labels = dict(zip(runs.names, short_names(runs.names), strict=True))
    step, ticks = _GROUP_WIDTH / len(labels), {}
    for place, quantity in enumerate(quantities):
        for number, variant in enumerate(runs.names):
            loads = runs.measurements(variant)
            if values := [value / scale for load in loads if (value := quantity.of(load))]:
                x = place + (number - (len(runs.names) - 1) / 2) * step
                _bar(ax, x, 0.96 * step, values, labels.pop(variant, None), number)
                ticks[x] = quantity.format(geometric_mean(values) * scale)
    # Means stand under their bars, where neither a dot nor a neighbor can be in the way.
    upright = len(runs.names) > _SIDE_BY_SIDE + 1
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=9 if step / len(quantities) > 0.15 else 7)
    ax.tick_params(axis="x", which="major", rotation=90 if upright else 0)
    ax.xaxis.remove_overlapping_locs = False  # the name of three bars stands under the middle one
    ax.set_xticks(range(len(quantities)), [_caption(*one) for one in quantities.items()], minor=True)
    ax.tick_params(axis="x", which="both", length=0)
    ax.tick_params(axis="x", which="minor", pad=24 if upright else 4)
    ax.set_xlim(-0.6, len(quantities) - 0.4)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.15)
    tidy(ax, shown_unit, title)
    _explain_bars(ax, runs) if ticks else say_empty(ax)


def _caption(quantity: Quantity, why_missing: str) -> str:
    """Return the name of a quantity for its bars, in lines: two stand side by side; or why there are none."""
    name = "\n" + quantity.label.replace(" from ", "\nfrom ")
    return f"{name}\n({why_missing})" if why_missing else name


def _explain_bars(ax: Axes, runs: Samples) -> None:
    enough = any(len(runs.measurements(variant)) > 2 for variant in runs.names)
    caption = "bar: geometric mean, dots: runs" + (", line: 95 % interval" if enough else "")
    ax.set_xlabel(caption, fontsize=8, color=ink(ax))
    place: dict[str, Any] = {"bbox_to_anchor": (1, 1)} if _is_crowded(runs) else {"ncols": 3}
    ax.legend(frameon=False, fontsize=9, labelcolor=ink(ax), loc="upper left", columnspacing=1, **place)


def _bar(ax: Axes, x: float, width: float, values: list[float], label: str | None, number: int) -> None:
    ax.bar(x, geometric_mean(values), width, edgecolor=ink(ax), linewidth=0.8, label=label, **look(number))
    spread = [x + width * 0.5 * ((run + 0.5) / len(values) - 0.5) for run in range(len(values))]
    ax.scatter(spread, values, s=16, color="white", edgecolor="black", linewidth=0.9, zorder=3)
    if (interval := mean_interval(values)) is not None:
        ax.vlines(x + 0.4 * width, *interval, color=ink(ax), linewidth=1.4, zorder=4)


def plot_memory(runs: Samples, ax: Axes | None = None) -> Axes:
    """Draw resident memory over time of each variant's typical run, from the start of its load.

    Where a variant prefetches, and so works before its load, from the start of its process. Filled: anonymous
    memory, which cannot be evicted. Broken, above it: all that is resident, with the file pages that the
    kernel may drop. Crosses: the same, as memory_profiler reads it.
    """
    ax = new_axes() if ax is None else ax
    labels = dict(zip(runs.names, short_names(runs.names), strict=True))
    typical = runs.typical_runs
    for number, (name, run) in enumerate(typical.items()):
        start = 0.0 if runs.reads_ahead else run.load_start_seconds or 0.0
        _plot_curve(ax, labels[name], run, start, _DASHES[number % len(_DASHES)], **look(number))
    begin = "process" if runs.reads_ahead else "load"
    ax.set_xlabel(f"seconds since the start of the {begin}", color=ink(ax))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    tidy(ax, "GB", "Memory over time")
    if typical:
        _explain_marks(ax, len(typical))
    return ax


def _plot_curve(
    ax: Axes, label: str, run: LoadMeasurement, start: float, dash: str, color: str, hatch: str
) -> None:
    curve = run.curve
    first = start - _LEAD_SECONDS
    split = zip(curve.seconds, curve.anonymous_bytes, curve.file_bytes, strict=True)
    points = [(at - start, held / 1e9, (held + file) / 1e9) for at, held, file in split if at >= first]
    if points:
        seconds, anonymous, total = zip(*points, strict=True)
        style: dict[str, Any] = {"facecolor": (color, 0.2), "edgecolor": color, "hatch": hatch}
        ax.fill_between(seconds, anonymous, linewidth=0, label=f"{label}: anonymous", **style)
        ax.plot(seconds, anonymous, color=color, linewidth=2)
        ax.plot(seconds, total, dash, color=color, linewidth=1.4, label=f"{label}: with file pages")
        for phase in run.phases:
            if phase.name in _MARKERS:
                end = phase.end_seconds - start
                nearest = min(points, key=lambda point: abs(point[0] - end))
                ax.plot(
                    end, nearest[2], _MARKERS[phase.name], color=color, markeredgecolor=ink(ax), markersize=7
                )
        if not run.ok:
            ax.annotate(run.outcome, (seconds[-1], total[-1]), color=ink(ax), ha="right", va="bottom")
    readings = zip(curve.profiler_seconds, curve.profiler_bytes, strict=True)
    shown = [(at - start, size / 1e9) for at, size in readings if at >= first and size]
    if shown:
        every = -(-len(shown) // _PROFILER_MARKS)  # more would hide the line that they confirm
        ax.plot(*zip(*shown, strict=True), "x", color=color, markersize=4, markevery=every)


def _explain_marks(ax: Axes, runs: int) -> None:
    """Put the legend where no curve can be: under the axes, or next to them where there are many runs."""
    for name, marker in _MARKERS.items():
        ax.plot([], [], marker, color="none", markeredgecolor=ink(ax), label=f"end of {name}")
    ax.plot([], [], "x", color=ink(ax), markersize=4, label="memory_profiler")
    handles, _ = ax.get_legend_handles_labels()
    below = runs <= _SIDE_BY_SIDE
    if below:
        handles.insert(2, handles.pop())  # columns fill downwards: one for each run, one for the ends
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.05, -0.16) if below else (1, 1),
        frameon=False,
        fontsize=9 if runs < _SIDE_BY_SIDE else 7.5,
        ncols=runs + 1 if below else 1,
        columnspacing=1,
        labelcolor=ink(ax),
    )


def plot_comparison(runs: Samples, path: str | os.PathLike[str] | None = None) -> Sequence[Axes]:
    """Draw times, peaks and memory curves in one figure; save it if `path` is given."""
    figure, axes = _draw_comparison(runs, new_figure)
    if path is not None:
        try:
            figure.savefig(path, dpi=150, facecolor="white")
        except (OSError, ValueError) as error:
            raise MeasurementError(f"{path}: the plot cannot be saved: {error}") from error
    return axes


def comparison_png(runs: Samples) -> bytes:
    """Return what `plot_comparison` draws, made without pyplot."""
    figure, _ = _draw_comparison(runs, bare_figure)
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, facecolor="white")
        return file.getvalue()


def _draw_comparison(runs: Samples, make: Callable[..., Figure]) -> tuple[Figure, list[Axes]]:
    # Where two of them stand side by side, the third is below both.
    places, heights = ([[0], [1], [2]], (1, 1, 1)) if _is_crowded(runs) else ([[0, 1], [2, 2]], (1, 1.15))
    figure = make(figsize=(8, 3.5 * len(places)), layout="constrained", facecolor="white")
    axes = [*figure.subplot_mosaic(places, height_ratios=heights).values()]
    for ax in axes:
        blacken(ax)
    plot_bars(runs, axes[:2])
    plot_memory(runs, axes[2])
    return figure, axes


def plot_medians(medians: pd.DataFrame, variants: Sequence[str]) -> Figure:
    """Draw the medians of many results: axes for each column, a bar for each variant of each result.

    They are indexed by result and variant; `variants` are all that there are, in the order of their colors.
    """
    results = {result: row for row, result in enumerate(medians.index.unique(0))}
    step = _GROUP_WIDTH / len(variants)
    size = (11, min(1.3 + 0.7 * len(results), _TALLEST_INCHES))
    axes = new_axes(1, medians.shape[1], size, sharey=True)
    figure: Figure = axes[0].figure
    for ax, column in zip(axes, medians.columns, strict=True):
        ax.set_title(column, fontsize=11, color=ink(ax))
        values = medians[column].dropna()
        for number, (variant, name) in enumerate(zip(variants, short_names(variants), strict=True)):
            own = values[values.index.get_level_values(1) == variant]
            middle = (number - (len(variants) - 1) / 2) * step
            places = [results[result] + middle for result in own.index.get_level_values(0)]
            label = None if own.empty else name
            ax.barh(places, own, step, edgecolor="black", label=label, **look(number))
    axes[0].set_yticks(range(len(results)), short_names(results))
    axes[0].invert_yaxis()
    if results:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor="black")
    else:
        say_empty(axes[0])
    return figure
