"""The runs of a comparison, and what follows from them in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import geometric_mean, median
from typing import Self

from shardkit.base.errors import MeasurementError
from shardkit.base.record import listed
from shardkit.compare.variant import ORIGINAL, SHARDED, Sample, Variant
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.quantities import QUANTITIES, Quantity, Ratio, compared, why_missing
from shardkit.show.runs import Runs


@dataclass(frozen=True)
class Samples:
    """What was run, how, and the ratios; `Comparison` says what each field is."""

    variants: tuple[Variant, ...]
    margin: float
    seed: int
    samples: tuple[Sample, ...]
    warm_ups: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        named = {sample.variant for sample in (*self.samples, *self.warm_ups)}
        if not named <= set(self.names) or not 0 < self.margin < math.inf or self.seed < 0:
            raise MeasurementError("runs of variants that it does not have, or a margin or seed below zero")

    def with_sample(self, sample: Sample) -> Self:
        """Return the same with one run more."""
        if sample.pair is None:
            return replace(self, warm_ups=(*self.warm_ups, sample))
        return replace(self, samples=(*self.samples, sample))

    def variant(self, name: str) -> Variant:
        """Return a variant by its name; a `MeasurementError` lists the names that there are."""
        if name not in self.names:
            raise MeasurementError(f"no variant is called {name!r}: there are {listed(self.names)}")
        return self.variants[self.names.index(name)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variants, in order."""
        return tuple(variant.name for variant in self.variants)

    def measurements(self, variant: str) -> list[LoadMeasurement]:
        """Return the counted loads of one variant that succeeded."""
        return [s.measurement for s in self.samples if s.variant == variant and s.measurement.ok]

    def _runs(self, variant: str) -> list[LoadMeasurement]:
        """Return the counted loads of one variant; where there is none, its warm-up."""
        counted = [s.measurement for s in self.samples if s.variant == variant]
        return counted or [s.measurement for s in self.warm_ups if s.variant == variant]

    @property
    def reads_ahead(self) -> bool:
        """Whether a variant prefetches: it works before the load does, so all count from process start."""
        runs = (*self.samples, *self.warm_ups)
        asked = any(variant.options.get("prefetch") for variant in self.variants)
        return asked or any(sample.measurement.prefetch for sample in runs)

    @property
    def times(self) -> tuple[str, ...]:
        """The quantities by which loads are compared: time to the end of the load, and to the first token."""
        return tuple(quantity.name for quantity in self._main if quantity.unit == "seconds")

    @property
    def _main(self) -> tuple[Quantity, ...]:
        return compared(self.reads_ahead, "main")

    @property
    def runs(self) -> Runs:
        """What is drawn: the loads that count, and of each variant the run with the median last time."""
        typical = {name: run for name in self.names if (run := self.typical(name, self.times[1]))}
        return Runs({name: self.measurements(name) for name in self.names}, typical, self.reads_ahead)

    def mean(self, variant: str, quantity: str) -> float | None:
        """Return the geometric mean of a `LoadMeasurement` property over a variant's loads; None if none."""
        values = [getattr(measurement, quantity) for measurement in self.measurements(variant)]
        return geometric_mean(known) if (known := [value for value in values if value]) else None

    def median(self, variant: str, quantity: str) -> float | None:
        """Return the median of a `LoadMeasurement` property over one variant's loads; None if unknown."""
        values = [getattr(measurement, quantity) for measurement in self.measurements(variant)]
        return median(known) if (known := [value for value in values if value is not None]) else None

    @property
    def ratios(self) -> dict[str, Ratio]:
        """What was found of the sharded, by quantity."""
        return self.ratios_of(SHARDED)

    def ratios_of(self, variant: str) -> dict[str, Ratio]:
        """Return what was found of a variant by quantity; one that only one side has is left out."""
        return self._all_ratios.get(variant, {})

    @cached_property
    def _all_ratios(self) -> dict[str, dict[str, Ratio]]:
        # Kept: verdict, tables and JSON all ask, and each interval takes 10,000 resamplings.
        return {name: dict(self._ratios(name)) for name in self.names if name != self.reference}

    def _ratios(self, variant: str) -> Iterator[tuple[str, Ratio]]:
        for quantity in compared(self.reads_ahead):
            known = {
                (s.variant, s.pair): value
                for s in self.samples
                if s.measurement.ok and (value := quantity.of(s.measurement))
            }
            pairs = [pair for name, pair in known if name == variant and (self.reference, pair) in known]
            if pairs:
                first, second = ([known[name, pair] for pair in pairs] for name in (self.reference, variant))
                yield quantity.name, Ratio.of_pairs(quantity, first, second, self.margin, self.seed)

    @property
    def reference(self) -> str:
        """Name of the variant that the others are compared with: the original, or the first that loads."""
        return next((name for name in self.names if self.measurements(name)), ORIGINAL)

    def missing(self, variant: str, quantity: str) -> str:
        """Say why loads that succeeded have no value of a quantity; "" if they have, or need none."""
        sides = (self.measurements(name) for name in (self.reference, variant))
        return next(filter(None, (why_missing(runs, QUANTITIES[quantity]) for runs in sides)), "")

    @property
    def failures(self) -> dict[str, str]:
        """Variants of which no load succeeded, and why."""
        return {
            name: f"{runs[-1].outcome}: {runs[-1].reason}"
            for name in self.names
            if (runs := self._runs(name)) and not any(run.ok for run in runs)
        }

    def typical(self, variant: str, by: str | None = None) -> LoadMeasurement | None:
        """Return a variant's run with the median of a quantity (the load's time); else its first failure."""
        quantity = by or self.times[0]
        loads = sorted(self.measurements(variant), key=lambda m: getattr(m, quantity) or 0.0)
        return loads[len(loads) // 2] if loads else next(iter(self._runs(variant)), None)
