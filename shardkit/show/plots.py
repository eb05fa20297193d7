"""Pictures of loads, plans and many results: bars, memory over time as areas, files as strips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, BinaryIO

from shardkit.base.errors import MeasurementError
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.parts import kind_of
from shardkit.measure.intervals import mean_interval
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.quantities import Quantity, Unit, format_seconds
from shardkit.measure.samples import Samples
from shardkit.plan.plan import ShardPlan
from shardkit.show.canvas import (
    BLUE,
    PURPLE,
    VERMILION,
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
    """Draw wall time and peak memory side by side: a bar for the geometric mean, a dot for each run.

    Parameters
    ----------
    runs
        Such as a `Comparison`.
    ax
        Two axes, for times and for peaks; None makes a figure.

    Returns
    -------
    The two axes.
    """
    if ax is None:
        ax = new_axes(2, 1, (8, 7.2)) if _is_crowded(runs) else new_axes(1, 2, (8, 3.6))
    for one, unit in zip(ax, _BARS, strict=True):
        _plot_quantities(runs, one, unit)
    return ax


def _is_crowded(runs: Samples) -> bool:
    return len(runs.names) > _SIDE_BY_SIDE


def _plot_quantities(runs: Samples, ax: Axes, unit: Unit) -> None:
    scale, shown_unit, title = _BARS[unit]
    quantities = [quantity for quantity in runs.drawn() if quantity.unit == unit]
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
    ax.set_xticks(range(len(quantities)), [_caption(runs, quantity) for quantity in quantities], minor=True)
    ax.tick_params(axis="x", which="both", length=0)
    ax.tick_params(axis="x", which="minor", pad=24 if upright else 4)
    ax.set_xlim(-0.6, len(quantities) - 0.4)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.15)
    tidy(ax, shown_unit, title)
    _explain_bars(ax, runs) if ticks else say_empty(ax)


def _caption(runs: Samples, quantity: Quantity) -> str:
    """Return the name of a quantity for its bars, in lines: two stand side by side; or why there are none."""
    name = "\n" + quantity.label.replace(" from ", "\nfrom ")
    return f"{name}\n({why})" if (why := runs.why_missing(quantity)) else name


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


def plot_memory(source: Samples | Sequence[LoadMeasurement], ax: Axes | None = None) -> Axes:
    """Draw resident memory over time, all loads on one axis of time that starts with each load.

    Where a variant prefetches, and so works before its load, it starts with each process.

    Filled: anonymous memory, which cannot be evicted. Broken, above it: all that is resident, with the file
    pages that the kernel may drop. Crosses: the same, as memory_profiler reads it.

    Parameters
    ----------
    source
        Runs, such as a `Comparison`, of which each variant's typical one is drawn; or measurements.
    ax
        Axes to draw on; None makes a figure.
    """
    ax = new_axes() if ax is None else ax
    if isinstance(source, Samples):
        labels = dict(zip(source.names, short_names(source.names), strict=True))
        chosen = [(labels[name], run) for name, run in source.typical_runs.items()]
        ahead = source.reads_ahead
    else:
        chosen = [(f"run {number}", run) for number, run in enumerate(source, 1)]
        ahead = any(run.prefetch for run in source)
    for number, (label, run) in enumerate(chosen):
        start = 0.0 if ahead else run.load_start_seconds or 0.0
        _plot_curve(ax, label, run, start, _DASHES[number % len(_DASHES)], **look(number))
    ax.set_xlabel(f"seconds since the start of the {'process' if ahead else 'load'}", color=ink(ax))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    tidy(ax, "GB", "Memory over time")
    if chosen:
        _explain_marks(ax, len(chosen))
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


def describe_memory(runs: Samples) -> str:
    """Return in words what `plot_memory` draws."""
    words = []
    for name, run in runs.typical_runs.items():
        peaks = (run.peak_anonymous_bytes, run.peak_total_bytes)
        anonymous, total = ("unknown" if peak is None else format_size(peak) for peak in peaks)
        line = [f"{name}: at most {anonymous} anonymous, {total} with file pages"]
        for phase in run.phases:
            if phase.name in _MARKERS:
                end = phase.end_seconds if runs.reads_ahead else phase.wall_seconds
                line.append(f"{phase.name} done after {format_seconds(end)}")
        words.append(", ".join(line if run.ok else [*line, f"{run.outcome}: {run.reason}"]))
    return "; ".join(words) or "nothing was measured"


def plot_comparison(runs: Samples, path: str | os.PathLike[str] | BinaryIO | None = None) -> Sequence[Axes]:
    """Draw times, peaks and memory curves in one figure; save it if `path` (or a binary file) is given.

    Returns
    -------
    The three axes.

    Raises
    ------
    MeasurementError
        If the picture cannot be written there.
    """
    figure = new_figure(**_page(runs))
    axes = _draw_comparison(runs, figure)
    if path is not None:
        try:
            figure.savefig(path, dpi=150, facecolor="white")
        except (OSError, ValueError) as error:
            raise MeasurementError(f"{path}: the plot cannot be saved: {error}") from error
    return axes


def comparison_png(runs: Samples) -> bytes:
    """Return what `plot_comparison` draws, made without pyplot, whose state is the main thread's."""
    figure = bare_figure()(**_page(runs))
    _draw_comparison(runs, figure)
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, facecolor="white")
        return file.getvalue()


