"""The figures of a load that are compared and shown: one table, and what the ratio of two says.

A new figure is a property of `LoadMeasurement` and a line of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Literal, Self

from shardkit.base.sizes import format_size
from shardkit.measure.intervals import Conclusion, conclude, paired_interval, repeats_to_decide

if TYPE_CHECKING:
    from shardkit.measure.measurement import LoadMeasurement

NOT_REPORTED = "not reported by this system"

Unit = Literal["seconds", "bytes", "count"]
Role = Literal["main", "drawn", "listed"]


@dataclass(frozen=True)
class Quantity:
    """One figure of a load: a property of `LoadMeasurement`, what people call it, and less and more of it.

    `plain` and `ahead` are its role in a comparison of plain loads, and in one where a variant works before
    its load does: "main" (verdict, picture and tables), "drawn" (picture and tables, where it is known),
    "listed" (tables alone); None leaves it out. If `is_of_token`, a load has it only with a first token.
    """

    name: str
    label: str
    unit: Unit
    less: str = "less"
    more: str = "more"
    plain: Role | None = None
    ahead: Role | None = None
    is_of_token: bool = False

    def __post_init__(self) -> None:
        if self.unit == "count" and {self.plain, self.ahead} & {"main", "drawn"}:
            raise ValueError(f"{self.name}: the picture has no axis for counts, so they are only listed")

    def of(self, measurement: LoadMeasurement) -> float | None:
        """Return the value that one load has; None if unknown."""
        value: float | None = getattr(measurement, self.name)
        return value

    def format(self, value: float | None) -> str:
        """Return a value with its unit."""
        if value is None:
            return "-"
        formats: dict[Unit, Callable[[Any], str]] = {"bytes": format_size, "seconds": format_seconds}
        return formats[self.unit](value) if self.unit in formats else f"{value:,.0f}"


_WALL: dict[str, Any] = {"unit": "seconds", "less": "faster", "more": "slower"}
_PEAK: dict[str, Any] = {"unit": "bytes", "less": "smaller", "more": "larger"}
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
    Quantity("peak_device_bytes", "peak GPU", **_PEAK, plain="drawn", ahead="drawn"),
    # Of loads that are followed by several tokens; of others nobody misses them.
    Quantity("seconds_per_token", "time per token", **_WALL, plain="drawn", ahead="drawn"),
    Quantity("read_bytes_per_token", "read per token", "bytes", plain="drawn", ahead="drawn"),
    Quantity("peak_file_bytes", "peak file-backed", **_PEAK),
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
        return "too small to be measured"
    return "not measured" if quantity.is_of_token and any(run.generate for run in runs) else ""


@dataclass(frozen=True)
class Ratio:
    """One quantity ("load_wall_seconds") of a variant, to that of the original or the first that loads.

    Both figures are geometric means over the pairs, and so is the ratio ``other / original``; low and high
    are its 95 % interval, None for a single pair. `repeats_to_decide` is None if it would take more than 200.
    """

    quantity: str
    original: float
    other: float
    ratio: float
    low: float | None
    high: float | None
    conclusion: Conclusion
    margin: float
    repeats_to_decide: int | None

    @classmethod
    def of_pairs(
        cls, quantity: Quantity, first: Sequence[float], second: Sequence[float], margin: float, seed: int
    ) -> Self:
        """Return the ratio of paired values, its bootstrap seeded."""
        interval = paired_interval(first, second, seed)
        return cls(
            quantity=quantity.name,
            original=geometric_mean(first),
            other=geometric_mean(second),
            **vars(interval),
            conclusion=conclude(interval, margin),
            margin=margin,
            repeats_to_decide=repeats_to_decide(first, second, margin),
        )

    def __str__(self) -> str:
        """Return the verdict: ``3.61x faster (3.1x to 4.2x)``."""
        quantity = QUANTITIES[self.quantity]
        if self.low is None or self.high is None:
            return f"inconclusive: {self.ratio:.3g}x in a single pair"
        if self.conclusion == "same":
            return f"no difference within ±{100 * self.margin:.3g} %"
        if self.conclusion == "less":
            return f"{1 / self.ratio:.3g}x {quantity.less} ({1 / self.high:.3g}x to {1 / self.low:.3g}x)"
        if self.conclusion == "more":
            return f"{self.ratio:.3g}x {quantity.more} ({self.low:.3g}x to {self.high:.3g}x)"
        count = self.repeats_to_decide
        enough = f"about {count} repeats would decide" if count else "more than 200 repeats would be needed"
        return f"inconclusive ({self.low:.3g}x to {self.high:.3g}x): {enough}"

    def row(self) -> tuple[str, ...]:
        """Return what it is, both means, their ratio and the verdict, as a table shows them."""
        quantity = QUANTITIES[self.quantity]
        means = map(quantity.format, (self.original, self.other))
        return quantity.label, *means, f"{self.ratio:.3g}x", str(self)


def format_seconds(seconds: float | None) -> str:
    """Return a time with its unit: ``2.31 s``, ``345 ms``, ``2 min 5 s``."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"
