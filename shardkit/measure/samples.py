"""Runs of several variants of a checkpoint, and what follows from them in numbers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import geometric_mean, median
from typing import Any, Final, Literal, Self

from shardkit.base.errors import MeasurementError
from shardkit.base.record import listed, plural
from shardkit.base.sizes import format_size
from shardkit.formats.tensor import stored_dtype
from shardkit.measure.intervals import AT_ANY_TIME, STUDENT, Law
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.quantities import QUANTITIES, Quantity, Ratio, compared, ratios_of, why_missing

ORIGINAL, SHARDED = "original", "sharded"
AUTO: Final = "auto"  # repeats that end when every verdict is decided
Repeats = int | Literal["auto"]
MOST_PAIRS = 20

_ASKED = ("dtype", "device", "generate", "prefetch", "memory_limit_bytes", "max_memory_bytes")
_CLOCKED = ("wall_seconds", "user_seconds", "system_seconds", "major_faults", "read_bytes")
# Growth below a quarter of the weights is not a copy of them, and weights below this size show nothing.
_TELLING_SHARE, _TELLING_BYTES = 0.25, 64_000_000


@dataclass(frozen=True)
class Variant:
    """One of the checkpoints: where it is, how it is stored, and how it is loaded.

    `dtypes` maps dtype to bytes; `options` are the arguments of `measure_load`.
    """

    name: str
    source: str
    files: int
    total_bytes: int
    dtypes: dict[str, int]
    options: dict[str, Any]

    @property
    def dtype(self) -> str | None:
        """The floating-point dtype that most of it is stored in, in torch's words."""
        return stored_dtype(self.dtypes)

    def explain(self, loads: Sequence[LoadMeasurement], typical: LoadMeasurement | None) -> str:
        """Say where the figures of its loads come from: copied or mapped weights, read late or not."""
        requested = f"requested {typical.asked_for()}" if typical else "never run"
        words = f"{self.dtype or 'no plain floats'} in {plural(self.files, 'file')}, {requested}"
        if self.total_bytes < _TELLING_BYTES:
            return words
        telling = _TELLING_SHARE * self.total_bytes
        if (grown := _median_growth(loads, LOAD, "anonymous_bytes")) is not None:
            on_gpu = any(load.peak_device_bytes is not None for load in loads)
            fate = "weights go to the GPU" if on_gpu else "weights stay mapped from the file"
            fate = "weights copied into memory" if grown > telling else fate
            new, weights = format_size(max(grown, 0)), format_size(self.total_bytes)
            words += f": {fate} ({new} of new anonymous memory for {weights})"
            if typical and grown > telling and typical.dtype and self.dtype not in (None, typical.dtype):
                words += f"; requested as {self.dtype}, the stored dtype, they need no cast"
        touched = _median_growth(loads, FIRST_TOKEN, "file_bytes")
        if touched is not None and touched > telling:
            words += f"; {format_size(touched)} of file pages, including libraries, read for the first token"
        return words


@dataclass(frozen=True)
class Sample:
    """One run: of which variant, in which pair (None for the warm-up, which counts for nothing)."""

    variant: str
    pair: int | None
    measurement: LoadMeasurement

    def row(self, variant: Variant) -> dict[str, Any]:
        """Return all that a table of raw samples has of it."""
        run, environment = self.measurement, self.measurement.environment
        row = {
            "variant": self.variant,
            "pair": self.pair,
            "outcome": run.outcome,
            "source": variant.source,
            "stored_dtype": variant.dtype,
            "files": variant.files,
            "bytes": variant.total_bytes,
            **{name: getattr(run, name) for name in (*_ASKED, *QUANTITIES)},
            "cache": run.cache.asked,
            "cache_proven": run.cache.proven,
            **{
                f"{phase.name.replace(' ', '_')}_{what}": getattr(phase, what)
                for phase in run.phases
                for what in _CLOCKED
            },
            "cpu": environment.cpu,
            "cores": environment.cores,
        }
        return row | {name: version for name, version in environment.versions.items() if name not in row}


