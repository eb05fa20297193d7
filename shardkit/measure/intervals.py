"""Ratios of paired samples with an honest interval, and the conclusion to draw from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, Self

Conclusion = Literal["less", "more", "same", "inconclusive"]

ERROR = 0.05
_MOST_PAIRS = 200


@dataclass(frozen=True)
class Pairs:
    """How the logarithms of paired ratios lie: their mean, its standard error (None for one pair), how many.

    Times of loads vary by factors, so their logarithms are what Student's t is for; it holds for two pairs
    and up, where a bootstrap of so few has nothing to draw from.
    """

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Self:
        """Return how ``second / first`` lies."""
        logs = [math.log(other / one) for one, other in zip(first, second, strict=True)]
        error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
        return cls(fmean(logs), error, len(logs))

    @property
    def p_value(self) -> float:
        """How likely a difference as large as this one is where there is none."""
        if self.error is None:
            return 1.0
        return 1 - _probability_within(self.mean, self.error, self.count)

    def interval(self, error: float = ERROR) -> tuple[float, float] | None:
        """Return where the ratio is, but for this probability; None for a single pair."""
        if self.error is None:
            return None
        half = student_quantile(self.count - 1, error) * self.error
        return math.exp(self.mean - half), math.exp(self.mean + half)

    def pairs_to_decide(self, error: float, margin: float) -> int | None:
        """Return about how many pairs would decide, if more come out as these; None for more than 200."""
        if self.error is None:
            return None
        distance = max(abs(self.mean), math.log1p(margin) - abs(self.mean))
        spread = self.error * math.sqrt(self.count)
        for count in range(self.count + 1, _MOST_PAIRS + 1):
            if _probability_within(distance, spread / math.sqrt(count), count) > 1 - error:
                return count
        return None


def conclude(interval: tuple[float, float] | None, margin: float) -> Conclusion:
    """Return "same" if all of an interval is within `margin` (0.05 for 5 %), else its side of 1."""
    if interval is None:
        return "inconclusive"
    low, high = interval
    if 1 / (1 + margin) <= low and high <= 1 + margin:
        return "same"
    return "less" if high < 1 else "more" if low > 1 else "inconclusive"


def family_errors(p_values: Sequence[float]) -> list[float]:
    """Return for each of several comparisons the error that its interval may have, so that all share 5 %.

    By Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979): the clearest of m differences
    has to be clear at 5 %/m, the next at 5 %/(m-1); once one is not, the rest are judged as it was. Then the
    probability that any difference is found where there is none is at most 5 %, however they depend on each
    other; and as each interval is of just this error, it excludes 1 if and only if the difference counts.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    errors, steps = [ERROR] * len(order), 0
    for place, which in enumerate(order):
        errors[which] = ERROR / (len(order) - steps)
        steps += place == steps and p_values[which] <= errors[which]
    return errors


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the geometric mean; None for fewer than three values."""
    return Pairs.of([1.0] * len(values), values).interval() if len(values) > 2 else None


def _probability_within(distance: float, error: float, count: int) -> float:
    """Return the probability that the mean of `count` is no farther off than this, by Student's t."""
    if error == 0:
        return float(distance != 0)
    return _within(math.atan(abs(distance) / error / math.sqrt(count - 1)), count - 1)


def _within(angle: float, freedom: int) -> float:
    """Return Student's A(t), ``t = sqrt(freedom) * tan(angle)``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine**odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def student_quantile(freedom: int, error: float = ERROR) -> float:
    """Return the t that Student's distribution exceeds, on either side, with this probability."""
    low, high = 0.0, math.pi / 2
    for _ in range(50):  # of angles; each halves what is unknown
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 1 - error else (low, middle)
    return math.sqrt(freedom) * math.tan(high)
