"""What many loads of two checkpoints say: raw samples, ratios with intervals, a verdict in words."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from shardkit.base.errors import MeasurementError, ShardkitError
from shardkit.base.extras import require
from shardkit.base.record import Record, Summary, Table, plural, shown_path
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.quantities import Quantity, Ratio
from shardkit.measure.samples import ORIGINAL, Samples
from shardkit.show.plots import plot_comparison
from shardkit.show.report_page import carried, result_page

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Comparison(Samples, Record):
    """Checkpoints loaded in turn, `repeats` times each, and the verdict.

    Attributes
    ----------
    variants
        The original, which the others are compared with, the sharded, and any more.
    margin
        Smallest difference that matters: 0.05 for 5 %.
    samples, warm_ups
        Every run in the order it was made, raw.
    notes
        Warnings.
    most
        How many pairs there might have been where they were added until every verdict was decided, with
        intervals that allow for it (`shardkit.measure.intervals`); None where their number was fixed.
    """

    schema: ClassVar[int] = 2

    def _partial_failures(self) -> Iterator[str]:
        for name in self.names:
            ends = Counter(run.outcome for run in self._runs(name))
            bad = [f"{outcome} in {count}" for outcome, count in ends.items() if outcome != "ok"]
            if bad and name not in self.failures:
                runs = plural(ends.total(), "run")
                yield f"{name}: {' and '.join(bad)} of {runs}, figures are from the others"

    @property
    def verdict(self) -> str:
        """What the others do compared with the original, in words; variants are separated by "; "."""
        return "; ".join(self._verdicts())

    def _verdicts(self) -> list[str]:
        words = self._dead(self.names)
        if words:
            words += [f"{variant} loads" for variant in self.names if self.measurements(variant)]
        words += self._partial_failures()
        for name in self.names:
            lines = []
            if self.ratios_of(name):
                lines = [f"{q.label}: {said}" for q, said in self.found(name).items() if q in self.main]
            elif name != self.reference and self.measurements(name):
                lines = ["no pair in which both loaded"]
            words += [f"{name}{self._against}, {line}" for line in lines] if len(self.names) > 2 else lines
        return words or ["nothing was measured"]

    def _dead(self, names: Iterable[str]) -> list[str]:
        return [f"{name} does not load ({why})" for name, why in self.failures.items() if name in names]

    @property
    def _against(self) -> str:
        return "" if self.reference == ORIGINAL else f" against {self.reference}"

    def findings(self) -> dict[str, dict[str, str]]:
        """Return the verdict on each main quantity by variant, in words; where there is none, why."""
        findings = {}
        for name in self.names:
            if name != self.reference:
                dead, found = "; ".join(self._dead((self.reference, name))), self.found(name)
                words = {q.label: dead or str(found.get(q, "not measured")) for q in self.main}
                findings[f"{name}{self._against}"] = words
        return findings

    def explain(self, variant: str) -> str:
        """Say where a variant's figures come from: copied or mapped weights, read late or not."""
        return self.variant(variant).explain(self.measurements(variant), self.typical_runs.get(variant))

    def summary(self) -> Summary:
        """Return the verdict, all variants' times, and every quantity with its interval."""
        counted = self.samples or self.warm_ups
        caches = ", ".join(dict.fromkeys(f"{s.measurement.cache.asked} page cache" for s in counted))
        stacks = dict.fromkeys(s.measurement.stack() for s in counted)
        machines = dict.fromkeys(str(s.measurement.environment) for s in counted)
        margin = f"±{100 * self.margin:.3g} %"
        line = LoadMeasurement.start_line if self.reads_ahead else LoadMeasurement.time_line
        facts = (
            *(("verdict" if not line else "", words) for line, words in enumerate(self._verdicts())),
            *((f"{name}, a typical run", line(run)) for name, run in self.typical_runs.items()),
            *((f"{name}, means", self._means(name)) for name in self.names if self.failures),
            *((f"{variant.name} from", shown_path(variant.source)) for variant in self.variants),
            *((f"files of {name}", self.explain(name)) for name in self.names),
            ("measured", f"{self._pairs()} in ABBA order, one warm-up each, {caches}"),
            ("figures", f"geometric means over the pairs, whose log ratios give {self.law.words}"),
            ("verdicts", f"wrong in at most 5 % of comparisons (Holm); within {margin} is no difference"),
            ("stack", " | ".join(stacks) or "unknown"),
            ("machine", " | ".join(machines) or "unknown"),
        )  # fmt: skip
        tables = tuple(self._table(variant) for variant in self.names if self.ratios_of(variant))
        return Summary("Comparison of loads", facts, tables, tuple(self._warnings()))

    def _pairs(self) -> str:
        pairs = plural(len({sample.pair for sample in self.samples}), "pair")
        decided = "all is" if self.is_decided else "not all is"
        return pairs if self.most is None else f"{pairs} (of at most {self.most}; {decided} decided)"

    def _means(self, variant: str) -> str:
        """Return a variant's own figures, for when there is nothing to compare them with."""
        means = ((quantity, self.mean(variant, quantity.name)) for quantity in self.main)
        return ", ".join(f"{q.label} {q.format(value)}" for q, value in means if value is not None) or "none"

    def _table(self, variant: str) -> Table:
        rows = tuple(
            found.row() if isinstance(found, Ratio) else self._missing(variant, quantity, found)
            for quantity, found in self.found(variant).items()
        )
        columns = ("geometric mean", self.reference, variant, "difference (95 % interval)", "verdict")
        return Table(columns, rows)

    def _missing(self, variant: str, quantity: Quantity, why: str) -> tuple[str, ...]:
        means = (self.mean(name, quantity.name) for name in (self.reference, variant))
        return quantity.label, *map(quantity.format, means), "-", why

    def _warnings(self) -> Iterator[str]:
        yield from self.notes
        tokens = {s.measurement.token_ids for s in self.samples if s.measurement.ok}
        if any(one != other for pair in combinations(tokens, 2) for one, other in zip(*pair, strict=False)):
            yield "the variants generated different tokens for the fixed prompt"
        weak = Counter(warning for s in self.samples for warning in s.measurement.warnings())
        weak += Counter(f"{s.variant}: {s.measurement.outcome}" for s in self.samples if not s.measurement.ok)
        for what, count in weak.items():
            yield f"{count} of {plural(len(self.samples), 'run')}: {what}"
        for variant in self.failures:
            runs = [s.measurement for s in self.all_runs if s.variant == variant]
            if any(run.ok for run in runs):
                yield f"{variant} loaded in its warm-up"
            else:
                yield f"{variant} failed {'twice' if len(runs) > 1 else 'once'}, and was not run again"

    def to_frame(self) -> pd.DataFrame:
        """Return the raw samples, one row each; the pair of a warm-up is missing."""
        require("notebook", "a data frame", "pandas")
        import pandas as pd

        rows = [sample.row(self.variant(sample.variant)) for sample in self.all_runs]
        return pd.DataFrame(rows).convert_dtypes()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready data, with verdict and ratios for those who read the JSON alone."""
        ratios = {
            name: {q: {**asdict(ratio), "words": str(ratio)} for q, ratio in self.ratios_of(name).items()}
            for name in self.names
            if name != self.reference
        }
        return {**super().to_dict(), "verdict": self.verdict, "ratios": ratios}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything, raw samples included: as JSON, or as a card if the name ends in ``.html``.

        Raises
        ------
        MeasurementError
            If it cannot be written there.
        """
        is_card = os.fspath(path).lower().endswith((".html", ".htm"))
        text = self.to_html() if is_card else json.dumps(self.to_dict()) + "\n"
        part = Path(f"{os.fspath(path)}.part")  # an earlier result stays until the new one is complete
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise MeasurementError(f"{os.fspath(path)} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the comparison that `save` wrote, or that a card (`to_html`) carries.

        Raises
        ------
        MeasurementError
            If the file is neither.
        ShardkitError
            If it holds something else, or another version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(carried(text) or text)
        except (OSError, ValueError, RecursionError) as error:
            raise MeasurementError(f"{os.fspath(path)} cannot be read as a comparison: {error}") from error
        try:
            found = cls.from_dict(data if isinstance(data, dict) else {})
            str(found)
        except ShardkitError as error:
            raise ShardkitError(f"{os.fspath(path)}: {error}") from None
        except (ArithmeticError, AttributeError, ValueError) as error:
            raise ShardkitError(f"{os.fspath(path)}: its figures make no sense: {error}") from None
        return found

    def to_html(self) -> str:
        """Return one HTML page with figures, pictures and raw data that needs no other file, to share."""
        return result_page(self, self.summary(), self.to_dict())

    def plot(self, path: str | os.PathLike[str] | None = None, ax: Any = None) -> Any:
        """Draw times, peaks and memory curves, on three axes if given; save them (``.png``, ``.svg``).

        Returns
        -------
        The three axes: times, peaks, curves.
        """
        return plot_comparison(self, path, ax)


def merge_comparisons(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """Return the raw samples of many results (or of one), saved as JSON or as cards, in one frame.

    Returns
    -------
    As `Comparison.to_frame`, with the name of the file each comes from in the first column.

    Raises
    ------
    MeasurementError
        If there is none, or one cannot be read.

    Examples
    --------
    >>> merge_comparisons(["comparison.json"])["file"].unique().tolist()
    ['comparison.json']
    """
    frames = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        frame = Comparison.load(path).to_frame()
        frame.insert(0, "file", os.fspath(path))
        frames.append(frame)
    if not frames:
        raise MeasurementError("no results to merge: give the files that `save` or `to_html` wrote")
    import pandas as pd

    return pd.concat(frames, ignore_index=True)