@dataclass(frozen=True)
class Samples:
    """What was run, how, and the ratios; `Comparison` says what each field is."""

    variants: tuple[Variant, ...]
    margin: float
    samples: tuple[Sample, ...]
    warm_ups: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    most: int | None = None

    def __post_init__(self) -> None:
        named = {sample.variant for sample in self.all_runs}
        if not named <= set(self.names) or not 0 < self.margin < math.inf:
            raise MeasurementError("runs of variants that it does not have, or a margin below zero")

    @property
    def all_runs(self) -> tuple[Sample, ...]:
        """Every run, the warm-ups first."""
        return (*self.warm_ups, *self.samples)

    def with_sample(self, sample: Sample) -> Self:
        """Return the same with one run more."""
        if sample.pair is None:
            return replace(self, warm_ups=(*self.warm_ups, sample))
        return replace(self, samples=(*self.samples, sample))

    def variant(self, name: str) -> Variant:
        """Return a variant by its name; a `MeasurementError` lists the names that there are."""
        if name not in self.names:
            raise MeasurementError(f"no variant is named {name!r}: there are {listed(self.names)}")
        return self.variants[self.names.index(name)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variants, in order."""
        return tuple(variant.name for variant in self.variants)

    def measurements(self, variant: str) -> list[LoadMeasurement]:
        """Return the counted loads of one variant that succeeded."""
        return [s.measurement for s in self.samples if s.variant == variant and s.measurement.ok]

    def by_pair(self, variant: str) -> dict[int, LoadMeasurement]:
        """Return the same by the pair that each is of."""
        counted = ((s.pair, s.measurement) for s in self.samples if s.variant == variant)
        return {pair: run for pair, run in counted if run.ok and pair is not None}

    def _runs(self, variant: str) -> list[LoadMeasurement]:
        """Return the counted loads of one variant; where there is none, its warm-up."""
        counted = [s.measurement for s in self.samples if s.variant == variant]
        return counted or [s.measurement for s in self.warm_ups if s.variant == variant]

    @property
    def reads_ahead(self) -> bool:
        """Whether a variant prefetches: it works before the load does, so all count from process start."""
        asked = any(variant.options.get("prefetch") for variant in self.variants)
        return asked or any(sample.measurement.prefetch for sample in self.all_runs)

    @property
    def main(self) -> tuple[Quantity, ...]:
        """The quantities that the verdict is about: those that loads have, or should have."""
        loads = [load for name in self.names for load in self.measurements(name)]
        generates = not self.all_runs or any(sample.measurement.generate for sample in self.all_runs)
        return tuple(
            quantity
            for quantity in compared(self.reads_ahead, "main")
            if any(map(quantity.of, loads))
            or not (quantity.is_optional or (quantity.is_of_token and not generates))
        )

    def drawn(self) -> dict[Quantity, str]:
        """Return what pictures show, and why if no load has it: main quantities, others known or missed."""
        loads = [load for name in self.names for load in self.measurements(name)]
        drawn = {q: why_missing(loads, q) for q in compared(self.reads_ahead, "main", "drawn")}
        main = self.main
        return {q: why for q, why in drawn.items() if why or q in main or any(map(q.of, loads))}

    @property
    def typical_runs(self) -> dict[str, LoadMeasurement]:
        """The run that stands for each variant that was run; as `typical`."""
        return {name: run for name in self.names if (run := self.typical(name))}

    def typical(self, variant: str, by: str | None = None) -> LoadMeasurement | None:
        """Return a variant's load with the median of a quantity (the load's time), else its first failure."""
        quantity = by or self.main[0].name
        loads = sorted(self.measurements(variant), key=lambda load: getattr(load, quantity) or 0.0)
        return next(iter(loads[len(loads) // 2 :] or self._runs(variant)), None)

    def mean(self, variant: str, quantity: str) -> float | None:
        """Return the geometric mean of a `LoadMeasurement` property over a variant's loads; None if none."""
        loads = self.measurements(variant)
        values = [value for load in loads if (value := getattr(load, quantity)) is not None]
        return geometric_mean(known) if (known := [*filter(None, values)]) else next(iter(values), None)

    @property
    def ratios(self) -> dict[str, Ratio]:
        """What was found of the sharded, by quantity."""
        return self.ratios_of(SHARDED)

    def ratios_of(self, variant: str) -> dict[str, Ratio]:
        """Return the ratios of a variant by quantity; one that only one side has is left out."""
        return {q.name: found for q, found in self.found(variant).items() if isinstance(found, Ratio)}

    def found(self, variant: str) -> dict[Quantity, Ratio | str]:
        """Return what was found of a variant by quantity: its ratio, or why there is none."""
        return self._found.get(variant, {})

    @cached_property
    def _found(self) -> dict[str, dict[Quantity, Ratio | str]]:
        # Kept: verdict, tables, pictures and JSON all ask.
        return {name: self._compared(name) for name in self.names if name != self.reference}

    def _compared(self, variant: str) -> dict[Quantity, Ratio | str]:
        first, second = self.by_pair(self.reference), self.by_pair(variant)
        known: dict[Quantity, tuple[Sequence[float], Sequence[float]]] = {}
        missing: dict[Quantity, str] = {}
        for quantity in compared(self.reads_ahead):
            both = ((quantity.of(first[pair]), quantity.of(second[pair])) for pair in first if pair in second)
            if pairs := [(one, other) for one, other in both if one and other]:
                ones, others = zip(*pairs, strict=True)
                known[quantity] = ones, others
            elif why := why_missing(first.values(), quantity) or why_missing(second.values(), quantity):
                missing[quantity] = why
        found: dict[Quantity, Ratio | str] = {**ratios_of(known, self.main, self.margin, self.law), **missing}
        return {quantity: found[quantity] for quantity in compared(self.reads_ahead) if quantity in found}

    @property
    def law(self) -> Law:
        """What intervals are by: pairs that were added until they decide were looked at more than once."""
        return STUDENT if self.most is None else AT_ANY_TIME

    @property
    def is_decided(self) -> bool:
        """Whether no verdict is inconclusive, of any variant that ever loaded."""
        loads = {sample.variant for sample in self.all_runs if sample.measurement.ok}
        found = [self.found(name) for name in loads - {self.reference}]
        verdicts = (ratio for one in found for ratio in one.values() if isinstance(ratio, Ratio))
        return all(found) and not any(ratio.conclusion == "inconclusive" for ratio in verdicts)

    @property
    def reference(self) -> str:
        """Name of the variant that the others are compared with: the original, or the first that loads."""
        return next((name for name in self.names if self.measurements(name)), ORIGINAL)

    @property
    def failures(self) -> dict[str, str]:
        """Variants of which no load succeeded, and why."""
        return {
            name: runs[-1].end
            for name in self.names
            if (runs := self._runs(name)) and not any(run.ok for run in runs)
        }


def _median_growth(loads: Sequence[LoadMeasurement], name: str, part: str) -> float | None:
    """Return by how much a phase's peak exceeds what was there when it began; `part` as in the curve."""
    grown = []
    for load in loads:
        phase, curve = load.phase(name), load.curve
        if phase is None or (peak := getattr(phase, f"peak_{part}")) is None:
            continue
        if began := bisect_right(curve.seconds, phase.start_seconds):
            grown.append(peak - getattr(curve, part)[began - 1])
    return median(grown) if grown else None
