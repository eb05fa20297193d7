"""Pictures of a comparison: times and peaks as bars, memory over time as areas.

Colours are Okabe and Ito's, told apart by colour-blind readers, and never alone: bars also differ by
hatching, areas by direct labels. Text takes its colour from the axes it is drawn on, so that it can be
read on a dark theme; figures made here are white, whatever the theme.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, BinaryIO

from shardkit.base.errors import MeasurementError
from shardkit.base.extras import require
from shardkit.base.record import plural, printable
from shardkit.base.sizes import format_size
from shardkit.checkpoint.parts import kind_of
from shardkit.compare.comparison import Comparison
from shardkit.measure.intervals import mean_interval
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement, format_seconds
from shardkit.measure.quantities import QUANTITIES, format_quantity
from shardkit.plan.plan import ShardPlan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_COLORS = (BLUE, VERMILION, GREEN, PURPLE)
_HATCHES = ("", "///", "...", "xx", "--")  # one more than colours: twenty variants before two look the same
_DASHES = ("--", ":", "-.")
_SIDE_BY_SIDE = 3  # with more variants, what stands side by side stands one below the other
_LONGEST_NAME = 20
_PEAKS, _PEAK_GPU = ("peak_anonymous_bytes", "peak_total_bytes"), "peak_device_bytes"
_GROUP_WIDTH = 0.88  # of all variants' bars for one quantity
_TALLEST_INCHES = 200  # matplotlib draws no more than 65,535 pixels
_LEAD_SECONDS = 0.2
_PROFILER_MARKS = 24
_MARKERS = {LOAD: "o", FIRST_TOKEN: "D"}


@contextmanager
def _white() -> Iterator[None]:
    """Draw black on white in here, whatever theme the notebook has set."""
    _bare_figure()
    import matplotlib as mpl

    with suppress(Exception):  # `_figure` does without
        import matplotlib.pyplot as plt

        plt.draw_if_interactive()  # loads the backend, whose own settings must outlive the context
    black = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with mpl.rc_context(
        {"figure.facecolor": "white", "axes.facecolor": "white", **dict.fromkeys(black, "black")}
    ):
        yield


def _figure(**page: Any) -> Figure:
    """Make a figure that pyplot shows; where its backend cannot be had, one for files alone.

    MPLBACKEND is inherited, and may name a screen's backend that only the parent has.
    """
    bare = _bare_figure()
    try:
        import matplotlib.pyplot as plt

        figure: Figure = plt.figure(**page)
    except Exception:  # each backend fails in its own way
        figure = bare(**page)
    return figure


def _bare_figure() -> type[Figure]:
    """Return the class of figures; its first import fails for an MPLBACKEND that names no backend at all."""
    require("notebook", "a plot", "matplotlib")
    if "matplotlib" not in sys.modules and (asked := os.environ.pop("MPLBACKEND", None)) is not None:
        import matplotlib as mpl

        os.environ["MPLBACKEND"] = asked
        with suppress(ValueError):
            mpl.rcParams["backend"] = asked
    from matplotlib.figure import Figure

    return Figure


def _new_axes(rows: int = 1, columns: int = 1, height: float = 4) -> Any:
    with _white():
        return _figure(figsize=(8, height), layout="constrained").subplots(rows, columns)


def _is_crowded(comparison: Comparison) -> bool:
    return len(comparison.variants) > _SIDE_BY_SIDE


def _page(comparison: Comparison) -> dict[str, Any]:
    return {
        "figsize": (8, 11 if _is_crowded(comparison) else 7),
        "layout": "constrained",
        "facecolor": "white",
    }


def _ink(ax: Axes) -> Any:
    return ax.xaxis.label.get_color()


def _labels(names: Iterable[str]) -> list[str]:
    """Return names short enough to be drawn; those that would look alike then are numbered."""
    labels = [_plain(name) for name in names]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[:place].count(label) + 1}"
        for place, label in enumerate(labels)
    ]


def _plain(text: str) -> str:
    """Keep a name from being read as mathematics, or, for its first letter, left out; and from being long."""
    text = printable(text)
    if len(text) > _LONGEST_NAME:  # long names differ at their ends
        half = _LONGEST_NAME // 2
        text = f"{text[: half - 1]}…{text[-half:]}"
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")


def _look(variant: int) -> dict[str, Any]:
    """Return how the bars of a variant, by its number, are told from the others'."""
    return {"color": _COLORS[variant % len(_COLORS)], "hatch": _HATCHES[variant % len(_HATCHES)]}


