"""A ratio of paired figures, as benchmarks print it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

from shardkit.measure.intervals import Pairs


class Ratio(NamedTuple):
    """``second / first``, and where it lies with 95 % probability (one pair: anywhere)."""

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Self:
        """Return the geometric mean of paired ratios, with Student's interval."""
        pairs = Pairs.of(first, second)
        return cls(math.exp(pairs.mean), *(pairs.interval() or (0.0, math.inf)))

    def line(self, title: str, limit: float, verdict: str = "") -> str:
        """Return a line of a benchmark's table."""
        bounds = f"{self.low:.3f} to {self.high:.3f}" if self.high < math.inf else "-"
        verdict = verdict or ("held" if self.ratio <= limit else "NOT HELD")
        return f"{title:<66} {self.ratio:>7.3f} {bounds:>16} {limit:>8.2f}  {verdict}"


HEAD = f"{'promise':<66} {'ratio':>7} {'95 % interval':>16} {'at most':>8}"
