"""What was written, lost, left out and proven, as a person and a program read it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from shardkit.base.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.formats.names import is_weights
from shardkit.shard.copy import Lost
from shardkit.shard.verify import Verification, read_from

_SHOWN_LOSSES = 3


@dataclass(frozen=True)
class ShardReport(Record):
    """What was written.

    Attributes
    ----------
    source, destination
        Where from, where to.
    files
        The shards with their sizes in bytes.
    tensors, nbytes
        How many tensors were written, and their bytes.
    dtype
        What floating-point tensors were cast to; None where bytes were copied.
    kept
        Tensors that the cast left in the dtype they are stored in, with that dtype: see `ShardPlan.kept`.
    lost
        Tensors of which the cast made some values infinite or zero, with counts.
    reused
        Shards that an earlier run of the same job had finished.
    side_files
        All other files that were copied, with sizes in bytes.
    left_out
        Files that stayed behind, and why.
    verification
        The proof; None where it was not asked for.
    copy_seconds, seconds
        Time to write and sync the shards; time in all.
    notes
        What a person should be told.
    """

    source: str
    destination: str
    files: dict[str, int]
    tensors: int
    nbytes: int
    dtype: str | None
    lost: tuple[Lost, ...]
    reused: tuple[str, ...]
    side_files: dict[str, int]
    left_out: dict[str, str]
    verification: Verification | None
    copy_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)

    def _verified(self) -> str:
        if (check := self.verification) is None:
            return "no"
        to_what = " to what was received" if check.received else ""
        where = ", read back from the disk" if check.is_from_disk else ""
        return f"equal{to_what}, {check.tensors:,} tensors in {check.seconds:.2f} s{where}"

    def summary(self) -> Summary:
        """Return the report as a person reads it."""
        new = sum(nbytes for file, nbytes in self.files.items() if file not in self.reused)
        rate = f", {format_size(new / max(self.copy_seconds, 1e-9))}/s" if new else ""
        facts: tuple[tuple[str, str], ...] = (
            ("source", shown_path(self.source)),
            ("destination", shown_path(self.destination)),
            ("written", f"{format_size(self.nbytes)} in {plural(len(self.files), 'file')}"),
            ("dtype", f"cast to {self.dtype}" if self.dtype else "as in the source"),
            ("write time", f"{self.copy_seconds:.2f} s{rate}"),
            ("verified", self._verified()),
            ("also copied", self._also_copied()),
        )
        if self.verification is not None and self.verification.model is not None:
            facts += (("model", str(self.verification.model)),)
        facts += (
            ("reused", f"{len(self.reused)} of {plural(len(self.files), 'file')}: {listed(self.reused)}"),
        ) * bool(self.reused)
        if self.dtype:
            infinite, zero = (sum(getattr(x, of) for x in self.lost) for of in ("overflowed", "flushed"))
            words = f"{plural(infinite, 'value')} became infinite, {zero:,} became zero"
            facts += (("cast losses", f"{words}, in {plural(len(self.lost), 'tensor')}"),)
        worst = sorted(self.lost, key=lambda x: (-x.overflowed, -x.flushed))[:_SHOWN_LOSSES]
        rows = tuple((x.tensor, f"{x.overflowed:,}", f"{x.flushed:,}") for x in worst)
        lost = (Table(("most losses in", "became infinite", "became zero"), rows),) if rows else ()
        notes = self.notes
        if (check := self.verification) and check.files and not check.is_from_disk:
            notes += (f"when read back: {read_from(check.files, check.files_in_memory)}",)
        return Summary("Sharded checkpoint", facts, lost, notes)

    def _also_copied(self) -> str:
        weights = [file for file in self.side_files if is_weights(os.path.basename(file))]
        count = f"{plural(len(self.side_files), 'file')}, {format_size(sum(self.side_files.values()))}"
        if not weights:
            return f"{count}: {listed(self.side_files)}" if self.side_files else "nothing"
        return f"{count}, including weights: {listed(weights)}"
