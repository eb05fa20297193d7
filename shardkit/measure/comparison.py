"""What many loads of two checkpoints say: raw samples, ratios with intervals, a verdict in words."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, Self

from shardkit.errors import MeasurementError
from shardkit.measure.intervals import Conclusion, conclude, paired_interval, repeats_to_decide
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement, format_seconds
from shardkit.record import Record, Summary, Table, plural, shown_path
from shardkit.sizes import format_size
from shardkit.tensor import DTYPE_NAMES, FLOAT_DTYPES

if TYPE_CHECKING:
    import pandas as pd

ArmName = Literal["original", "sharded"]
ARMS: tuple[ArmName, ArmName] = ("original", "sharded")

# A property of LoadMeasurement: what people call it, and the words for less and more of it.
QUANTITIES = {
    "load_wall_seconds": ("load time", "faster", "slower"),
    "load_cpu_seconds": ("load CPU time", "less", "more"),
    "time_to_first_token_seconds": ("time to first token", "faster", "slower"),
    "peak_anonymous_bytes": ("peak anonymous", "smaller", "larger"),
    "peak_total_bytes": ("peak total", "smaller", "larger"),
}
_MAIN = ("load_wall_seconds", "time_to_first_token_seconds", "peak_anonymous_bytes")
# Growth below a quarter of the weights is not a copy of them, and below this size not telling.
_TELLING_SHARE, _TELLING_BYTES = 0.25, 64_000_000


@dataclass(frozen=True)
class Arm:
    """One of the two checkpoints: where it is and how it is stored; `dtypes` maps dtype to bytes."""

    name: ArmName
    source: str
    files: int
    total_bytes: int
    dtypes: dict[str, int]

    @property
    def dtype(self) -> str | None:
        """The floating-point dtype that most of it is stored in, in torch's words."""
        return next((DTYPE_NAMES[dtype] for dtype in self.dtypes if dtype in FLOAT_DTYPES), None)


@dataclass(frozen=True)
class Sample:
    """One run: of which arm, in which pair (None for the warm-up, which counts for nothing)."""

    arm: ArmName
    pair: int | None
    measurement: LoadMeasurement


@dataclass(frozen=True)
class Ratio:
    """One quantity, sharded to original.

    Attributes
    ----------
    quantity
        The `LoadMeasurement` property: "load_wall_seconds".
    original, sharded
        Medians, in seconds or bytes as the name of the quantity says.
    ratio, low, high
        Geometric mean of the paired ratios ``sharded / original`` and its 95 % interval (None with
        fewer than two pairs).
    conclusion
        "less", "more", "same" (within `margin`) or "undecided".
    repeats_to_decide
        If undecided: about how many repeats would decide; None if more than 200.
    """

    quantity: str
    original: float
    sharded: float
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
            return f"undecided: {self.ratio:.3g}x in a single pair"
        if self.conclusion == "same":
            return f"no difference within ±{100 * self.margin:.3g} %"
        if self.conclusion == "less":
            return f"{1 / self.ratio:.3g}x {less} ({1 / self.high:.3g}x to {1 / self.low:.3g}x)"
        if self.conclusion == "more":
            return f"{self.ratio:.3g}x {more} ({self.low:.3g}x to {self.high:.3g}x)"
        count = self.repeats_to_decide
        enough = f"about {count} repeats would decide" if count else "more than 200 repeats would be needed"
        return f"undecided ({self.low:.3g}x to {self.high:.3g}x): {enough}"

    def shown(self, arm: ArmName) -> str:
        """Return one arm's median as people read it."""
        value = self.original if arm == "original" else self.sharded
        return format_size(value) if self.quantity.endswith("_bytes") else format_seconds(value)


