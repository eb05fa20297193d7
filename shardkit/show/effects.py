"""A picture of what changes do: how many times as much of each quantity, on a logarithmic axis."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardkit.base.record import listed
from shardkit.measure.quantities import QUANTITIES, Quantity, Ratio
from shardkit.show.canvas import color, ink, new_axes, saved, say_empty, set_rows, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EFFECT_QUANTITIES = tuple(
    QUANTITIES[name]
    for name in (
        "load_wall_seconds", "time_to_first_token_seconds", "peak_anonymous_bytes", "peak_total_bytes",
    )
)  # fmt: skip
_APART = 0.36  # of the two stacks in a row
_WIDEST = 60  # times as much, to either side
_STEPS = {2: (1, 1.25, 1.5), 4: (1, 1.5, 2, 3), _WIDEST: (1, 2, 5, 10, 20, 50)}  # up to which width


@dataclass(frozen=True)
class Effect:
    """What one change does on one stack while all else stays: all pairs of loads that differ in it alone.

    Attributes
    ----------
    change
        In words: "8 files instead of 1".
    stack
        On which; empty for the change of the stack itself.
    pairs
        Values before and after, by quantity: of pairs of loads, or, where several combinations differ in this
        change alone, means of each. Times of pairs in which one prefetches count from process start.
    ratios
        Their geometric mean with its interval, and a verdict; the quantities share 5 % of error.
    """

    change: str
    stack: str
    pairs: dict[Quantity, tuple[list[float], list[float]]]
    ratios: dict[Quantity, Ratio]

    def __str__(self) -> str:
        """Say what it does, largest first: ``8 files instead of 1, 2024: peak total 1.6x smaller``."""
        found = {q: r for q, r in self.ratios.items() if r.conclusion in ("less", "more")}
        said = [
            f"{q.label} {r}" for q, r in sorted(found.items(), key=lambda one: -abs(math.log(one[1].ratio)))
        ]
        for conclusion, words in (("same", "no difference in {}"), ("inconclusive", "{} inconclusive")):
            if names := [q.label for q, r in self.ratios.items() if r.conclusion == conclusion]:
                said.append(words.format(listed(names, len(names))))
        return f"{', '.join(filter(None, (self.change, self.stack)))}: {'; '.join(said) or 'not measured'}"


def plot_effects(effects: Sequence[Effect], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw what each change does, one chart a quantity, whose title names what moves it most.

    A dot is a pair of loads, a large one their mean, a line its interval; left of 1 is less.

    Parameters
    ----------
    effects
        As `shardkit.compare.factors.effects` returns them.
    path
        Where to save it (``.png``, ``.svg``).
    """
    changes = list(dict.fromkeys(effect.change for effect in effects))
    axes = new_axes(2, 2, (11, 2.6 + 0.75 * len(changes)), sharex="row", sharey=True).flatten()
    for ax, quantity in zip(axes, EFFECT_QUANTITIES, strict=True):
        _plot_quantity(ax, effects, quantity, changes)
        set_rows(ax, dict(enumerate(changes)), len(changes))
        ax.tick_params(axis="x", labelsize=8)
    for row in (0, 2):  # times, and memory
        _set_scale(axes[row], effects, EFFECT_QUANTITIES[row : row + 2])
    for ax in axes[2:]:
        ax.set_xlabel("less ← times as much as before → more", color=ink(ax))
    return saved(axes[0], path)


def _plot_quantity(ax: Axes, effects: Sequence[Effect], quantity: Quantity, changes: Sequence[str]) -> None:
    stacks = list(dict.fromkeys(effect.stack for effect in effects))
    known = [effect for effect in effects if quantity in effect.ratios]
    ax.axvline(1, color=ink(ax), linewidth=0.8)
    for effect in known:
        place = stacks.index(effect.stack)
        shift = _APART * (place - 0.5) if effect.stack else 0.0
        _draw(ax, changes.index(effect.change) + shift, effect, quantity, place)
    if not known:
        say_empty(ax)
    tidy(ax, "", _finding(quantity, known), size=9)


def _draw(ax: Axes, y: float, effect: Effect, quantity: Quantity, number: int) -> None:
    own, ratio = color(number), effect.ratios[quantity]
    dots = _ratios(effect, quantity)
    ax.plot(dots, [y] * len(dots), "o", color=own, markersize=3, alpha=0.45)
    ends = [ratio.low or ratio.ratio, ratio.high or ratio.ratio]
    ax.plot(ends, [y, y], color=own, linewidth=2)
    ax.plot(ratio.ratio, y, "o", color=own, markersize=6)
    end: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    ax.annotate(effect.stack, (max(ends + dots), y), color=own, **end)


def _set_scale(ax: Axes, effects: Sequence[Effect], quantities: Sequence[Quantity]) -> None:
    """Give the axes of a row one logarithmic scale, as far to either side, with room for what is drawn."""
    drawn = [
        x
        for effect in effects
        for q in quantities
        if (ratio := effect.ratios.get(q))
        for x in (ratio.low, ratio.high, *_ratios(effect, q))
    ]
    reach = min(_WIDEST, max([1.3, *(max(x, 1 / x) for x in drawn if x)]) * 1.15)
    ax.set_xscale("log")
    ax.set_xlim(1 / reach, reach)
    steps = [
        step for step in next(steps for widest, steps in _STEPS.items() if reach <= widest) if step < reach
    ]
    ax.set_xticks([*(1 / step for step in steps[:0:-1]), *steps])
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}x" if x > 0.99 else f"1/{1 / x:.3g}")
    ax.minorticks_off()


def _ratios(effect: Effect, quantity: Quantity) -> list[float]:
    return [other / one for one, other in zip(*effect.pairs[quantity], strict=True)]


def _finding(quantity: Quantity, known: Sequence[Effect]) -> str:
    """Return a title: the change that moves a quantity most, where any does beyond chance."""
    moved = [one for one in known if one.ratios[quantity].conclusion in ("less", "more")]
    label = quantity.label.capitalize()
    if not moved:
        return f"{label}: no change is clear"
    most = max(moved, key=lambda one: abs(math.log(one.ratios[quantity].ratio)))
    where = f", {most.stack}" if most.stack else ""
    return f"{label}: {most.ratios[quantity].short} ({most.change.partition(' instead')[0]}{where})"
