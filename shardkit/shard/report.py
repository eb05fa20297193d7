"""What was written, lost, left out and proven, as a person and a program read it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from shardkit.base.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.formats.names import is_weights
from shardkit.load.seen import ModelKeys
from shardkit.shard.tasks import Lost

_SHOWN_LOSSES = 3
_SHOWN_MISMATCHES = 20


AUTO_DTYPE = "dtype"  # in place of a tensor: which one a load chooses differs


@dataclass(frozen=True)
class Mismatch:
    """A tensor that differs, and how: its dtype, its shape, or its bytes."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class Verification(Record):
    """What a comparison of two checkpoints found.

    Attributes
    ----------
    source, destination
        What was compared.
    tensors, nbytes
        How many tensors were found on both sides, and the bytes of them in the source.
    cast
        How many of them have another floating-point dtype in the destination, and hold just what the
        cast of the source gives.
    mismatches, missing, extra
        Tensors that differ; that only the source has; that only the destination has.
    digests
        XXH3-128 by tensor, of the bytes in the destination.
    seconds
        How long it took.
    received
        Whether the source was read once only, from the Hub, and the destination was compared with the digests
        that were taken of its bytes as they arrived.
    freed
        Whether the source was freed: each tensor was compared with it before, and in the end with the digest
        that was taken then, which `digests` has.
    model
        What a model gets from either side, by transformers' own account.
    missing_files, changed_files
        Files of the source that a load needs (config, tokenizer, code, further weights, what these name), and
        that the destination lacks, or has with another content.
    files, files_in_memory
        How many files were read on this machine, and how many of them were in memory, so that what the disk
        holds was not proven; None where the system does not show that, or other machines have read them.
    """

    source: str
    destination: str
    tensors: int
    nbytes: int
    cast: int
    digests: dict[str, str] = field(repr=False)
    seconds: float
    mismatches: tuple[Mismatch, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    received: bool = False
    model: ModelKeys | None = None
    missing_files: tuple[str, ...] = ()
    changed_files: tuple[str, ...] = ()
    files: int = 0
    files_in_memory: int | None = None
    freed: bool = False

    @property
    def equal(self) -> bool:
        """Whether the destination holds the source's tensors and nothing else, and a model gets the same."""
        differs = self.model is not None and self.model.differences
        return not (self.mismatches or self.missing or self.extra or differs or self._files_apart)

    @property
    def why_unequal(self) -> str:
        """What differs, in a line: tensors, or else files or what a model gets; empty if nothing does."""
        wrong = [m.tensor for m in self.mismatches if m.tensor != AUTO_DTYPE] + [*self.missing, *self.extra]
        if self.mismatches and not wrong:
            return f"{self.mismatches[0].reason}: request a dtype"
        if wrong:
            return f"{plural(len(wrong), 'tensor')} differ{'s' * (len(wrong) == 1)} ({listed(wrong)})"
        if self._files_apart:
            return f"all tensors are equal, but files are missing or changed: {listed(self._files_apart)}"
        return f"all tensors are equal, but {self.model}" if not self.equal else ""

    @property
    def is_perhaps_swapped(self) -> bool:
        """Whether so much differs after a cast that the source may have been given as the copy."""
        return bool(self.cast) and len(self.mismatches) > self.cast // 2

    @property
    def is_perhaps_another(self) -> bool:
        """Whether no tensor is in both, or one has another shape: it may be a copy of another model."""
        return not self.tensors or any(mismatch.reason.startswith("shape") for mismatch in self.mismatches)

    @property
    def _files_apart(self) -> tuple[str, ...]:
        return self.missing_files + self.changed_files

    def _result(self) -> str:
        if not self.equal:
            return "NOT EQUAL"
        if self.freed:
            return "equal, compared with the source before it was freed"
        if self.received:
            return "equal to what was received" + ", after its cast" * bool(self.cast)
        return "equal to the cast of the source" if self.cast else "equal"

    @property
    def is_from_disk(self) -> bool:
        """Whether every file on this machine was seen to be read from its disk."""
        return bool(self.files) and self.files_in_memory == 0

    def _read(self) -> str:
        again = "; verify again after a restart of the machine to read the disk" * bool(self.files_in_memory)
        return read_from(self.files, self.files_in_memory) + again if self.files else ""

    def summary(self) -> Summary:
        """Return the finding as a person reads it."""
        cast = f"{plural(self.cast, 'tensor')} compared with the cast computed again" if self.cast else ""
        facts = (
            ("source", shown_path(self.source)),
            ("destination", shown_path(self.destination)),
            ("result", self._result()),
            ("tensors", f"{self.tensors:,} compared, {format_size(self.nbytes)}"),
            ("cast", cast),
            ("model", str(self.model or "")),
            ("missing files", listed(self.missing_files)),
            ("changed files", listed(self.changed_files)),
            ("read", self._read()),
            ("missing", listed(self.missing)),
            ("extra", listed(self.extra)),
        )
        rows = tuple((m.tensor, m.reason) for m in self.mismatches[:_SHOWN_MISMATCHES])
        tables = (Table(("tensor", "differs in"), rows),) if rows else ()
        rest = len(self.mismatches) - len(rows)
        notes = (f"{plural(rest, 'more tensor')} differ{'s' * (rest == 1)}",) * bool(rest)
        if self.is_perhaps_swapped:
            notes += ("if the second is the source of the cast, swap them",)
        return Summary("Verification", tuple(fact for fact in facts if fact[1]), tables, notes)


def read_from(files: int, in_memory: int | None) -> str:
    """Say where files were read from: as `Verification.files` and `files_in_memory`."""
    if in_memory == 0:
        return "from the disk"
    known = f"{in_memory} of {plural(files, 'file')} in memory"
    unknown = "this system does not show whether files were in memory"
    return f"{unknown if in_memory is None else known}: contents on disk not proven"


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
        Shards that other runs of the same job had finished: earlier ones, or those of other parts.
    side_files
        All other files that were copied, with sizes in bytes.
    left_out
        Files that stayed behind, and why.
    verification
        The proof; None where it was not asked for.
    copy_seconds, seconds
        Time to write and sync the shards; time in all.
    notes
        What a person should know.
    freed
        Files of the source that were removed, with the sizes in bytes that they had.
    peak_bytes, before_bytes
        Largest resident memory of this process from the call to its end, with that of worker processes of an
        executor; and what it held already when it was called. None where the kernel does not say. The check
        of what a model gets, which imports transformers, has a process of its own and is not in it.
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
    peak_bytes: int | None = None
    before_bytes: int | None = None
    freed: dict[str, int] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return self.destination  # so that it can be given wherever a checkpoint is

    def summary(self) -> Summary:
        """Return the report as a person reads it."""
        new = sum(nbytes for file, nbytes in self.files.items() if file not in self.reused)
        rate = f", {format_size(new / max(self.copy_seconds, 1e-9))}/s" if new else ""
        written = f"{format_size(new if self.reused else self.nbytes)} in "
        written += plural(len(self.files) - len(self.reused), "file")
        reused = f"{len(self.reused)} of {plural(len(self.files), 'file')}: {listed(self.reused)}"
        infinite, zero = (sum(getattr(x, of) for x in self.lost) for of in ("overflowed", "flushed"))
        losses = f"{plural(infinite, 'value')} became infinite, {zero:,} became zero"
        check = self.verification
        facts = (
            ("source", shown_path(self.source)),
            ("destination", shown_path(self.destination)),
            ("written", written),
            ("dtype", f"cast to {self.dtype}" if self.dtype else "as in the source"),
            ("write time", f"{self.copy_seconds:.2f} s{rate}; {self.seconds:.2f} s in all"),
            ("memory", self._memory()),
            ("verified", self._verified()),
            ("also copied", self._also_copied()),
            ("model", str(check.model or "") if check else ""),
            ("reused", reused if self.reused else ""),
            ("cast losses", f"{losses}, in {plural(len(self.lost), 'tensor')}" if self.dtype else ""),
        )
        worst = sorted(self.lost, key=lambda x: (-x.overflowed, -x.flushed))[:_SHOWN_LOSSES]
        rows = tuple((x.tensor, f"{x.overflowed:,}", f"{x.flushed:,}") for x in worst)
        lost = (Table(("most losses in", "became infinite", "became zero"), rows),) if rows else ()
        notes = self.notes
        if check and check.files and not check.is_from_disk:
            notes += (f"when read back: {read_from(check.files, check.files_in_memory)}",)
        return Summary("Sharded checkpoint", tuple(fact for fact in facts if fact[1]), lost, notes)

    def _memory(self) -> str:
        if self.peak_bytes is None or self.before_bytes is None:
            return "peak not reported by this system"
        return (
            f"{format_size(self.peak_bytes)} at most, {format_size(self.before_bytes)} of it before the start"
        )

    def _verified(self) -> str:
        if (check := self.verification) is None:
            return "no"
        to_what = (
            " to what was received" if check.received else " to the source before it was freed" * check.freed
        )
        where = ", read back from the disk" if check.is_from_disk else ""
        return f"equal{to_what}, {check.tensors:,} tensors in {check.seconds:.2f} s{where}"

    def _also_copied(self) -> str:
        weights = [file for file in self.side_files if is_weights(os.path.basename(file))]
        count = f"{plural(len(self.side_files), 'file')}, {format_size(sum(self.side_files.values()))}"
        if not weights:
            return f"{count}: {listed(self.side_files)}" if self.side_files else "nothing"
        return f"{count}, including weights: {listed(weights)}"
