"""Measured loads by variant: what pictures and pages show, and the same in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardkit.base.sizes import format_size
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.quantities import Quantity, compared, format_seconds, why_missing

MARKED = (LOAD, FIRST_TOKEN)  # phases whose end is shown


@dataclass(frozen=True)
class Runs:
    """Loads of several variants.

    Attributes
    ----------
    loads
        By variant, those that count and succeeded.
    typical
        By variant, the load that stands for it, which may have failed; none where it was never run.
    reads_ahead
        Whether a variant works before its load does, so that times count from process start.
    """

    loads: Mapping[str, Sequence[LoadMeasurement]]
    typical: Mapping[str, LoadMeasurement]
    reads_ahead: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variants."""
        return tuple(self.loads)

    def drawn(self) -> tuple[Quantity, ...]:
        """Return what is drawn: the main quantities, and others where they are known or missed."""
        main, drawn = (compared(self.reads_ahead, role) for role in ("main", "drawn"))
        return (*main, *(one for one in drawn if self.why_missing(one) or self._has(one)))

    def _has(self, quantity: Quantity) -> bool:
        return any(quantity.of(load) for loads in self.loads.values() for load in loads)

    def why_missing(self, quantity: Quantity) -> str:
        """Return why no load has a quantity; "" if one has, or none needs any."""
        return why_missing([load for loads in self.loads.values() for load in loads], quantity)

    def describe_memory(self) -> str:
        """Return in words what `plot_memory` draws."""
        words = []
        for name, run in self.typical.items():
            peaks = (run.peak_anonymous_bytes, run.peak_total_bytes)
            anonymous, total = ("unknown" if peak is None else format_size(peak) for peak in peaks)
            line = [f"{name}: at most {anonymous} anonymous, {total} with file pages"]
            for phase in run.phases:
                if phase.name in MARKED:
                    end = phase.end_seconds if self.reads_ahead else phase.wall_seconds
                    line.append(f"{phase.name} done after {format_seconds(end)}")
            words.append(", ".join(line if run.ok else [*line, f"{run.outcome}: {run.reason}"]))
        return "; ".join(words) or "nothing was measured"
