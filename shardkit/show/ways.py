"""A picture of ways to run one model in little memory: what each needs, takes and reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shardkit.base.sizes import format_size
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.quantities import QUANTITIES
from shardkit.show.canvas import (
    draw_bar,
    ink,
    new_axes,
    saved,
    say_empty,
    scale,
    set_rows,
    short_names,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRAWN = ("time_to_first_token_seconds", "seconds_per_token", "read_bytes_per_token")
_OF_RANKS = ("peak_anonymous_bytes", "read_bytes", "time_to_first_token_seconds", "seconds_per_token")
_PEAK = QUANTITIES["peak_anonymous_bytes"]
_ALIKE = 1.05  # what differs by less is not called less
_ROOM = 1.3  # for the figures, to the right of bars and lines
_LABELS = 1.3  # bars' height, below them, for the names of lines

_Runs = Mapping[str, LoadMeasurement]
_Finding = Callable[[str, Mapping[str, float]], str]


def plot_ways(
    runs: _Runs,
    smallest: Mapping[str, int],
    limits: Mapping[str, int],
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw what each way needs and takes, in four charts whose titles say what was found.

    Parameters
    ----------
    runs
        A load of each, by name, with several tokens; one that died is shown as that.
    smallest
        The smallest memory limit in bytes under which each gives a token; where there is none, peak anonymous
        memory is drawn.
    limits
        Memory of machines in bytes, by name; each is a line.
    path
        Where to save it (``.png``, ``.svg``).
    """
    axes = new_axes(2, 2, (11, 6.6), sharey=True).flatten()
    _plot_memory(axes[0], runs, smallest, limits)
    for ax, name in zip(axes[1:], _DRAWN, strict=True):
        _plot_quantity(ax, runs, name, _finding)
    for ax in axes[::2]:
        set_rows(ax, dict(enumerate(short_names(runs))), len(runs) + _LABELS)
    return saved(axes[0], path)


def plot_ranks(runs: _Runs, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw what processes that share a model hold, read and take; the first run is one that has it alone.

    Takes loads by name and, as `plot_ways`, a path; the titles say what was found.
    """
    axes = new_axes(2, 2, (11, 6.6), sharey=True).flatten()
    for ax, name in zip(axes, _OF_RANKS, strict=True):
        _plot_quantity(ax, runs, name, _share)
    for ax in axes[::2]:
        set_rows(ax, dict(enumerate(short_names(runs))), len(runs))
    return saved(axes[0], path)


def _plot_memory(ax: Axes, runs: _Runs, smallest: Mapping[str, int], limits: Mapping[str, int]) -> None:
    values = smallest or _known(runs, _PEAK.of)
    _bars(ax, runs, values, format_size, 1e9)
    for row, (host, limit) in enumerate(sorted(limits.items(), key=lambda one: one[1])):
        ax.axvline(limit / 1e9, color=ink(ax), linestyle="--", linewidth=1.2)
        place: dict[str, Any] = {"xy": (limit / 1e9, 0), "xycoords": ("data", "axes fraction")}
        shift: dict[str, Any] = {"xytext": (-3, 3 + 10 * row), "textcoords": "offset points", "ha": "right"}
        ax.annotate(f"{host} {format_size(limit)}", **place, **shift, color=ink(ax), fontsize=8)
    ax.set_xlim(0, max([ax.get_xlim()[1], *(_ROOM * limit / 1e9 for limit in limits.values())]))
    counts = [f"{host} {sum(size <= limit for size in values.values())}" for host, limit in limits.items()]
    what = "Smallest memory" if smallest else "Peak anonymous memory (no limit could be set)"
    _title(ax, f"{what}, ways of {len(runs)} that fit: {', '.join(counts)}", "GB", runs)


def _plot_quantity(ax: Axes, runs: _Runs, name: str, finding: _Finding) -> None:
    quantity = QUANTITIES[name]
    values = _known(runs, quantity.of)
    one, unit = scale(quantity.unit, values.values())
    _bars(ax, runs, values, quantity.format, one)
    _title(ax, finding(quantity.label.capitalize(), values), unit, runs)
    if not values:
        say_empty(ax)


def _finding(label: str, values: Mapping[str, float]) -> str:
    if len(values) < 2 or not min(values.values()):
        return label
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    ratio = values[most] / values[least]
    return f"{label}: no difference" if ratio < _ALIKE else f"{label}: {least} {ratio:.2g}x less than {most}"


def _share(label: str, values: Mapping[str, float]) -> str:
    (name, first), *others = values.items() if values else [("", 0.0)]
    shares = [value / first for _, value in others] if first else []
    return f"{label}: {min(shares):.2g} to {max(shares):.2g} times that of {name}" if shares else label


def _known(runs: _Runs, of: Callable[[LoadMeasurement], float | None]) -> dict[str, float]:
    return {name: value for name, run in runs.items() if run.ok and (value := of(run)) is not None}


def _bars(
    ax: Axes, runs: _Runs, values: Mapping[str, float], shown: Callable[[Any], str], one: float
) -> None:
    ax.tick_params(axis="y", length=0)
    for row, (name, run) in enumerate(runs.items()):
        if name in values:
            draw_bar(ax, row, values[name] / one, 0.62, row)
            # In a column of their own, where no line is in the way.
            end: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "ha": "right"}
            ax.text(1, row, shown(values[name]), **end, color=ink(ax))
        else:
            limit = run.memory_limit_bytes
            died = f"died: {run.outcome}" + (f" at its limit of {format_size(limit)}" if limit else "")
            said = "not measured" if run.ok else died
            ax.annotate(f" {said}", (0, row), color=ink(ax), va="center", style="italic")
    ax.set_xlim(0, max((value / one for value in values.values()), default=1) * _ROOM or 1)


def _title(ax: Axes, title: str, unit: str, runs: _Runs) -> None:
    tidy(ax, "", title, short_names(runs), 9)
    ax.set_xlabel(unit, color=ink(ax))