def _tidy(ax: Axes, unit: str, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, color=_ink(ax))
    ax.set_ylabel(unit, color=_ink(ax))
    ax.spines[["top", "right"]].set_visible(False)


def plot_bars(comparison: Comparison, ax: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw wall time and peak memory side by side: a bar for the geometric mean, a dot for each run.

    Parameters
    ----------
    ax
        Two axes, for times and for peaks; None makes a figure.

    Returns
    -------
    The two axes.
    """
    if ax is None:
        beside = not _is_crowded(comparison)
        ax = _new_axes(columns=2, height=3.6) if beside else _new_axes(rows=2, height=7.2)
    _plot_quantities(comparison, ax[0], comparison.times, 1, "seconds", "Wall time")
    on_gpu = any(comparison.median(variant, _PEAK_GPU) is not None for variant in comparison.names)
    _plot_quantities(comparison, ax[1], (*_PEAKS, _PEAK_GPU) if on_gpu else _PEAKS, 1e9, "GB", "Peak memory")
    return ax


def _plot_quantities(
    comparison: Comparison, ax: Axes, quantities: Sequence[str], scale: float, unit: str, title: str
) -> None:
    ink, ticks = _ink(ax), {}
    labels = dict(zip(comparison.names, _labels(comparison.names), strict=True))
    step = _GROUP_WIDTH / len(comparison.variants)
    for place, quantity in enumerate(quantities):
        for number, variant in enumerate(comparison.names):
            told = [getattr(measurement, quantity) for measurement in comparison.measurements(variant)]
            if values := [value / scale for value in told if value]:
                x = place + (number - (len(comparison.variants) - 1) / 2) * step
                _bar(ax, x, 0.96 * step, values, labels.pop(variant, None), number)
                ticks[x] = format_quantity(quantity, geometric_mean(values) * scale)
    # Means stand under their bars, where neither a dot nor a neighbour can be in the way.
    upright = len(comparison.variants) > _SIDE_BY_SIDE + 1
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=9 if step / len(quantities) > 0.15 else 7)
    ax.tick_params(axis="x", which="major", rotation=90 if upright else 0)
    names = [f"\n{_caption(comparison, quantity)}" for quantity in quantities]
    ax.xaxis.remove_overlapping_locs = False  # the name of three bars stands under the middle one
    ax.set_xticks(range(len(quantities)), names, minor=True)
    ax.tick_params(axis="x", which="both", length=0)
    ax.tick_params(axis="x", which="minor", pad=24 if upright else 4)
    ax.set_xlim(-0.6, len(quantities) - 0.4)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.15)
    enough = any(len(comparison.measurements(variant)) > 2 for variant in comparison.names)
    caption = "bar: geometric mean, dots: runs" + (", line: 95 % interval" if enough else "")
    ax.set_xlabel(caption, fontsize=8, color=ink)
    _tidy(ax, unit, title)
    if ticks:
        beside: dict[str, Any] = {"bbox_to_anchor": (1, 1)} if _is_crowded(comparison) else {"ncols": 3}
        ax.legend(frameon=False, fontsize=9, labelcolor=ink, loc="upper left", columnspacing=1, **beside)
    else:
        ax.text(0.5, 0.5, "nothing was measured", transform=ax.transAxes, ha="center", color=ink)


def _caption(comparison: Comparison, quantity: str) -> str:
    """Return the name of a quantity for its bars; where none has any, with the reason."""
    missing = [comparison.missing(variant, quantity) for variant in comparison.names]
    why = missing[0] if all(missing) else ""
    # Two captions stand side by side.
    name = QUANTITIES[quantity][0].replace(" from ", "\nfrom ")
    return f"{name}\n({why})" if why else name


def _bar(ax: Axes, x: float, width: float, values: list[float], label: str | None, number: int) -> None:
    ax.bar(x, geometric_mean(values), width, edgecolor=_ink(ax), linewidth=0.8, label=label, **_look(number))
    spread = [x + width * 0.5 * ((run + 0.5) / len(values) - 0.5) for run in range(len(values))]
    ax.scatter(spread, values, s=16, color="white", edgecolor="black", linewidth=0.9, zorder=3)
    if (interval := mean_interval(values)) is not None:
        ax.vlines(x + 0.4 * width, *interval, color=_ink(ax), linewidth=1.4, zorder=4)


def plot_memory(source: Comparison | Sequence[LoadMeasurement], ax: Axes | None = None) -> Axes:
    """Draw resident memory over time, all loads on one axis of time that starts with each load.

    Where a variant prefetches, and so works before its load, it starts with each process.

    Filled: anonymous memory, which cannot be evicted. Broken, above it: all that is resident, with the file
    pages that the kernel may drop. Crosses: the same, as memory_profiler reads it.

    Parameters
    ----------
    source
        A comparison, of which each variant's run with the median time to first token is drawn; or
        measurements.
    ax
        Axes to draw on; None makes a figure.
    """
    ax = _new_axes() if ax is None else ax
    if isinstance(source, Comparison):
        runs = [source.typical(variant, source.times[1]) for variant in source.names]
        chosen = [(label, run) for label, run in zip(_labels(source.names), runs, strict=True) if run]
        ahead = source.reads_ahead
    else:
        chosen = [(f"run {number}", run) for number, run in enumerate(source, 1)]
        ahead = any(run.prefetch for run in source)
    for number, (label, run) in enumerate(chosen):
        start = 0.0 if ahead else run.load_start_seconds or 0.0
        _plot_curve(ax, label, run, start, _DASHES[number % len(_DASHES)], **_look(number))
    ax.set_xlabel(f"seconds since the start of the {'process' if ahead else 'load'}", color=_ink(ax))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    _tidy(ax, "GB", "Memory over time")
    if chosen:
        _explain_marks(ax, len(chosen))
    return ax


def _plot_curve(
    ax: Axes, label: str, run: LoadMeasurement, start: float, dash: str, color: str, hatch: str
) -> None:
    curve, ink = run.curve, _ink(ax)
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
                ax.plot(end, nearest[2], _MARKERS[phase.name], color=color, markeredgecolor=ink, markersize=7)
        if not run.ok:
            ax.annotate(run.outcome, (seconds[-1], total[-1]), color=ink, ha="right", va="bottom")
    readings = zip(curve.profiler_seconds, curve.profiler_bytes, strict=True)
    shown = [(at - start, size / 1e9) for at, size in readings if at >= first and size]
    if shown:
        every = -(-len(shown) // _PROFILER_MARKS)  # more would hide the line that they confirm
        ax.plot(*zip(*shown, strict=True), "x", color=color, markersize=4, markevery=every)


def _explain_marks(ax: Axes, runs: int) -> None:
    """Put the legend where no curve can be: under the axes, or beside them where there are many runs."""
    ink = _ink(ax)
    for name, marker in _MARKERS.items():
        ax.plot([], [], marker, color="none", markeredgecolor=ink, label=f"end of {name}")
    ax.plot([], [], "x", color=ink, markersize=4, label="memory_profiler")
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
        labelcolor=ink,
    )


def describe_memory(comparison: Comparison) -> str:
    """Return in words what `plot_memory` draws."""
    words = []
    for variant in comparison.names:
        if (run := comparison.typical(variant, comparison.times[1])) is None:
            continue
        peaks = (run.peak_anonymous_bytes, run.peak_total_bytes)
        anonymous, total = ("unknown" if peak is None else format_size(peak) for peak in peaks)
        ahead = comparison.reads_ahead
        ends = [
            f"{p.name} done after {format_seconds(p.end_seconds if ahead else p.wall_seconds)}"
            for p in run.phases
            if p.name in _MARKERS
        ]
        line = [f"{variant}: at most {anonymous} anonymous, {total} with file pages", *ends]
        words.append(", ".join(line if run.ok else [*line, f"{run.outcome}: {run.reason}"]))
    return "; ".join(words) or "nothing was measured"


def plot_comparison(
    comparison: Comparison, path: str | os.PathLike[str] | BinaryIO | None = None
) -> Sequence[Axes]:
    """Draw times, peaks and memory curves in one figure; save it if `path` (or a binary file) is given.

    Returns
    -------
    The three axes.

    Raises
    ------
    MeasurementError
        If the picture cannot be written there.
    """
    figure = _figure(**_page(comparison))
    axes = _draw_comparison(comparison, figure)
    if path is not None:
        try:
            figure.savefig(path, dpi=150, facecolor="white")
        except (OSError, ValueError) as error:
            raise MeasurementError(f"{path}: the picture cannot be written: {error}") from error
    return axes


def plot_medians(medians: pd.DataFrame, variants: Sequence[str]) -> Figure:
    """Draw the medians of many results: axes for each column, a bar for each variant of each result.

    Parameters
    ----------
    medians
        Indexed by result and variant; the columns' names say their units.
    variants
        All that there are, in the order of their colours.
    """
    results, step = list(medians.index.unique(0)), _GROUP_WIDTH / len(variants)
    size = (11, min(1.3 + 0.7 * len(results), _TALLEST_INCHES))
    with _white():
        figure = _figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, medians.shape[1], sharey=True)
    for ax, column in zip(axes, medians.columns, strict=True):
        ax.set_title(column, fontsize=11)
        values = medians[column].dropna()
        for number, (variant, name) in enumerate(zip(variants, _labels(variants), strict=True)):
            told = values[values.index.get_level_values(1) == variant]
            middle = (number - (len(variants) - 1) / 2) * step
            places = [results.index(result) + middle for result in told.index.get_level_values(0)]
            label = None if told.empty else name
            ax.barh(places, told, step, edgecolor="black", label=label, **_look(number))
    axes[0].set_yticks(range(len(results)), _labels(results))
    axes[0].invert_yaxis()
    if results:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    else:
        axes[0].text(0.5, 0.5, "nothing was measured", transform=axes[0].transAxes, ha="center")
    return figure


def comparison_png(comparison: Comparison) -> bytes:
    """Return what `plot_comparison` draws, made without pyplot, whose state is the main thread's."""
    figure = _bare_figure()(**_page(comparison))
    _draw_comparison(comparison, figure)
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, facecolor="white")
        return file.getvalue()


