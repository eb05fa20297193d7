"""One quantity of two variants: which there are, what their ratio says, and how people read it."""

from __future__ import annotations

from dataclasses import dataclass

from shardkit.base.sizes import format_size
from shardkit.measure.intervals import Conclusion
from shardkit.measure.measurement import format_seconds

# A property of LoadMeasurement: what people call it, and the words for less and more of it.
QUANTITIES = {
    "load_wall_seconds": ("load time", "faster", "slower"),
    "load_cpu_seconds": ("load CPU time", "less", "more"),
    "time_to_first_token_seconds": ("time to first token", "faster", "slower"),
    "start_to_load_seconds": ("load from process start", "faster", "slower"),
    "start_to_first_token_seconds": ("first token from process start", "faster", "slower"),
    "process_cpu_seconds": ("CPU time from process start", "less", "more"),
    "peak_anonymous_bytes": ("peak anonymous", "smaller", "larger"),
    "peak_total_bytes": ("peak total", "smaller", "larger"),
    "peak_device_bytes": ("peak GPU", "smaller", "larger"),
}


def format_quantity(quantity: str, value: float) -> str:
    """Return a value of one of `QUANTITIES` as people read it."""
    return format_size(value) if quantity.endswith("_bytes") else format_seconds(value)


@dataclass(frozen=True)
class Ratio:
    """One quantity of one variant, to that of the original (or of the first variant that loads).

    Attributes
    ----------
    quantity
        The `LoadMeasurement` property: "load_wall_seconds".
    original, other
        Geometric means over the pairs, in seconds or bytes as the name of the quantity says.
    ratio, low, high
        ``other / original``, which is the geometric mean of the pairs' ratios too, and its 95 % interval
        (None with fewer than two pairs).
    conclusion
        "less", "more", "same" (within `margin`) or "undecided".
    repeats_to_decide
        If undecided: about how many repeats would decide; None if more than 200.
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

    def words(self) -> str:
        """Return the verdict: ``3.61x faster (3.1x to 4.2x)``."""
        _, less, more = QUANTITIES[self.quantity]
        if self.low is None or self.high is None:
            return f"inconclusive: {self.ratio:.3g}x in a single pair"
        if self.conclusion == "same":
            return f"no difference within ±{100 * self.margin:.3g} %"
        if self.conclusion == "less":
            return f"{1 / self.ratio:.3g}x {less} ({1 / self.high:.3g}x to {1 / self.low:.3g}x)"
        if self.conclusion == "more":
            return f"{self.ratio:.3g}x {more} ({self.low:.3g}x to {self.high:.3g}x)"
        count = self.repeats_to_decide
        enough = f"about {count} repeats would decide" if count else "more than 200 repeats would be needed"
        return f"inconclusive ({self.low:.3g}x to {self.high:.3g}x): {enough}"

    def row(self) -> tuple[str, ...]:
        """Return what it is, both means, their ratio and the verdict, as people read them."""
        means = (format_quantity(self.quantity, value) for value in (self.original, self.other))
        return QUANTITIES[self.quantity][0], *means, f"{self.ratio:.3g}x", self.words()