def _page(runs: Samples) -> dict[str, Any]:
    return {"figsize": (8, 11 if _is_crowded(runs) else 7), "layout": "constrained", "facecolor": "white"}


def _draw_comparison(runs: Samples, figure: Figure) -> list[Axes]:
    if _is_crowded(runs):
        axes = list(figure.subplots(3, 1))
    else:
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.15))
        axes = [figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :])]
    for ax in axes:
        blacken(ax)
    plot_bars(runs, axes[:2])
    plot_memory(runs, axes[2])
    return axes


def plot_medians(medians: pd.DataFrame, variants: Sequence[str]) -> Figure:
    """Draw the medians of many results: axes for each column, a bar for each variant of each result.

    Parameters
    ----------
    medians
        Indexed by result and variant; the columns' names say their units.
    variants
        All that there are, in the order of their colors.
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


# Colour and hatching of what tensors are for.
_KINDS = {
    "embedding": ("#E69F00", ""),
    "head": (PURPLE, "xx"),
    "attention": (BLUE, ""),
    "experts": (VERMILION, ".."),
    "feed-forward": ("#56B4E9", "//"),
    "norm": ("#000000", ""),
    "other": ("#999999", "--"),
}
_SHOWN_SHARDS = 40


def plot_shards(plan: ShardPlan, ax: Axes | None = None) -> Axes:
    """Draw the layout of a plan: a bar for each file, cut into what its tensors are for, in their order.

    The plan's own text and HTML say the same in numbers. More than 40 files are drawn as the first 40.
    """
    shown = plan.shards[:_SHOWN_SHARDS]
    ax = new_axes(size=(8, 1.1 + 0.26 * max(3, len(shown)))) if ax is None else ax
    scale, unit = (1e9, "GB") if plan.largest_file.nbytes >= 1e9 else (1e6, "MB")
    for row, shard in enumerate(shown):
        tensors = ((kind_of(t.source.name), t.begin, t.nbytes) for t in shard.tensors)
        for kind, group in groupby(tensors, key=itemgetter(0)):
            pieces = list(group)
            start, end = pieces[0][1] / scale, (pieces[-1][1] + pieces[-1][2]) / scale
            color, hatch = _KINDS[kind]
            new = None if kind in ax.get_legend_handles_labels()[1] else kind
            look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
            ax.barh(row, end - start, 0.8, start, label=new, **look)
    ax.axvline(plan.max_shard_size / scale, color=ink(ax), linestyle=":", linewidth=1)
    rows = range(len(shown))
    ax.set_yticks(rows, [f"{row + 1} of {len(plan.shards)}" for row in rows])
    ax.tick_params(axis="y", labelsize=8, length=0)
    ax.invert_yaxis()
    tidy(ax, "file", f"{plural(len(plan.shards), 'file')}, {format_size(plan.total_bytes)} of weights")
    ax.set_xlim(0, 1.03 * plan.largest_file.nbytes / scale)
    ax.set_xlabel(f"{unit} (dotted: max_shard_size)", color=ink(ax))
    ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax), loc="upper left", bbox_to_anchor=(1, 1))
    return ax