def _draw_comparison(comparison: Comparison, figure: Figure) -> list[Axes]:
    if not _is_crowded(comparison):
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.15))
        bars, curves = (
            [figure.add_subplot(grid[0, column]) for column in range(2)],
            figure.add_subplot(grid[1, :]),
        )
    else:
        *bars, curves = figure.subplots(3, 1)
    for ax in (*bars, curves):  # black on white, whatever theme the notebook has set
        ax.set_facecolor("white")
        ax.tick_params(which="both", colors="black")
        ax.spines[:].set_edgecolor("black")
        ax.xaxis.label.set_color("black")
    plot_bars(comparison, bars)
    plot_memory(comparison, curves)
    return [*bars, curves]


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
    ax = _new_axes(height=1.1 + 0.26 * max(3, len(shown))) if ax is None else ax
    ink = _ink(ax)
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
    ax.axvline(plan.max_shard_size / scale, color=ink, linestyle=":", linewidth=1)
    rows = range(len(shown))
    ax.set_yticks(rows, [f"{row + 1} of {len(plan.shards)}" for row in rows])
    ax.tick_params(axis="y", labelsize=8, length=0)
    ax.invert_yaxis()
    _tidy(ax, "file", f"{plural(len(plan.shards), 'file')}, {format_size(plan.total_bytes)} of weights")
    ax.set_xlim(0, 1.03 * plan.largest_file.nbytes / scale)
    ax.set_xlabel(f"{unit} (dotted: max_shard_size)", color=ink)
    ax.legend(frameon=False, fontsize=8, labelcolor=ink, loc="upper left", bbox_to_anchor=(1, 1))
    return ax
