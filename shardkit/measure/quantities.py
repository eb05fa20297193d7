"""The figures of a load that are compared and shown: one table, and what the ratio of two says.

A new figure is a property of `LoadMeasurement` and a line of the table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Literal

from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.measure.intervals import ERROR, STUDENT, Conclusion, Law, Pairs, conclude, family_errors

if TYPE_CHECKING:
    from shardkit.measure.measurement import LoadMeasurement

NOT_REPORTED = "not reported by this system"

Unit = Literal["seconds", "bytes", "count"]
Role = Literal["main", "drawn", "listed"]

_LARGE = 1.25  # factors from here on are said as such, smaller ones in percent
_NOTHING_PERCENT = 0.05


@dataclass(frozen=True)
class Quantity:
    """One figure of a load: a property of `LoadMeasurement`, what people call it, and less and more of it.

    `plain` and `ahead` are its role in a comparison of plain loads, and in one where a variant works before
    its load does: "main" (verdict, picture and tables), "drawn" (picture and tables, where it is known),
    "listed" (tables alone); None leaves it out. If `is_of_token`, a load has it only with a first token; if
    `is_optional`, nobody misses it in loads that have none.
    """

    name: str
    label: str
    unit: Unit
    less: str = "less"
    more: str = "more"
    plain: Role | None = None
    ahead: Role | None = None
    is_of_token: bool = False
    is_optional: bool = False

    @property
    def least_pairs(self) -> int:
        """How many pairs a verdict takes: two loads may take as long as each other, or not, by chance."""
        return 3 if self.unit == "seconds" else 2

    def __post_init__(self) -> None:
        if self.unit == "count" and {self.plain, self.ahead} & {"main", "drawn"}:
            raise ValueError(f"{self.name}: the picture has no axis for counts, so they are only listed")

    def of(self, measurement: LoadMeasurement) -> float | None:
        """Return the value that one load has; None if unknown."""
        value: float | None = getattr(measurement, self.name)
        return value

    def format(self, value: float | None) -> str:
        """Return a value with its unit."""
        if value is None or self.unit == "seconds":
            return format_seconds(value)
        return format_size(value) if self.unit == "bytes" else f"{value:,.0f}"


_WALL: dict[str, Any] = {"unit": "seconds", "less": "faster", "more": "slower"}
_PEAK: dict[str, Any] = {"unit": "bytes", "less": "smaller", "more": "larger"}
_EXTRA: dict[str, Any] = {"plain": "main", "ahead": "main", "is_optional": True}
_TABLE = (
    Quantity("load_wall_seconds", "load time", **_WALL, plain="main"),
    Quantity("load_cpu_seconds", "load CPU time", "seconds", plain="listed"),
    Quantity("time_to_first_token_seconds", "time to first token", **_WALL, plain="main", is_of_token=True),
    # Where reading begins before the load does, only what counts from process start counts all of it.
    Quantity("start_to_load_seconds", "load from process start", **_WALL, ahead="main"),
    Quantity(
        "start_to_first_token_seconds",
        "first token from process start",
        **_WALL,
        plain="listed",
        ahead="main",
        is_of_token=True,
    ),
    Quantity(
        "process_cpu_seconds", "CPU time from process start", "seconds", ahead="listed", is_of_token=True
    ),
    Quantity("peak_anonymous_bytes", "peak anonymous", **_PEAK, plain="main", ahead="main"),
    Quantity("peak_total_bytes", "peak total", **_PEAK, plain="drawn", ahead="drawn"),
    Quantity("peak_device_bytes", "peak GPU", **_PEAK, **_EXTRA),
    # Of loads that are followed by several tokens.
    Quantity("seconds_per_token", "time per token", **_WALL, **_EXTRA),
    Quantity("read_bytes_per_token", "read per token", "bytes", **_EXTRA),
    Quantity("peak_file_bytes", "peak file-backed", **_PEAK),
    Quantity("read_bytes", "read from disk", "bytes"),
)
QUANTITIES = {quantity.name: quantity for quantity in _TABLE}


def compared(ahead: bool, *roles: Role) -> tuple[Quantity, ...]:
    """Return what is compared, in these roles (in any): of plain loads, or where a variant works ahead."""
    places = ((quantity, quantity.ahead if ahead else quantity.plain) for quantity in QUANTITIES.values())
    return tuple(quantity for quantity, role in places if role in (roles or ("main", "drawn", "listed")))


def why_missing(runs: Collection[LoadMeasurement], quantity: Quantity) -> str:
    """Return why no load that succeeded has a value of a quantity; "" if one has, or none needs any."""
    values = [quantity.of(run) for run in runs]
    if not runs or any(values):
        return ""
    if any(quantity.name in run.unreported() for run in runs):
        return NOT_REPORTED
    if 0 in values:
        return "too small to be measured" if quantity.unit == "seconds" else "zero, so no ratio"
    return "not measured" if quantity.is_of_token and any(run.generate for run in runs) else ""


@dataclass(frozen=True)
class Ratio:
    """One quantity ("load_wall_seconds") of a variant, to that of the original or the first that loads.

    Both figures are geometric means over the same pairs, and `ratio` is their ratio, new to old; low and high
    are its 95 % interval, None where the pairs are too few for one. The main quantities of a variant carry
    verdicts and share the 5 % among them (`family_errors`); of others, the conclusion is None.
    `pairs_to_decide` is None if it would take more than 200.

    Words say what the variant does compared with the original: "1.5x faster", or, if all that is said is
    below 1.25x, the change of the figure itself: "19 % smaller" for 336 MB that became 272 MB.
    """

    quantity: str
    original: float
    other: float
    ratio: float
    low: float | None
    high: float | None
    pairs: int
    conclusion: Conclusion | None
    margin: float
    pairs_to_decide: int | None

    def __str__(self) -> str:
        """Return the verdict: ``1.58x faster (1.43x to 1.74x)``; of one that carries none, the difference."""
        if self.low is None:
            return f"{self.difference}, {self.word}"
        if self.conclusion == "same":
            return f"{self.word} ({self._ends()})"
        if self.conclusion == "inconclusive":
            what, _, enough = self.word.partition(": ")
            return f"{what}: {self._ends()}; {enough}"
        return self.difference

    @property
    def difference(self) -> str:
        """The ratio in words, with its interval unless both ends round to it.

        ``1.2x faster (between 3 % slower and 1.5x faster)``.
        """
        if self.low is None or self.high is None:
            return f"{self._words(self.ratio)} in {plural(self.pairs, 'pair')}"
        change, ends = self._words(self.ratio, self.low, self.high), self._ends()
        if self.high < 1 or self.low > 1:
            ends = ends.removesuffix(f" {change.rpartition(' ')[2]}")
        return change if change.startswith(ends) else f"{change} ({ends})"

    @property
    def short(self) -> str:
        """The finding without its interval, for a title: ``1.58x faster``, ``no difference beyond 5 %``."""
        if self.low is not None and self.conclusion in ("same", "inconclusive"):
            return self.word.partition(":")[0]
        return self.difference.partition(" (")[0]

    @property
    def word(self) -> str:
        """What is concluded: ``faster``, ``no difference beyond 5 %``; "-" for what carries no verdict."""
        quantity, count = QUANTITIES[self.quantity], self.pairs_to_decide
        if self.conclusion is None:
            return "-"
        if self.low is None:
            return "too few for a verdict"
        enough = f"about {count} pairs would decide" if count else "more than 200 pairs would be needed"
        return {
            "same": f"no difference beyond {100 * self.margin:.3g} %",
            "less": quantity.less,
            "more": quantity.more,
            "inconclusive": f"inconclusive: {enough}",
        }[self.conclusion]

    def row(self) -> tuple[str, ...]:
        """Return what it is, both means, the difference and the verdict, as a table shows them."""
        quantity = QUANTITIES[self.quantity]
        means = map(quantity.format, (self.original, self.other))
        return quantity.label, *means, self.difference, self.word

    def _ends(self) -> str:
        """Return the interval, the smaller difference first: ``1.43x to 1.74x faster``."""
        low, high = self.low or 1.0, self.high or 1.0
        worse, better = self._words(high), self._words(low)
        if worse == better:
            return better
        if low <= 1 <= high:
            return f"between {worse} and {better}"
        near, far = (high, low) if high < 1 else (low, high)
        return f"{_size(near, far) or '0 %'} to {self._words(far, near)}"

    def _words(self, ratio: float, *others: float) -> str:
        size, quantity = _size(ratio, *others), QUANTITIES[self.quantity]
        return f"{size} {quantity.less if ratio < 1 else quantity.more}" if size else "equal"


def _size(ratio: float, *others: float) -> str:
    """Return how far a ratio is from 1: as a factor if it or any that is said along with it is large."""
    if max(max(one, 1 / one) for one in (ratio, *others)) >= _LARGE:
        return f"{max(ratio, 1 / ratio):.3g}x"
    percent = 100 * abs(ratio - 1)
    return f"{percent:.2g} %" if percent >= _NOTHING_PERCENT else ""


def ratios_of(
    values: Mapping[Quantity, tuple[Sequence[float], Sequence[float]]],
    main: Collection[Quantity],
    margin: float,
    law: Law = STUDENT,
) -> dict[Quantity, Ratio]:
    """Return the ratios of paired values by quantity; the main ones are a family of verdicts."""
    pairs = {quantity: Pairs.of(*both, law) for quantity, both in values.items()}
    family = [q for q in pairs if q in main and pairs[q].count >= q.least_pairs]
    errors = dict(zip(family, family_errors([pairs[q].p_value for q in family]), strict=True))
    ratios = {}
    for quantity, found in pairs.items():
        error = errors.get(quantity, ERROR)
        interval = found.interval(error) if found.count >= quantity.least_pairs else None
        low, high = interval or (None, None)
        ratios[quantity] = Ratio(
            quantity=quantity.name,
            original=geometric_mean(values[quantity][0]),
            other=geometric_mean(values[quantity][1]),
            ratio=math.exp(found.mean),
            low=low,
            high=high,
            pairs=found.count,
            conclusion=conclude(interval, margin) if quantity in main else None,
            margin=margin,
            pairs_to_decide=found.pairs_to_decide(error, margin),
        )
    return ratios


def format_seconds(seconds: float | None) -> str:
    """Return a time with its unit: ``2.31 s``, ``345 ms``, ``2 min 5 s``."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"
