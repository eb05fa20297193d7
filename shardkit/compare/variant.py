"""One checkpoint of a comparison, and its runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.formats.tensor import DTYPE_NAMES, FLOAT_DTYPES
from shardkit.measure.measurement import FIRST_TOKEN, LOAD, LoadMeasurement
from shardkit.measure.quantities import QUANTITIES

ORIGINAL, SHARDED = "original", "sharded"

_ASKED = ("dtype", "device", "generate", "prefetch", "memory_limit_bytes")
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
        return next((DTYPE_NAMES[dtype] for dtype in self.dtypes if dtype in FLOAT_DTYPES), None)

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
