"""Carry out a plan: a destination is absent or whole.

Everything is written in a staging folder beside the destination, synced, and renamed into place at the
end. What a killed run has finished there is used by the next one, if source and plan are the same.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from shardkit.base import pages
from shardkit.base.errors import CastError, DownloadNeededError, VerificationError
from shardkit.base.jobs import (
    Crew,
    ProgressCallback,
    ProgressCount,
    resumable,
    run_all,
    take_turns,
    worker_count,
)
from shardkit.base.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.checkpoint.belonging import needed_files
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import adapted_config, config_dtype
from shardkit.formats.names import is_weights
from shardkit.plan.plan import Shard, ShardPlan, Strategy, plan_shards
from shardkit.shard.copy import Lost, Outcome, Task, file_tasks, run_task, shard_tasks, whole_file
from shardkit.shard.destination import check_free, resolve
from shardkit.shard.staging import Staging, staging
from shardkit.shard.verify import (
    Verification,
    altered_parts,
    damaged_shards,
    digest_pairs,
    read_from,
    verify_received,
    verify_weights,
    written,
)

_SHOWN_LOSSES = 3
_STREAMED = "made from ranged reads of the Hub: the source was not downloaded"


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
        rate = format_size(self.nbytes / max(self.copy_seconds, 1e-9))
        facts: tuple[tuple[str, str], ...] = (
            ("source", shown_path(self.source)),
            ("destination", shown_path(self.destination)),
            ("written", f"{format_size(self.nbytes)} in {plural(len(self.files), 'file')}"),
            ("dtype", f"cast to {self.dtype}" if self.dtype else "as in the source"),
            ("written in", f"{self.copy_seconds:.2f} s, {rate}/s"),
            ("verified", self._verified()),
            ("also copied", self._also_copied()),
        )
        if self.verification is not None and self.verification.model is not None:
            facts += (("model", str(self.verification.model)),)
        facts += (("reused", listed(self.reused)),) * bool(self.reused)
        if self.dtype:
            infinite, zero = (sum(getattr(x, of) for x in self.lost) for of in ("overflowed", "flushed"))
            words = f"{plural(infinite, 'value')} became infinite, {zero:,} became zero"
            facts += (("lost in the cast", f"{words}, in {plural(len(self.lost), 'tensor')}"),)
        worst = sorted(self.lost, key=lambda x: (-x.overflowed, -x.flushed))[:_SHOWN_LOSSES]
        rows = tuple((x.tensor, f"{x.overflowed:,}", f"{x.flushed:,}") for x in worst)
        lost = (Table(("most was lost in", "became infinite", "became zero"), rows),) if rows else ()
        notes = self.notes
        if (check := self.verification) and check.files and not check.is_from_disk:
            notes += (f"when read back: {read_from(check.files, check.files_in_memory)}",)
        return Summary("Sharded checkpoint", facts, lost, notes)

    def _also_copied(self) -> str:
        weights = [file for file in self.side_files if is_weights(os.path.basename(file))]
        count = f"{plural(len(self.side_files), 'file')}, {format_size(sum(self.side_files.values()))}"
        if not weights:
            return f"{count}: {listed(self.side_files)}" if self.side_files else "nothing"
        return f"{count}, weights among them: {listed(weights)}"


@resumable()
def shard_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "2GB",
    strategy: Strategy = "size",
    dtype: object = None,
    workers: int | None = None,
    executor: Executor | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    allow_overflow: bool = False,
    stream: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> ShardReport:
    """Rewrite a checkpoint as shards that plain `from_pretrained` loads, without loading it.

    Parameters
    ----------
    source
        A folder, a weights file, or a model on the Hub ("org/name", "org/name@revision").
    destination
        A folder that does not exist, or is empty.
    max_shard_size, strategy, dtype
        As in `plan_shards`.
    workers
        How many files are written at once (default: up to four, or as many as the executor has workers).
    executor
        A `concurrent.futures` executor to use instead of threads of our own.
    overwrite
        Replace a destination that holds a checkpoint, once the new one is whole.
    resume
        Use the shards that an earlier, interrupted run of the same job has finished.
    verify
        Read both sides again and compare every tensor before the destination appears; of a model that is
        streamed, read the destination back and compare it with what was received. The shards are dropped from
        memory first, so that it is the disk that is read; the report says where that was not possible.
    allow_overflow
        Let a cast turn finite values into infinities.
    stream
        Make the shards of a model on the Hub straight from ranged reads, so that the source never lies on
        this disk. False downloads it first; None does so where the disk has room for both.
    revision, token
        For the Hub, as in `Checkpoint.open`.
    progress
        Called with a `Progress`; returning False stops the job, which can be resumed.

    Raises
    ------
    CheckpointError, PlanError, SizeError
        If the source is not a sound checkpoint, or the plan cannot be made.
    DestinationError, SpaceError
        If the destination exists, overlaps the source, or does not fit on its disk.
    CastError
        If a cast makes finite values infinite; names the tensors.
    VerificationError
        If what was written is not what the source holds.
    Cancelled
        If `progress` returned False.
    """
    start, crew = time.perf_counter(), Crew(worker_count(workers, executor), executor, progress)
    planned = partial(plan_shards, max_shard_size=max_shard_size, strategy=strategy, dtype=dtype)
    opened = partial(Checkpoint.open, source, revision=revision, token=token)
    checkpoint = _open(opened, planned, destination, overwrite, stream)
    plan = planned(checkpoint)
    with staging(checkpoint, plan, destination, overwrite, resume) as stage:
        reused = _reuse(stage, crew)
        stage.check_space()
        copying = time.perf_counter()
        count = _write_shards(stage, crew)
        copy_seconds = time.perf_counter() - copying
        lost = total_lost(plan, stage.finished.values())
        refuse_overflow(lost, plan, allow_overflow)
        for file in write_beside(checkpoint, plan, stage.folder, lambda: count.add(0)):
            stage.wrote(file)
        verification = _verify(stage, crew) if verify else None
        stage.publish()
    return ShardReport(
        source=checkpoint.source,
        destination=str(stage.destination),
        files={shard.file: shard.nbytes for shard in plan.shards},
        tensors=len(checkpoint.tensors),
        nbytes=plan.total_bytes,
        dtype=plan.dtype,
        lost=lost,
        reused=reused,
        side_files=checkpoint.side_files,
        left_out=checkpoint.left_out,
        verification=verification,
        copy_seconds=copy_seconds,
        seconds=time.perf_counter() - start,
        notes=(
            *checkpoint.summary().notes,
            *plan.summary().notes,
            *stage.notes,
            *(_STREAMED,) * _is_received(checkpoint),
        ),
        kept=plan.kept,
    )


def _open(
    opened: Callable[..., Checkpoint],
    planned: Callable[[Checkpoint], ShardPlan],
    destination: str | os.PathLike[str],
    overwrite: bool,
    stream: bool | None,
) -> Checkpoint:
    """Open the source; download it first where it is on the Hub and is not to be streamed."""
    try:
        checkpoint = opened()
    except DownloadNeededError:
        if stream:
            raise
    else:
        if stream or not _is_received(checkpoint):
            return checkpoint
        from shardkit.sources.hub_cache import must_stream

        nbytes = planned(checkpoint).disk_bytes
        if stream is None and must_stream(checkpoint.place, needed_files, nbytes, destination):
            return checkpoint
    check_free(resolve(destination), overwrite)  # rather now than after a long download
    return opened(download=True)


def _reuse(stage: Staging, crew: Crew) -> tuple[str, ...]:
    """Check what an earlier run left, byte by byte, against the source; forget what is not right."""
    checkpoint, plan = stage.checkpoint, stage.plan
    shards = [shard for shard in plan.shards if shard.file in stage.finished]
    stage.wait()  # for the disk: only what it has can be dropped
    in_memory = pages.drop(stage.folder / shard.file for shard in shards)
    if shards and in_memory != 0:
        stage.notes.append(f"when reused shards were checked: {read_from(len(shards), in_memory)}")
    if _is_received(checkpoint):
        received = {shard.file: stage.finished[shard.file].received for shard in shards}
        damaged = list(altered_parts(plan, received, stage.folder, crew, "check"))
    else:
        damaged = damaged_shards(checkpoint, plan, shards, stage.folder, crew)
    for file in damaged:
        del stage.finished[file]
    return tuple(shard.file for shard in shards if shard.file in stage.finished)


def _write_shards(stage: Staging, crew: Crew) -> ProgressCount:
    checkpoint, plan = stage.checkpoint, stage.plan
    todo = [shard for shard in plan.shards if shard.file not in stage.finished]
    tasks_left: Counter[str] = Counter()
    outcomes: defaultdict[str, Outcome] = defaultdict(Outcome)
    count = ProgressCount(crew.progress, "copy", sum(t.source.nbytes for s in todo for t in s.tensors))

    def tasks_of(shard: Shard) -> Iterator[Task]:
        path = stage.folder / shard.file
        path.write_bytes(plan.header(shard))
        os.truncate(path, shard.nbytes)
        cut = shard_tasks(shard, checkpoint.place, str(path))
        tasks_left[shard.file] = len(cut)
        yield from cut

    # Writes into one file wait for each other in the kernel: keep as many files going as there are workers.
    # No network is fast enough for that to matter; one file after the other, a kill costs one at most.
    tasks = take_turns(map(tasks_of, todo), 1 if _is_received(checkpoint) else crew.workers)
    with run_all(run_task, tasks, crew.workers, crew.executor) as results:
        for task, outcome in results:
            file = os.path.basename(task.path)
            outcomes[file] += outcome
            tasks_left[file] -= 1
            if not tasks_left[file]:
                stage.finish(file, outcomes.pop(file))
            count.add(task.nbytes)
    stage.wait()
    return count


def total_lost(plan: ShardPlan, outcomes: Iterable[Outcome]) -> tuple[Lost, ...]:
    """Add up what casts lost, by tensor: a tensor may have been cast by several tasks."""
    overflowed: Counter[str] = Counter()
    flushed: Counter[str] = Counter()
    for loss in (loss for outcome in outcomes for loss in outcome.lost):
        overflowed[loss.tensor] += loss.overflowed
        flushed[loss.tensor] += loss.flushed
    names = (tensor.source.name for shard in plan.shards for tensor in shard.tensors)
    return tuple(Lost(n, overflowed[n], flushed[n]) for n in names if overflowed[n] or flushed[n])


def refuse_overflow(lost: tuple[Lost, ...], plan: ShardPlan, allow_overflow: bool) -> None:
    """Raise `CastError` where a cast made finite values infinite, unless that is allowed."""
    hit = [loss for loss in lost if loss.overflowed]
    if hit and not allow_overflow:
        named = listed(f"{loss.tensor} ({plural(loss.overflowed, 'value')})" for loss in hit)
        advice = (
            f"{_wider(plan, hit)}leave out dtype, or allow it with allow_overflow=True (--allow-overflow)"
        )
        raise CastError(
            f"{plan.source}: a cast to {plan.dtype} makes finite values infinite in {named}; {advice}"
        )


def _wider(plan: ShardPlan, hit: list[Lost]) -> str:
    """Advise a dtype of wider range than the plan's: bfloat16 has that of float32, but for its last step."""
    names = {loss.tensor for loss in hit}
    stored = {t.source.dtype for shard in plan.shards for t in shard.tensors if t.source.name in names}
    if plan.dtype == "float16":
        return "choose bfloat16 or float32, or "
    return "choose float32, or " if "F64" not in stored else ""


