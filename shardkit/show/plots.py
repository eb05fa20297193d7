"""Pictures of loads, every run as a dot, and of many results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from shardkit.measure.intervals import Law, mean_interval
from shardkit.measure.quantities import Quantity, Ratio, Unit
from shardkit.measure.samples import ORIGINAL, SHARDED, Samples
from shardkit.show.canvas import (
    bare_figure,
    color,
    draw_bar,
    ink,
    name_rows,
    new_axes,
    new_figure,
    plain,
    saved,
    say_empty,
    scale,
    set_ink,
    set_rows,
    short_names,
    summed_up,
    tidy,
)
from shardkit.show.curves import plot_memory, plot_profiler

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS: tuple[Unit, Unit] = ("seconds", "bytes")
LOWEST, HIGHEST = "lowest ", "highest "  # what the names of these figures begin with
_TITLES = {"seconds": "Time", "bytes": "Memory"}
_ROW_INCHES = 0.24  # of a bar
_CURVES_INCHES = 3.6
_TALLEST_INCHES = 200  # matplotlib draws no more than 65,535 pixels


def plot_bars(runs: Samples, ax: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw times and memory, each on axes of its own: bars for geometric means, a dot for each run.

    A thin line joins the runs of a pair; the interval in the middle is the mean's, 95 %, by the law of the
    comparison.
    """
    if ax is None:
        heights = _heights(runs)
        ax = new_axes(len(heights), 2 // len(heights), (8, sum(heights)))
    for one, unit in zip(ax, _BARS, strict=True):
        _plot_quantities(runs, one, unit)
    return ax


def _heights(runs: Samples) -> list[float]:
    """Return how many inches times and memory take; of two variants, side by side."""
    counts = Counter(quantity.unit for quantity in runs.drawn())
    heights = [1.3 + _ROW_INCHES * counts[unit] * (len(runs.names) + 1) for unit in _BARS]
    return heights if len(runs.names) > 2 else [max(heights)]


def _plot_quantities(runs: Samples, ax: Axes, unit: Unit) -> None:
    quantities = {quantity: why for quantity, why in runs.drawn().items() if quantity.unit == unit}
    loads = [load for name in runs.names for load in runs.measurements(name)]
    one, shown_unit = scale(unit, (value for load in loads for q in quantities if (value := q.of(load))))
    names, rows = short_names(runs.names), {}
    for place, (quantity, why) in enumerate(quantities.items()):
        top = place * (len(names) + 1)
        name_rows(ax, top, quantity.label + f" ({why})" * bool(why))
        for number, words in _plot_quantity(runs, ax, quantity, top + 1, (one, shown_unit)):
            rows[top + 1 + number] = names[number]
            # In a column of their own, where no line is in the way.
            style: dict[str, Any] = {"va": "center", "ha": "right", "fontsize": 9, "color": ink(ax)}
            ax.text(1, top + 1 + number, words, transform=ax.get_yaxis_transform(), **style)
    tidy(ax, "", "\n".join(_findings(runs, quantities)) or _TITLES[unit], names)
    ax.set_xlabel(shown_unit, color=ink(ax))
    ax.set_xlim(0, 1.25 * ax.get_xlim()[1])
    set_rows(ax, rows, len(quantities) * (len(names) + 1))
    if not rows:
        say_empty(ax)


def _plot_quantity(
    runs: Samples, ax: Axes, quantity: Quantity, top: int, scaled: tuple[float, str]
) -> Iterator[tuple[int, str]]:
    """Draw a bar for each variant that has it; yield the variant's number, and its mean or how it ended."""
    one, unit = scaled
    joined: dict[int, list[tuple[float, int]]] = {}
    for number, name in enumerate(runs.names):
        own = {pair: value / one for pair, run in runs.by_pair(name).items() if (value := quantity.of(run))}
        if own:
            _bar(ax, top + number, list(own.values()), number, runs.law)
            yield number, f"{geometric_mean(own.values()):.3g} {unit}"
        elif name in runs.failures:
            yield number, runs.failures[name].partition(":")[0]
        for pair, value in own.items():
            joined.setdefault(pair, []).append((value, top + number))
    for points in joined.values():
        ax.plot(*zip(*points, strict=True), color=ink(ax), linewidth=0.6, alpha=0.7, zorder=2)


def _bar(ax: Axes, y: float, values: list[float], number: int, law: Law) -> None:
    mean, own = geometric_mean(values), color(number)
    draw_bar(ax, y, mean, 0.8, number)
    ax.scatter(values, [y] * len(values), s=15, color=own, edgecolor=ink(ax), linewidth=0.6, zorder=4)
    if (interval := mean_interval(values, law)) is not None:
        sides = [[mean - interval[0]], [interval[1] - mean]]
        ax.errorbar(mean, y, xerr=sides, color=ink(ax), linewidth=1.4, capsize=4, zorder=3)


def _findings(runs: Samples, quantities: Mapping[Quantity, str]) -> Iterator[str]:
    """Yield what was found of each main quantity: ``Load time: 1.58x faster``."""
    if runs.failures and any(quantity.unit == _BARS[0] for quantity in quantities):
        died = (f"{name} ({why.partition(':')[0]})" for name, why in runs.failures.items())
        yield f"Does not load: {', '.join(died)}"
    others = dict(zip(runs.names, short_names(runs.names), strict=True))
    del others[runs.reference]
    for quantity in (quantity for quantity in runs.main if quantity in quantities):
        found = [(short, runs.found(name).get(quantity)) for name, short in others.items()]
        known = [(short, ratio.short, ratio.ratio) for short, ratio in found if isinstance(ratio, Ratio)]
        if known:
            words = known[0][1] if len(others) == 1 else summed_up(known)
            yield f"{quantity.label.capitalize()}: {words}"


def plot_comparison(
    runs: Samples, path: str | os.PathLike[str] | None = None, ax: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Draw times, memory and memory over time in one figure, or on three axes; save it if `path` is given."""
    axes = _three_axes(runs, new_figure) if ax is None else ax
    plot_bars(runs, axes[:2])
    plot_memory(runs, axes[2])
    saved(axes[0], path)
    return axes


def comparison_png(runs: Samples) -> bytes:
    """Return what `plot_comparison` draws, made without pyplot."""
    return _png(plot_comparison(runs, ax=_three_axes(runs, bare_figure))[0])


def profiler_png(runs: Samples) -> bytes:
    """Return what `plot_profiler` draws, made without pyplot."""
    figure = bare_figure((8, _CURVES_INCHES))
    ax = figure.subplots()
    set_ink(figure)
    return _png(plot_profiler(runs, ax))


def _png(ax: Axes) -> bytes:
    figure: Any = ax.figure
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, facecolor="none")
        return file.getvalue()


def _three_axes(runs: Samples, make: Callable[[tuple[float, float]], Figure]) -> list[Axes]:
    heights = [*_heights(runs), _CURVES_INCHES]
    places = [[0], [1], [2]] if len(heights) == 3 else [[0, 1], [2, 2]]
    figure = make((8, min(sum(heights), _TALLEST_INCHES)))
    axes = [*figure.subplot_mosaic(places, height_ratios=heights).values()]
    set_ink(figure)
    return axes


def plot_results(figures: pd.DataFrame, ax: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Draw the figures of many results (`shardkit.notebook.mean_figures`), axes for each of them.

    A row is a variant of a result, below the line that names model, size and dtype: a dot for its geometric
    mean, and a line from its lowest to its highest run.
    """
    columns = [name for name in map(str, figures) if not name.startswith((LOWEST, HIGHEST))]
    rows: list[tuple[str, Any]] = []  # what is on the left, and whose figures are drawn there
    for group in dict.fromkeys(key[:-1] for key in figures.index):
        rows.append((", ".join(map(plain, group)), None))
        variants = [key for key in figures.index if key[:-1] == group]
        rows += zip(short_names(key[-1] for key in variants), variants, strict=True)
    height = min(1.3 + _ROW_INCHES * len(rows), _TALLEST_INCHES)
    if ax is None:
        ax = new_axes(1, len(columns), (2 + 1.9 * len(columns), height), sharey=True)
    size = max(2.0, min(9.0, 45 * height / max(1, len(rows))))
    names = [*dict.fromkeys((ORIGINAL, SHARDED, *(key[-1] for key in figures.index)))]
    for one, column in zip(ax, columns, strict=True):
        tidy(one, "", column)
        one.spines["left"].set_visible(False)
        one.tick_params(axis="y", length=0)
        known = figures[[column, LOWEST + column, HIGHEST + column]].dropna()
        for place, (_, key) in enumerate(rows):
            if key in known.index:
                _plot_spread(one, place, known.loc[[key]].to_numpy()[0], names.index(key[-1]), size)
        one.set_xlim(0, 1.35 * known.to_numpy().max() if len(known) else 1)
    for place, (heading, key) in enumerate(rows):
        if key is None:
            name_rows(ax[0], place, heading, size)
    set_rows(ax[0], {place: name for place, (name, key) in enumerate(rows) if key}, len(rows), size)
    if not rows:
        say_empty(ax[0])
    return ax


def _plot_spread(ax: Axes, y: float, figures: Sequence[float], number: int, size: float) -> None:
    (mean, low, high), own = figures, color(number)
    ax.plot([low, high], [y, y], color=own, linewidth=size / 3, alpha=0.5)
    ax.plot(mean, y, "o", color=own, markersize=size / 2)
    style: dict[str, Any] = {"va": "center", "fontsize": size, "color": ink(ax)}
    ax.annotate(f"{mean:.3g}", (high, y), (6, 0), textcoords="offset points", **style)
