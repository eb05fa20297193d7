"""Figures and what all pictures have in common: colors, short names, ink, units.

Colors are near those of Okabe and Ito, which color-blind readers can distinguish, all about as dark, so that
they read on white and on black; and never alone: what is drawn is named where it stands. Figures made here
are transparent, and their ink is a gray that reads on any page; on axes that are given, text has the color of
the theme that they were made in.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from textwrap import fill
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import MeasurementError
from shardkit.base.extras import require
from shardkit.base.record import printable
from shardkit.measure.quantities import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#777b80"  # 4.3:1 on white, 4.4:1 on GitHub's dark pages
_COLORS = ("#1F83C9", "#D55E00", "#009E73", "#B5649A", "#8C7A00", "#7D6BC4")
_PAGE: dict[str, Any] = {"layout": "constrained", "facecolor": "none"}
_LONGEST_NAME = 20
_MOST_NAMED = 3  # variants in a title
_UNITS: dict[Unit, tuple[tuple[float, float, str], ...]] = {  # up to which value, one of it, its name
    "seconds": ((0.9995, 1e-3, "ms"), (180, 1, "s"), (math.inf, 60, "min")),
    "bytes": ((0.9995e9, 1e6, "MB"), (math.inf, 1e9, "GB")),
}


def new_figure(size: tuple[float, float]) -> Figure:
    """Make a transparent figure that pyplot shows; where its backend cannot be had, one for files alone.

    MPLBACKEND is inherited, and may name a screen's backend that only the parent has.
    """
    bare = bare_figure(size)
    try:
        import matplotlib.pyplot as plt

        figure: Figure = plt.figure(figsize=size, **_PAGE)
    except Exception:  # each backend fails in its own way
        return bare
    return figure


def bare_figure(size: tuple[float, float]) -> Figure:
    """Make a transparent figure of which pyplot does not know, whose state is the main thread's."""
    require("notebook", "a plot", "matplotlib")
    if "matplotlib" not in sys.modules and (asked := os.environ.pop("MPLBACKEND", None)) is not None:
        import matplotlib as mpl  # which fails for a value that names no backend at all

        os.environ["MPLBACKEND"] = asked
        with suppress(ValueError):
            mpl.rcParams["backend"] = asked
    from matplotlib.figure import Figure

    return Figure(figsize=size, **_PAGE)


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4), **options: Any) -> Any:
    """Make transparent axes on a figure of their own."""
    figure = new_figure(size)
    axes = figure.subplots(rows, columns, **options)
    set_ink(figure)
    return axes


def set_ink(figure: Figure) -> None:
    """Give a figure's axes the ink that reads on any page, whatever theme they were made in."""
    for ax in figure.axes:
        ax.set_facecolor("none")
        ax.tick_params(which="both", colors=INK)
        ax.spines[:].set_edgecolor(INK)
        ax.xaxis.label.set_color(INK)


def saved(ax: Any, path: str | os.PathLike[str] | None) -> Figure:
    """Save the figure of some axes if a path is given, and return it; `MeasurementError` if that fails."""
    figure: Figure = ax.figure
    try:
        if path is not None:
            figure.savefig(path, dpi=150, facecolor="auto")
    except (OSError, ValueError) as error:
        raise MeasurementError(f"{path}: the plot cannot be saved: {error}") from error
    return figure


def ink(ax: Axes) -> Any:
    """Return the color of text on some axes."""
    return ax.xaxis.label.get_color()


def tidy(ax: Axes, unit: str, finding: str, names: Iterable[str] = (), size: float = 10) -> None:
    """Set the finding as title, and the unit, and take away what only frames the picture.

    Each line of the title is at most as wide as axes that have `names` on their left.
    """
    inches = ax.get_position().width * ax.figure.bbox.width / ax.figure.dpi
    letters = int(125 / size * inches) - max(0, max(map(len, names), default=0) - 8)
    title = "\n".join(fill(line, letters) for line in finding.splitlines())
    ax.set_title(title, loc="left", fontsize=size, fontweight="bold", color=ink(ax))
    ax.set_ylabel(unit, color=ink(ax))
    ax.spines[["top", "right"]].set_visible(False)


def draw_bar(ax: Axes, y: float, length: float, height: float, number: int) -> None:
    """Draw the bar of a variant, by its number."""
    own = color(number)
    ax.barh(y, length, height, facecolor=(own, 0.4), edgecolor=own, linewidth=1.2)


def say_empty(ax: Axes) -> None:
    """Say on axes without data why they have none."""
    ax.text(0.5, 0.5, "nothing was measured", transform=ax.transAxes, ha="center", color=ink(ax))


def color(variant: int) -> str:
    """Return the color of a variant, by its number."""
    return _COLORS[variant % len(_COLORS)]


def scale(unit: Unit, values: Iterable[float]) -> tuple[float, str]:
    """Return the one unit that an axis with these values has: its size and its name."""
    largest = max(values, default=0.0)
    return next((one, name) for limit, one, name in _UNITS[unit] if largest < limit)


def summed_up(found: Sequence[tuple[str, str, float]]) -> str:
    """Say what was found of several variants (name, words, size): of each, or, of many, the extremes."""
    if len({words for _, words, _ in found}) == 1:
        return found[0][1]
    if len(found) <= _MOST_NAMED:
        return "; ".join(f"{name} {words}" for name, words, _ in found)
    least, *_, most = sorted(found, key=lambda one: one[2])
    return f"from {least[1]} ({least[0]}) to {most[1]} ({most[0]})"


def name_rows(ax: Axes, y: float, heading: str, size: float = 9) -> None:
    """Write above some rows what they are; where axes follow to the right, across them."""
    style: dict[str, Any] = {"fontweight": "bold", "fontsize": size, "color": ink(ax), "in_layout": False}
    ax.text(0.01, y, heading, transform=ax.get_yaxis_transform(), va="center", **style)


def set_rows(ax: Axes, names: Mapping[int, str], count: float, size: float = 9) -> None:
    """Name rows, counted from above, to the left of axes that have room for so many."""
    ax.set_yticks(list(names), list(names.values()), fontsize=size)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(count - 0.4, -0.6)


def apart(places: Sequence[float], least: float, most: float) -> list[float]:
    """Return places moved just as far as labels there need to keep this distance, and below `most`."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, last = list(places), -math.inf
    for which in order:
        last = moved[which] = max(places[which], last + least)
    last = most + least
    for which in reversed(order):
        last = moved[which] = min(moved[which], last - least)
    return moved


def short_names(names: Iterable[str]) -> list[str]:
    """Return names short enough to be drawn, both ends of long ones; those that look alike are numbered."""
    half, texts = _LONGEST_NAME // 2, [printable(name) for name in names]
    labels = [plain(t if len(t) <= _LONGEST_NAME else f"{t[: half - 1]}…{t[-half:]}") for t in texts]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[:place].count(label) + 1}"
        for place, label in enumerate(labels)
    ]


def plain(text: str) -> str:
    """Keep a text from being read as mathematics, or, for its first letter, left out."""
    return f"{' ' * text.startswith('_')}{printable(text)}".replace("$", r"\$")