def write_beside(
    checkpoint: Checkpoint, plan: ShardPlan, folder: Path, hear: Callable[[], None] = lambda: None
) -> list[str]:
    """Write all that is not a shard, the index last; return what it was. `hear` may stop it by raising."""
    for file in checkpoint.side_files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == checkpoint.config_file and (text := _new_config(checkpoint, plan)):
            target.write_bytes(text.encode())  # as text, Windows would end its lines otherwise
        else:
            source = whole_file(checkpoint.place.fetched(file), checkpoint.side_files[file])
            target.touch()
            for task in file_tasks(source, str(target)):
                run_task(task)
                hear()
    if plan.index is not None and plan.index_file is not None:
        (folder / plan.index_file).write_bytes(plan.index.encode())
    return [*checkpoint.side_files, *filter(None, [plan.index_file])]


def _new_config(checkpoint: Checkpoint, plan: ShardPlan) -> str | None:
    """Return the config that the shards need in place of the source's; None where that fits as it is."""
    config = checkpoint.config or {}
    is_unsaid = config_dtype(config) is None and bool(config.keys() & {"architectures", "model_type"})
    auto = checkpoint.auto_dtype if is_unsaid and checkpoint.auto_dtype != plan.auto_dtype else None
    return adapted_config(config, plan.dtype, auto)


