"""Ratios of paired samples with an honest interval, and the conclusion to draw from them.

Student's intervals are for pairs whose number was fixed beforehand. Who looks after every pair, and ends
where one excludes 1, ends at some look or other by chance alone. `AT_ANY_TIME` is for pairs that are added
until they decide: a t confidence sequence (Lai, Annals of Statistics 4, 1976; Wang and Ramdas, Sequential
Analysis 44, 2025), whose intervals hold after all pairs at once with the given probability, however many
follow and for whatever reason they end. It compares how likely the ratios are, up to their scale, if the
difference in standard deviations of a pair were drawn from a normal distribution, with how likely they are
if there is none. Where there is none, this evidence is a martingale that begins at 1, so that the
probability that it ever exceeds 1/p is at most p (Ville's inequality).

It goes with Holm's procedure: for any difference that is none to be called, the evidence on one of the k
that are has to exceed k / 5 % at some look, which together is as unlikely as 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple, Self

Conclusion = Literal["less", "more", "same", "inconclusive"]

ERROR = 0.05
_MOST_PAIRS = 200
# What the normal distribution of differences weighs, in pairs: its standard deviation is 0.2 ** -0.5, some
# two of a pair's, as a difference of 1.3 x has where loads vary by a tenth. Any weight is right; others
# need more pairs.
_PRIOR_PAIRS = 0.2


def _student_p_value(distance: float, error: float, count: int) -> float:
    if error == 0:
        return float(distance == 0)
    return 1 - _within(math.atan(abs(distance) / error / math.sqrt(count - 1)), count - 1)


def _within(angle: float, freedom: int) -> float:
    """Return Student's A(t), ``t = sqrt(freedom) * tan(angle)``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd, cosine = freedom % 2, math.cos(angle)
    term, total = cosine**odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _p_value_at_any_time(distance: float, error: float, count: int) -> float:
    if distance == 0:
        return 1.0
    # Their quotient is t squared by its degrees of freedom; the noise may be zero, where all pairs are equal.
    signal, noise, kept = distance**2, (count - 1) * error**2, _PRIOR_PAIRS / (count + _PRIOR_PAIRS)
    evidence = math.log(kept) + count * math.log((noise + signal) / (noise + kept * signal))
    return min(1.0, math.exp(-evidence / 2))


class Law(NamedTuple):
    """What the mean of so many pairs may be by chance.

    `p_value(distance, error, count)` is how likely it is so far from the truth, with this standard error;
    `words` say whose intervals follow.
    """

    words: str
    p_value: Callable[[float, float, int], float]

    def quantile(self, count: int, error: float = ERROR) -> float:
        """Return how many standard errors it exceeds with this probability; infinity where no number is."""
        low, high = 0.0, math.pi / 2
        for _ in range(50):  # of angles, whose tangents they are; each halves what is unknown
            middle = (low + high) / 2
            is_rarer = self.p_value(math.tan(middle), 1, count) < error
            low, high = (low, middle) if is_rarer else (middle, high)
        return math.tan(high) if high < math.pi / 2 else math.inf


STUDENT = Law("Student's intervals", _student_p_value)
AT_ANY_TIME = Law("a t confidence sequence: intervals that hold after every pair", _p_value_at_any_time)


@dataclass(frozen=True)
class Pairs:
    """How the logarithms of paired ratios lie: their mean, its standard error (None for one pair), how many.

    Times of loads vary by factors, so their logarithms are what Student's t is for; it holds for two pairs
    and up, where a bootstrap of so few has nothing to draw from. Where pairs are added until they decide, the
    law is `AT_ANY_TIME`.
    """

    mean: float
    error: float | None
    count: int
    law: Law

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], law: Law = STUDENT) -> Self:
        """Return how ``second / first`` lies."""
        logs = [math.log(other / one) for one, other in zip(first, second, strict=True)]
        error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
        return cls(fmean(logs), error, len(logs), law)

    @property
    def p_value(self) -> float:
        """How likely a difference as large as this one is where there is none."""
        return 1.0 if self.error is None else self.law.p_value(self.mean, self.error, self.count)

    def interval(self, error: float = ERROR) -> tuple[float, float] | None:
        """Return where the ratio is, but for this probability; None where it may be anywhere."""
        if self.error is None or (quantile := self.law.quantile(self.count, error)) == math.inf:
            return None
        half = quantile * self.error
        return math.exp(self.mean - half), math.exp(self.mean + half)

    def pairs_to_decide(self, error: float, margin: float) -> int | None:
        """Return about how many pairs would decide, if more come out as these; None for more than 200."""
        if self.error is None:
            return None
        distance = max(abs(self.mean), math.log1p(margin) - abs(self.mean))
        spread = self.error * math.sqrt(self.count)
        for count in range(self.count + 1, _MOST_PAIRS + 1):
            if self.law.p_value(distance, spread / math.sqrt(count), count) < error:
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


def mean_interval(values: Sequence[float], law: Law) -> tuple[float, float] | None:
    """Return the 95 % interval of the geometric mean; None for fewer than three values."""
    return Pairs.of([1.0] * len(values), values, law).interval() if len(values) > 2 else None
