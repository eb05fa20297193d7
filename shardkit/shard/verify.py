"""Proof that two checkpoints hold the same tensors, however they are laid out.

Every tensor of both sides is read and digested (XXH3, 128 bits) by itself: the digest depends on its bytes
alone, not on its file, its offset or its neighbours. Where the copy has another floating-point dtype, the
cast is computed again from the source, and the copy has to hold exactly that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import xxhash

from shardkit.base import pages
from shardkit.base.jobs import Crew, ProgressCallback, ProgressCount, run_all, worker_count
from shardkit.base.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.checkpoint.belonging import is_needed, named_files
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import read_json
from shardkit.formats.tensor import CAST_DTYPES, DTYPE_NAMES, FLOAT_DTYPES, TensorInfo
from shardkit.load.look import config_differences
from shardkit.load.seen import ModelKeys, model_keys
from shardkit.plan.plan import PlannedTensor, Shard, ShardPlan
from shardkit.shard.copy import Outcome, Range, Received, cast_chunks, tensor_range, whole_file
from shardkit.sources.local import LocalFiles

_BATCH_BYTES = 32 << 20
_BATCH_TENSORS = 512
_SHOWN = 20


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
        Whether the source was read once only, from the Hub, and the destination was held against the digests
        that were taken of its bytes as they arrived.
    model
        What a model gets from either side, by transformers' own account.
    missing_files, changed_files
        Files of the source that a load needs (config, tokenizer, code, further weights, what these name), and
        that the destination lacks, or has with another content.
    files, files_in_memory
        How many files were read on this machine, and how many of them were in memory, so that what the disk
        holds was not proven; None where the system does not show that.
    """

    source: str
    destination: str
    tensors: int
    nbytes: int
    cast: int
    mismatches: tuple[Mismatch, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    digests: dict[str, str] = field(repr=False)
    seconds: float
    received: bool = False
    model: ModelKeys | None = None
    missing_files: tuple[str, ...] = ()
    changed_files: tuple[str, ...] = ()
    files: int = 0
    files_in_memory: int | None = None

    @property
    def equal(self) -> bool:
        """Whether the destination holds the source's tensors and nothing else, and a model gets the same."""
        differs = self.model is not None and self.model.differences
        return not (self.mismatches or self.missing or self.extra or differs or self._files_apart)

    @property
    def why_unequal(self) -> str:
        """What differs, in a line: tensors, or else files or what a model gets; empty if nothing does."""
        if wrong := [m.tensor for m in self.mismatches] + [*self.missing, *self.extra]:
            return f"{plural(len(wrong), 'tensor')} differ{'s' * (len(wrong) == 1)} ({listed(wrong)})"
        if self._files_apart:
            return f"all tensors are equal, but files are missing or changed: {listed(self._files_apart)}"
        return f"all tensors are equal, but {self.model}" if not self.equal else ""

    @property
    def _files_apart(self) -> tuple[str, ...]:
        return self.missing_files + self.changed_files

    def _result(self) -> str:
        if not self.equal:
            return "NOT EQUAL"
        if self.received:
            return "equal to what was received" + ", after its cast" * bool(self.cast)
        return "equal to the cast of the source" if self.cast else "equal"

    @property
    def is_from_disk(self) -> bool:
        """Whether every file on this machine was seen to be read from its disk."""
        return bool(self.files) and self.files_in_memory == 0

    def summary(self) -> Summary:
        """Return the finding as a person reads it."""
        facts: tuple[tuple[str, str], ...] = (
            ("source", shown_path(self.source)),
            ("destination", shown_path(self.destination)),
            ("result", self._result()),
            ("tensors", f"{self.tensors:,} compared, {format_size(self.nbytes)}"),
        )
        if self.cast:
            facts += (("cast", f"{plural(self.cast, 'tensor')} compared with the cast computed again"),)
        if self.model is not None:
            facts += (("model", str(self.model)),)
        facts += (("missing files", listed(self.missing_files)),) * bool(self.missing_files)
        facts += (("changed files", listed(self.changed_files)),) * bool(self.changed_files)
        facts += (("read", read_from(self.files, self.files_in_memory)),) * bool(self.files)
        facts += (("missing", listed(self.missing)),) * bool(self.missing)
        facts += (("extra", listed(self.extra)),) * bool(self.extra)
        rows = tuple((m.tensor, m.reason) for m in self.mismatches[:_SHOWN])
        tables = (Table(("tensor", "differs in"), rows),) if rows else ()
        rest = len(self.mismatches) - len(rows)
        notes = (f"{plural(rest, 'more tensor')} differ{'s' * (rest == 1)}",) * bool(rest)
        if self.cast and self.mismatches:
            notes += ("if the second is the source of the cast, swap them",)
        return Summary("Verification", facts, tables, notes)


def read_from(files: int, in_memory: int | None) -> str:
    """Say where files were read from: as `Verification.files` and `files_in_memory`."""
    if in_memory == 0:
        return "from the disk"
    known = f"{in_memory} of {plural(files, 'file')} in memory"
    unknown = "this system does not show whether files were in memory"
    return f"{unknown if in_memory is None else known}: contents on disk not proven"


def verify_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    destination: str | os.PathLike[str] | Checkpoint,
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> Verification:
    """Compare two checkpoints tensor by tensor, reading every byte of both.

    Parameters
    ----------
    source, destination
        Folders, files, models on the Hub (streamed completely) or open checkpoints. Their order matters only
        after a cast, which is computed from `source`.
    workers, executor
        Threads to read with (default: up to four), or an executor of your own, all of whose workers are used.
    progress
        Called with a `Progress`; returning False stops.

    Raises
    ------
    CheckpointError
        If either side cannot be read. That they differ is a result, not an error.
    """
    crew = Crew(worker_count(workers, executor), executor, progress)
    ours, theirs = (s if isinstance(s, Checkpoint) else Checkpoint.open(s) for s in (source, destination))
    found = verify_weights(ours, theirs, crew)
    if any(side.config is None and os.path.isfile(side.source) for side in (ours, theirs)):
        return found  # of a file alone, what lies beside it is none of its business
    missing, both = _files_of_both(ours, theirs)
    changed = tuple(file for file in both if _is_changed(file, ours, theirs, crew))
    return replace(found, missing_files=missing, changed_files=changed)


def verify_weights(ours: Checkpoint, theirs: Checkpoint, crew: Crew) -> Verification:
    """Compare the tensors of two checkpoints, and what a model gets from them; no other files."""
    with model_keys(ours, theirs) as answer:
        return _judged(replace(compare_tensors(ours, theirs, crew), model=answer()), ours, theirs)


def _judged(found: Verification, ours: Checkpoint, theirs: Checkpoint) -> Verification:
    """Add what differs where all tensors are equal: the dtype that a load chooses."""
    if not found.cast and ours.auto_dtype != theirs.auto_dtype and ours.config is not None:
        dtypes = Mismatch("dtype", f"a load chooses {ours.auto_dtype}, but {theirs.auto_dtype} for the copy")
        return replace(found, mismatches=(*found.mismatches, dtypes))
    return found


def compare_tensors(ours: Checkpoint, theirs: Checkpoint, crew: Crew) -> Verification:
    """Compare the tensors of two checkpoints; as `verify_checkpoint`, which also asks what a model gets."""
    start = time.perf_counter()
    pairs = _pairs(ours, theirs)
    comparable = [pair for pair in pairs if pair.obstacle is None]
    ours.confirm(), theirs.confirm()
    ranges = [
        (tensor_range(ours.place, left, right.dtype), tensor_range(theirs.place, right, right.dtype))
        for left, right in comparable
    ]
    paths = (side.place.path(file) for side in (ours, theirs) for file in side.files)
    here = list(filter(None, paths))
    in_memory = pages.mostly_resident(here)
    digests = digest_pairs(ranges, crew, "verify")
    mismatches = [Mismatch(pair.ours.name, pair.obstacle) for pair in pairs if pair.obstacle]
    mismatches += [
        Mismatch(pair.ours.name, f"bytes: digest {a[:12]} in the source, {b[:12]} in the destination")
        for pair, (a, b) in zip(comparable, digests, strict=True)
        if a != b
    ]
    found = {pair.ours.name: digest for pair, (_, digest) in zip(comparable, digests, strict=True)}
    finding = _verification(ours, theirs, mismatches, found, start)
    return replace(finding, files=len(here), files_in_memory=in_memory)


def _verification(
    ours: Checkpoint,
    theirs: Checkpoint,
    mismatches: Sequence[Mismatch],
    digests: dict[str, str],
    start: float,
) -> Verification:
    pairs = _pairs(ours, theirs)
    return Verification(
        source=ours.source,
        destination=theirs.source,
        tensors=len(pairs),
        nbytes=sum(pair.ours.nbytes for pair in pairs),
        cast=sum(pair.obstacle is None and pair.ours.dtype != pair.theirs.dtype for pair in pairs),
        mismatches=tuple(mismatches),
        missing=tuple(name for name in ours.tensors if name not in theirs.tensors),
        extra=tuple(name for name in theirs.tensors if name not in ours.tensors),
        digests=digests,
        seconds=time.perf_counter() - start,
    )


def _files_of_both(ours: Checkpoint, theirs: Checkpoint) -> tuple[tuple[str, ...], list[str]]:
    """Return which files that a load needs the destination lacks, and which both sides have."""
    named = named_files(ours.place, ours.config)
    needed = [file for file in ours.side_files if is_needed(file, named)]
    missing = tuple(file for file in needed if file not in theirs.side_files)
    return missing, [file for file in needed if file in theirs.side_files and file != ours.config_file]


def _is_changed(file: str, ours: Checkpoint, theirs: Checkpoint, crew: Crew) -> bool:
    sides = ours, theirs
    if file.endswith(".json"):  # which tools write in ways of their own
        documents = [{"": read_json(side.place, file)} for side in sides]
        return bool(config_differences(documents[0], documents[1]))
    sizes = [side.side_files[file] for side in sides]
    if sizes[0] != sizes[1]:
        return True
    first, second = (whole_file(side.place.fetched(file), sizes[0]) for side in sides)
    ((ours_digest, theirs_digest),) = digest_pairs([(first, second)], replace(crew, progress=None), "verify")
    return ours_digest != theirs_digest


def damaged(
    checkpoint: Checkpoint, plan: ShardPlan, outcomes: Mapping[str, Outcome], folder: Path, crew: Crew
) -> list[str]:
    """Return which of the shard files in `folder` do not hold just what the source gives, or has given."""
    if checkpoint.place.folder is None:
        return list(_altered_parts(plan, outcomes, folder, crew, "check"))
    shards = [shard for shard in plan.shards if shard.file in outcomes]
    wrong = {s.file for s in shards if not _has_header(folder / s.file, plan.header(s))}
    planned = [(s, tensor) for s in shards if s.file not in wrong for tensor in s.tensors]
    ranges = [
        (tensor_range(checkpoint.place, tensor.source, tensor.dtype), staged_range(folder, shard, tensor))
        for shard, tensor in planned
    ]
    digests = digest_pairs(ranges, crew, "check")
    wrong |= {shard.file for (shard, _), (a, b) in zip(planned, digests, strict=True) if a != b}
    return sorted(wrong)


def _has_header(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def staged_range(folder: Path, shard: Shard, planned: PlannedTensor) -> Range:
    """Return where the bytes of a tensor are in its shard file in `folder`."""
    offset, name = shard.header_bytes + planned.begin, planned.source.name
    return Range(
        LocalFiles(folder), shard.file, offset, planned.nbytes, 0, name, planned.dtype, planned.dtype
    )


def _altered_parts(
    plan: ShardPlan, outcomes: Mapping[str, Outcome], folder: Path, crew: Crew, stage: str
) -> dict[str, list[Received]]:
    """Read shard files back that were made from ranged reads; return, by file, what is not as received.

    A file with another header, or of which not all was received, is in it whole.
    """
    shards = [shard for shard in plan.shards if shard.file in outcomes]
    altered: dict[str, list[Received]] = {}
    parts: list[tuple[str, Received]] = []
    for shard in shards:
        path, whole = folder / shard.file, sorted(outcomes[shard.file].received, key=attrgetter("offset"))
        ends = [shard.header_bytes, *(part.offset + part.nbytes for part in whole)]
        if [*(part.offset for part in whole), shard.nbytes] == ends and _has_header(path, plan.header(shard)):
            parts += [(shard.file, part) for part in whole]
        else:
            altered[shard.file] = [Received(0, shard.nbytes, "")]
    files = LocalFiles(folder)
    ranges = [Range(files, file, p.offset, p.nbytes, 0, file, "U8", "U8") for file, p in parts]
    digests = _digest_all(ranges, crew, stage)
    for (file, part), digest in zip(parts, digests, strict=True):
        if digest != part.digest:
            altered.setdefault(file, []).append(part)
    return altered


def verify_written(
    checkpoint: Checkpoint, plan: ShardPlan, outcomes: Mapping[str, Outcome], folder: Path, crew: Crew
) -> Verification:
    """Verify shards that were written in `folder`: against the source, or against what was received of it."""
    copy = written(folder, plan)
    if checkpoint.place.folder is not None:
        return verify_weights(checkpoint, copy, crew)
    return _verify_received(checkpoint, plan, outcomes, folder, copy, crew)


def _verify_received(
    checkpoint: Checkpoint,
    plan: ShardPlan,
    outcomes: Mapping[str, Outcome],
    folder: Path,
    copy: Checkpoint,
    crew: Crew,
) -> Verification:
    """Verify shards that were made from ranged reads, without reading the source again.

    Every byte of the files is read back and held against the digest that was taken of it when it arrived
    (after its cast, where there was one). What arrived is what the Hub sent for that range of that commit;
    that the Hub sent what it holds rests on the connection: `verify_checkpoint` reads it again.
    """
    start = time.perf_counter()
    altered = _altered_parts(plan, outcomes, folder, crew, "verify")
    ranges = [tensor_range(copy.place, tensor, tensor.dtype) for tensor in copy.tensors.values()]
    digests = _digest_all(ranges, crew, "verify")
    mismatches = [
        Mismatch(planned.source.name, "bytes: differ from what was received")
        for shard in plan.shards
        for planned in shard.tensors
        if any(_overlaps(shard, planned, part) for part in altered.get(shard.file, ()))
    ]
    found = dict(zip(copy.tensors, digests, strict=True))
    verified = replace(_verification(checkpoint, copy, mismatches, found, start), received=True)
    with model_keys(checkpoint, copy) as answer:
        return _judged(replace(verified, model=answer()), checkpoint, copy)


def written(folder: Path, plan: ShardPlan) -> Checkpoint:
    """Open what a plan has written, also where a load of the folder would choose weights that came along."""
    copy = Checkpoint.open(folder)
    if set(copy.files) == {shard.file for shard in plan.shards}:
        return copy
    return Checkpoint.open(folder / (plan.index_file or plan.shards[0].file))


def _overlaps(shard: Shard, planned: PlannedTensor, part: Received) -> bool:
    begin = shard.header_bytes + planned.begin
    return begin < part.offset + part.nbytes and part.offset < begin + planned.nbytes


class _Pair(NamedTuple):
    ours: TensorInfo
    theirs: TensorInfo

    @property
    def obstacle(self) -> str | None:
        """Why the bytes need not be compared: they cannot be equal."""
        ours, theirs = self
        if ours.shape != theirs.shape:
            return f"shape: {list(ours.shape)} in the source, {list(theirs.shape)} in the destination"
        is_cast = ours.dtype in FLOAT_DTYPES and theirs.dtype in CAST_DTYPES.values()
        if ours.dtype != theirs.dtype and not is_cast:
            names = DTYPE_NAMES[ours.dtype], DTYPE_NAMES[theirs.dtype]
            return "dtype: {} in the source, {} in the destination".format(*names)
        return None


def _pairs(ours: Checkpoint, theirs: Checkpoint) -> list[_Pair]:
    found = ((tensor, theirs.tensors.get(name)) for name, tensor in ours.tensors.items())
    return [_Pair(left, right) for left, right in found if right]


def _batches(ranges: Sequence[Range]) -> Iterator[Sequence[Range]]:
    """Yield what is read by one task: small tensors together, large ones alone."""
    first = size = 0
    for end, part in enumerate(ranges, start=1):
        size += part.nbytes
        if size >= _BATCH_BYTES or end - first >= _BATCH_TENSORS or end == len(ranges):
            yield ranges[first:end]
            first, size = end, 0


def digest_pairs(pairs: Sequence[tuple[Range, Range]], crew: Crew, stage: str) -> list[tuple[str, str]]:
    """Return the digests of ranges of both sides."""
    digests = _digest_all([first for first, _ in pairs] + [second for _, second in pairs], crew, stage)
    return list(zip(digests[: len(pairs)], digests[len(pairs) :], strict=True))


def _digest_all(ranges: Sequence[Range], crew: Crew, stage: str) -> list[str]:
    count = ProgressCount(crew.progress if ranges else None, stage, sum(part.nbytes for part in ranges))
    digests: dict[Range, str] = {}
    with run_all(digest_ranges, _batches(ranges), crew.workers, crew.executor) as results:
        for batch, found in results:
            digests.update(zip(batch, found, strict=True))
            count.add(sum(part.nbytes for part in batch))
    return [digests[part] for part in ranges]


def digest_ranges(batch: Sequence[Range]) -> list[str]:
    """Return the XXH3-128 of each range, after its cast."""
    return [digest_range(part) for part in batch]


def digest_range(part: Range) -> str:
    """Return the XXH3-128 of a range, after its cast."""
    digest = xxhash.xxh3_128()
    for chunk, _, _ in cast_chunks(part):
        digest.update(chunk)
    return digest.hexdigest()