@dataclass(frozen=True)
class Comparison(Record):
    """Two checkpoints loaded in turn, `repeats` times each, and the verdict.

    Attributes
    ----------
    original, sharded
        The two arms.
    dtype, device, cache, generate
        What every load was asked for.
    margin
        Smallest difference that matters: 0.05 for 5 %.
    seed
        Of the bootstrap.
    samples, warm_ups
        Every run in the order it was made, raw.
    notes
        What a person should be told.
    """

    original: Arm
    sharded: Arm
    dtype: str | None
    device: str
    cache: str
    generate: int
    margin: float
    seed: int
    samples: tuple[Sample, ...]
    warm_ups: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    def measurements(self, arm: ArmName) -> list[LoadMeasurement]:
        """Return the counted loads of one arm that succeeded."""
        return [s.measurement for s in self.samples if s.arm == arm and s.measurement.ok]

    def median(self, arm: ArmName, quantity: str) -> float | None:
        """Return the median of a `LoadMeasurement` property over one arm's loads; None if never told."""
        values = [getattr(measurement, quantity) for measurement in self.measurements(arm)]
        return median(told) if (told := [value for value in values if value is not None]) else None

    @cached_property
    def ratios(self) -> dict[str, Ratio]:
        """What was found by quantity; a quantity that was not told by both arms is left out."""
        found = (self._ratio(quantity) for quantity in QUANTITIES)
        return {ratio.quantity: ratio for ratio in found if ratio}

    def _ratio(self, quantity: str) -> Ratio | None:
        pairs: dict[int | None, dict[str, float]] = {}
        for sample in self.samples:
            value = getattr(sample.measurement, quantity)
            if sample.measurement.ok and value:
                pairs.setdefault(sample.pair, {})[sample.arm] = value
        whole = [pair for pair in pairs.values() if len(pair) == len(ARMS)]
        if not whole:
            return None
        first, second = ([pair[arm] for pair in whole] for arm in ARMS)
        interval = paired_interval(first, second, self.seed)
        return Ratio(
            quantity=quantity,
            original=median(first),
            sharded=median(second),
            ratio=interval.ratio,
            low=interval.low,
            high=interval.high,
            conclusion=conclude(interval, self.margin),
            margin=self.margin,
            repeats_to_decide=repeats_to_decide(first, second, self.margin),
        )

    @property
    def failures(self) -> dict[str, str]:
        """Arms of which no counted load succeeded, and why."""
        runs = {arm: [s.measurement for s in (*self.warm_ups, *self.samples) if s.arm == arm] for arm in ARMS}
        return {
            arm: f"{runs[arm][-1].outcome}: {runs[arm][-1].reason}"
            for arm in ARMS
            if runs[arm] and not self.measurements(arm)
        }

    @property
    def verdict(self) -> str:
        """What the sharded checkpoint does compared with the original, in words."""
        if failures := self.failures:
            works = "".join(f"; the {arm} one does" for arm in ARMS if self.measurements(arm))
            return "; ".join(f"the {arm} does not load ({why})" for arm, why in failures.items()) + works
        told = [self.ratios[quantity] for quantity in _MAIN if quantity in self.ratios]
        return "; ".join(f"{QUANTITIES[r.quantity][0]}: {r.words()}" for r in told) or "nothing was measured"

    def typical(self, arm: ArmName, by: str = "load_wall_seconds") -> LoadMeasurement | None:
        """Return an arm's run with the median of a quantity; if it never loads, its first failure."""
        loads = sorted(self.measurements(arm), key=lambda m: getattr(m, by) or 0.0)
        if loads:
            return loads[len(loads) // 2]
        runs = (s.measurement for s in (*self.samples, *self.warm_ups) if s.arm == arm)
        return next(runs, None)

    def explain(self, arm: ArmName) -> str:
        """Say where an arm's figures come from, as far as they tell: copied or mapped, read late or not."""
        stored: Arm = getattr(self, arm)
        asked = f"{self.dtype} asked for" if self.dtype else "no dtype asked for"
        words = f"{stored.dtype or 'no plain floats'} in {plural(stored.files, 'file')}, {asked}"
        if stored.total_bytes < _TELLING_BYTES:
            return words
        telling = _TELLING_SHARE * stored.total_bytes
        weights = format_size(stored.total_bytes)
        if (grown := self._median_growth(arm, LOAD, "peak_anonymous_bytes")) is not None:
            fate = "weights copied into memory" if grown > telling else "weights stay mapped from the file"
            words += f": {fate} ({format_size(max(grown, 0))} of new anonymous memory for {weights})"
        touched = self._median_growth(arm, FIRST_TOKEN, "peak_file_bytes")
        if touched is not None and touched > telling:
            words += f"; {format_size(touched)} were touched only by the first token"
        return words

    def _median_growth(self, arm: ArmName, name: str, peak: str) -> float | None:
        """Return by how much a phase's peak exceeds that of the phase before it."""
        grown = []
        for measurement in self.measurements(arm):
            for before, phase in zip(measurement.phases, measurement.phases[1:], strict=False):
                peaks = getattr(before, peak), getattr(phase, peak)
                if phase.name == name and None not in peaks:
                    grown.append(peaks[1] - peaks[0])
        return median(grown) if grown else None

    def summary(self) -> Summary:
        """Return the verdict, both arms' times, and every quantity with its interval."""
        pairs = plural(len({sample.pair for sample in self.samples}), "pair")
        stacks = dict.fromkeys(s.measurement.stack() for s in self.samples)
        facts = (
            *(("verdict" if not line else "", words) for line, words in enumerate(self.verdict.split("; "))),
            *((f"{arm}, median run", run.time_line()) for arm in ARMS if (run := self.typical(arm))),
            *((f"{arm} from", shown_path(getattr(self, arm).source)) for arm in ARMS),
            *((f"{arm} stored", self.explain(arm)) for arm in ARMS),
            ("runs", f"{pairs} in ABBA order, one warm-up each, {self.cache} page cache"),
            ("stack", " | ".join(stacks) or "not told"),
        )  # fmt: skip
        rows = tuple(
            (
                QUANTITIES[r.quantity][0],
                r.shown("original"),
                r.shown("sharded"),
                f"{r.ratio:.3g}x",
                r.words(),
            )
            for r in self.ratios.values()
        )
        columns = (
            "median",
            "original",
            "sharded",
            "ratio",
            f"verdict (95 % interval, ±{100 * self.margin:.3g} %)",
        )
        return Summary(
            "Comparison of loads", facts, (Table(columns, rows),) if rows else (), self._warnings()
        )

    def _warnings(self) -> tuple[str, ...]:
        counted = Counter(warning for s in self.samples for warning in s.measurement.warnings())
        failed = Counter(f"{s.arm}: {s.measurement.outcome}" for s in self.samples if not s.measurement.ok)
        tokens = {s.measurement.token_ids for s in self.samples if s.measurement.ok}
        differ = ("the arms did not give the same tokens for the fixed prompt",) if len(tokens) > 1 else ()
        some = (
            f"{count} of {plural(len(self.samples), 'run')}: {what}"
            for what, count in (counted + failed).items()
        )
        return (*self.notes, *differ, *some)

    def to_frame(self) -> pd.DataFrame:
        """Return the raw samples, one row each; the pair of a warm-up is missing."""
        import pandas as pd

        return pd.DataFrame([_row(sample) for sample in (*self.warm_ups, *self.samples)]).convert_dtypes()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready data, with the verdict for those who read the JSON alone."""
        return {**super().to_dict(), "verdict": self.verdict}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, raw samples included, as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the comparison that `save` wrote.

        Raises
        ------
        MeasurementError
            If the file is not JSON.
        ShardkitError
            If it is, but no comparison.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MeasurementError(f"{os.fspath(path)} cannot be read as a comparison: {error}") from error
        return cls.from_dict(data if isinstance(data, dict) else {})

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw times, peaks and memory curves; save them if `path` is given (``.png``, ``.svg``).

        Returns
        -------
        The three axes: times, peaks, curves.
        """
        from shardkit.display.plots import plot_comparison

        return plot_comparison(self, path)


def _row(sample: Sample) -> dict[str, Any]:
    measurement = sample.measurement
    row: dict[str, Any] = {"arm": sample.arm, "pair": sample.pair, "outcome": measurement.outcome}
    row |= {quantity: getattr(measurement, quantity) for quantity in QUANTITIES}
    row |= {"peak_file_bytes": measurement.peak_file_bytes, "cache_proven": measurement.cache.proven}
    for phase in measurement.phases:
        name = phase.name.replace(" ", "_")
        for what in ("wall_seconds", "user_seconds", "system_seconds", "major_faults", "read_bytes"):
            row.setdefault(f"{name}_{what}", getattr(phase, what))
    return row