def _is_received(checkpoint: Checkpoint) -> bool:
    """Whether its bytes come over a network, where each is read once."""
    return checkpoint.place.folder is None


def _verify(stage: Staging, crew: Crew) -> Verification:
    checkpoint, folder, files = stage.checkpoint, stage.folder, len(stage.plan.shards)
    in_memory = pages.drop(folder / shard.file for shard in stage.plan.shards)
    if altered := _altered_files(checkpoint, stage.plan, folder, crew):
        raise VerificationError(f"{stage.destination}: not published: {listed(altered)} not as in the source")
    if _is_received(checkpoint):
        received = {file: outcome.received for file, outcome in stage.finished.items()}
        found = verify_received(checkpoint, stage.plan, received, folder, crew)
    else:
        copy = written(folder, stage.plan)
        found = verify_weights(checkpoint, copy, crew)
    if not found.equal:
        raise VerificationError(f"{stage.destination}: not published: {_why_unequal(found)}")
    return replace(found, destination=str(stage.destination), files=files, files_in_memory=in_memory)


def _altered_files(checkpoint: Checkpoint, plan: ShardPlan, folder: Path, crew: Crew) -> list[str]:
    """Return which of the files that are copied as they are do not hold what the source does."""
    adapted = checkpoint.config_file if _new_config(checkpoint, plan) else None
    sizes = {file: size for file, size in checkpoint.side_files.items() if file != adapted}
    pairs = [
        (whole_file(checkpoint.place.fetched(file), size), whole_file(folder / file, size))
        for file, size in sizes.items()
    ]
    digests = digest_pairs(pairs, replace(crew, progress=None), "verify")
    return [file for file, (ours, theirs) in zip(sizes, digests, strict=True) if ours != theirs]


def _why_unequal(found: Verification) -> str:
    if wrong := [m.tensor for m in found.mismatches] + [*found.missing, *found.extra]:
        return (
            f"{plural(len(wrong), 'tensor')} not as in the source ({listed(wrong)}); the source or the disk "
            "changed meanwhile"
        )
    return f"a model does not get from it what the source gives it: {found.model}"
