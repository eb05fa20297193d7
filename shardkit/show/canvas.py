"""Figures and what all pictures have in common: colors, hatching, short names, ink.

Colors are Okabe and Ito's, which color-blind readers can distinguish, and never alone: bars also differ by
hatching, areas by direct labels. Text takes its color from the axes it is drawn on, so that it can be
read on a dark theme; figures made here are white, whatever the theme.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shardkit.base.extras import require
from shardkit.base.record import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # blue, vermilion, green, purple
_HATCHES = ("", "///", "...", "xx", "--")  # one more than colors: twenty variants before two look the same
_LONGEST_NAME = 20


def new_figure(**page: Any) -> Figure:
    """Make a figure that pyplot shows; where its backend cannot be had, one for files alone.

    MPLBACKEND is inherited, and may name a screen's backend that only the parent has.
    """
    bare = bare_figure(**page)
    try:
        import matplotlib.pyplot as plt

        figure: Figure = plt.figure(**page)
    except Exception:  # each backend fails in its own way
        return bare
    return figure


def bare_figure(**page: Any) -> Figure:
    """Make a figure of which pyplot does not know, whose state is the main thread's."""
    require("notebook", "a plot", "matplotlib")
    if "matplotlib" not in sys.modules and (asked := os.environ.pop("MPLBACKEND", None)) is not None:
        import matplotlib as mpl  # which fails for a value that names no backend at all

        os.environ["MPLBACKEND"] = asked
        with suppress(ValueError):
            mpl.rcParams["backend"] = asked
    from matplotlib.figure import Figure

    return Figure(**page)


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4), **options: Any) -> Any:
    """Make axes, black on white, on a figure of their own."""
    figure = new_figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, **options)
    for ax in figure.axes:
        blacken(ax)
    return axes


def blacken(ax: Axes) -> None:
    """Make axes black on white, whatever theme they were made in."""
    ax.set_facecolor("white")
    ax.tick_params(which="both", colors="black")
    ax.spines[:].set_edgecolor("black")
    ax.xaxis.label.set_color("black")


def ink(ax: Axes) -> Any:
    """Return the color of text on some axes."""
    return ax.xaxis.label.get_color()


def tidy(ax: Axes, unit: str, title: str) -> None:
    """Set title and unit, and take away what only frames the picture."""
    ax.set_title(title, loc="left", fontsize=11, color=ink(ax))
    ax.set_ylabel(unit, color=ink(ax))
    ax.spines[["top", "right"]].set_visible(False)


def say_empty(ax: Axes) -> None:
    """Say on axes without data why they have none."""
    ax.text(0.5, 0.5, "nothing was measured", transform=ax.transAxes, ha="center", color=ink(ax))


def look(variant: int) -> dict[str, Any]:
    """Return what distinguishes the bars of a variant, by its number."""
    return {"color": _COLORS[variant % len(_COLORS)], "hatch": _HATCHES[variant % len(_HATCHES)]}


def short_names(names: Iterable[str]) -> list[str]:
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
