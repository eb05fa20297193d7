"""Ratios of paired samples with an honest interval, and the conclusion to draw from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Conclusion = Literal["less", "more", "same", "inconclusive"]

_RESAMPLES = 10_000
_MOST_REPEATS = 200
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Interval:
    """Geometric mean of paired ratios, with its 95 % interval; None where there are too few pairs."""

    ratio: float
    low: float | None
    high: float | None


def paired_interval(first: Sequence[float], second: Sequence[float], seed: int) -> Interval:
    """Return the geometric mean of ``second / first`` and its seeded bootstrap interval.

    The resampled means are stretched about their centre by Student's factor for so few pairs (1.6 for
    five): the plain percentile interval of five pairs holds the truth in some 84 % of cases, not in 95 %.
    """
    import numpy as np

    logs = np.log(np.asarray(second, float) / np.asarray(first, float))
    count, mean = len(logs), float(logs.mean())
    if count < 2:
        return Interval(math.exp(mean), None, None)
    draws = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
    low, high = np.quantile(logs[draws].mean(axis=1), (0.025, 0.975)) - mean
    stretch = student_quantile(count - 1) / _Z * math.sqrt(count / (count - 1))
    return Interval(
        math.exp(mean), math.exp(mean + stretch * float(low)), math.exp(mean + stretch * float(high))
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the geometric mean; None for fewer than three values."""
    import numpy as np

    logs, count = np.log(np.asarray(values, float)), len(values)
    if count < 3:
        return None
    half = student_quantile(count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    return math.exp(float(logs.mean()) - half), math.exp(float(logs.mean()) + half)


def conclude(interval: Interval, margin: float) -> Conclusion:
    """Return whether all of an interval is within `margin` (0.05 for 5 %), or beyond it on one side."""
    if interval.low is None or interval.high is None:
        return "inconclusive"
    if interval.high < 1 / (1 + margin):
        return "less"
    if interval.low > 1 + margin:
        return "more"
    inside = 1 / (1 + margin) <= interval.low and interval.high <= 1 + margin
    return "same" if inside else "inconclusive"


def repeats_to_decide(first: Sequence[float], second: Sequence[float], margin: float) -> int | None:
    """Return about how many pairs would decide, if they went on as these; None for more than 200."""
    import numpy as np

    logs = np.log(np.asarray(second, float) / np.asarray(first, float))
    if len(logs) < 2:
        return None
    distance = abs(abs(float(logs.mean())) - math.log1p(margin))
    spread = float(logs.std(ddof=1))
    for count in range(len(logs) + 1, _MOST_REPEATS + 1):
        if student_quantile(count - 1) * spread / math.sqrt(count) < distance:
            return count
    return None


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution (Cornish-Fisher; exact for 1 and 2)."""
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    z, v = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
