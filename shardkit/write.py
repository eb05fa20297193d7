"""Carry out a plan: a destination is absent or whole.

Everything is written in a staging folder beside the destination, synced, and renamed into place at the
end. What a killed run has finished there is used by the next one, if source and plan are the same.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from shardkit.checkpoint import Checkpoint
from shardkit.errors import CastError, VerificationError
from shardkit.layout import adapted_config
from shardkit.plan import Shard, ShardPlan, Strategy, plan_shards
from shardkit.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.run import (
    ProgressCallback,
    ProgressCount,
    resumable,
    run_all,
    take_turns,
    worker_count,
)
from shardkit.sizes import format_size
from shardkit.staging import Staging, staging
from shardkit.transfer import Lost, Task, file_tasks, run_task, shard_tasks
from shardkit.verify import Verification, damaged_shards, verify_checkpoint

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
    lost
        Tensors of which the cast made some values infinite or zero, with counts.
    reused
        Shards that an earlier run of the same job had finished.
    side_files, left_out
        What went along, and weights of other formats that did not.
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
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    verification: Verification | None
    copy_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()

    def summary(self) -> Summary:
        """Return the report as a person reads it."""
        rate = format_size(self.nbytes / max(self.copy_seconds, 1e-9))
        check = self.verification
        facts: tuple[tuple[str, str], ...] = (
            ("source", shown_path(self.source)),
            ("destination", shown_path(self.destination)),
            ("written", f"{format_size(self.nbytes)} in {plural(len(self.files), 'file')}"),
            ("dtype", f"cast to {self.dtype}" if self.dtype else "as in the source"),
            ("written in", f"{self.copy_seconds:.2f} s, {rate}/s"),
            ("verified", f"equal, {check.tensors:,} tensors in {check.seconds:.2f} s" if check else "no"),
            ("went along", listed(self.side_files) or "nothing"),
        )
        facts += (("reused", listed(self.reused)),) * bool(self.reused)
        if self.dtype:
            infinite, zero = (sum(getattr(x, of) for x in self.lost) for of in ("overflowed", "flushed"))
            words = f"{plural(infinite, 'value')} became infinite, {zero:,} became zero"
            facts += (("lost in the cast", f"{words}, in {plural(len(self.lost), 'tensor')}"),)
        worst = sorted(self.lost, key=lambda x: (-x.overflowed, -x.flushed))[:_SHOWN_LOSSES]
        rows = tuple((x.tensor, f"{x.overflowed:,}", f"{x.flushed:,}") for x in worst)
        lost = (Table(("most was lost in", "became infinite", "became zero"), rows),) if rows else ()
        notes = self.notes
        if self.left_out:
            notes += (f"weights in other formats stay behind: {listed(self.left_out)}",)
        return Summary("Sharded checkpoint", facts, lost, notes)


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
    progress: ProgressCallback | None = None,
) -> ShardReport:
    """Rewrite a checkpoint as shards that plain `from_pretrained` loads, without loading it.

    Parameters
    ----------
    source
        A folder, a weights file, or a snapshot of the Hub's cache.
    destination
        A folder that does not exist, or is empty.
    max_shard_size, strategy, dtype
        As in `plan_shards`.
    workers
        How many files are written at once (default: up to four).
    executor
        A `concurrent.futures` executor to use instead of threads of our own.
    overwrite
        Replace a destination that holds a checkpoint, once the new one is whole.
    resume
        Use the shards that an earlier, interrupted run of the same job has finished.
    verify
        Read both sides again and compare every tensor before the destination appears.
    allow_overflow
        Let a cast turn finite values into infinities.
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
    start, workers = time.perf_counter(), worker_count(workers)
    checkpoint = Checkpoint.open(source)
    plan = plan_shards(checkpoint, max_shard_size=max_shard_size, strategy=strategy, dtype=dtype)
    with staging(checkpoint, plan, destination, overwrite, resume) as stage:
        reused = _reuse(checkpoint, plan, stage, workers, executor, progress)
        stage.check_space()
        copying = time.perf_counter()
        count = _write_shards(checkpoint, plan, stage, workers, executor, progress)
        copy_seconds = time.perf_counter() - copying
        lost = _lost(plan, stage)
        _refuse_overflow(lost, plan, allow_overflow)
        _write_beside(checkpoint, plan, stage, count)
        verification = _verify(checkpoint, stage, workers, executor, progress) if verify else None
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
        side_files=tuple(checkpoint.side_files),
        left_out=checkpoint.left_out,
        verification=verification,
        copy_seconds=copy_seconds,
        seconds=time.perf_counter() - start,
        notes=(*checkpoint.notes, *plan.summary().notes, *stage.notes),
    )


def _reuse(
    checkpoint: Checkpoint,
    plan: ShardPlan,
    stage: Staging,
    workers: int,
    executor: Executor | None,
    progress: ProgressCallback | None,
) -> tuple[str, ...]:
    """Check what an earlier run left, byte by byte, against the source; forget what is not right."""
    shards = [shard for shard in plan.shards if shard.file in stage.finished]
    for file in damaged_shards(checkpoint, plan, shards, stage.folder, workers, executor, progress):
        stage.forget(file)
    return tuple(shard.file for shard in shards if shard.file in stage.finished)


def _write_shards(
    checkpoint: Checkpoint,
    plan: ShardPlan,
    stage: Staging,
    workers: int,
    executor: Executor | None,
    progress: ProgressCallback | None,
) -> ProgressCount:
    todo = [shard for shard in plan.shards if shard.file not in stage.finished]
    tasks_left: Counter[str] = Counter()
    lost: defaultdict[str, list[Lost]] = defaultdict(list)
    count = ProgressCount(progress, "copy", sum(t.source.nbytes for s in todo for t in s.tensors))

    def tasks_of(shard: Shard) -> Iterator[Task]:
        path = stage.path(shard.file)
        path.write_bytes(plan.header(shard))
        os.truncate(path, shard.nbytes)
        cut = shard_tasks(shard, checkpoint.folder, str(path))
        tasks_left[shard.file] = len(cut)
        yield from cut

    # Writes into one file wait for each other in the kernel: keep as many files going as there are workers.
    tasks = take_turns(map(tasks_of, todo), workers)
    with run_all(run_task, tasks, workers, executor) as results:
        for task, losses in results:
            file = os.path.basename(task.path)
            lost[file] += losses
            tasks_left[file] -= 1
            if not tasks_left[file]:
                stage.finish(file, lost[file])
            count.add(task.nbytes)
    stage.wait()
    return count


def _lost(plan: ShardPlan, stage: Staging) -> tuple[Lost, ...]:
    """Add up what casts lost, by tensor: a tensor may have been cast by several tasks."""
    overflowed: Counter[str] = Counter()
    flushed: Counter[str] = Counter()
    for loss in (loss for losses in stage.finished.values() for loss in losses):
        overflowed[loss.tensor] += loss.overflowed
        flushed[loss.tensor] += loss.flushed
    names = (tensor.source.name for shard in plan.shards for tensor in shard.tensors)
    return tuple(Lost(n, overflowed[n], flushed[n]) for n in names if overflowed[n] or flushed[n])


def _refuse_overflow(lost: tuple[Lost, ...], plan: ShardPlan, allow_overflow: bool) -> None:
    hit = [loss for loss in lost if loss.overflowed]
    if hit and not allow_overflow:
        named = listed(f"{loss.tensor} ({plural(loss.overflowed, 'value')})" for loss in hit)
        raise CastError(
            f"{plan.source}: cast to {plan.dtype} makes finite values infinite in {named}; "
            "choose bfloat16, or let it be (allow_overflow=True, --allow-overflow)"
        )


def _write_beside(checkpoint: Checkpoint, plan: ShardPlan, stage: Staging, count: ProgressCount) -> None:
    """Write all that is not a shard; the index last. A large file hears a stop as well."""
    for file, nbytes in checkpoint.side_files.items():
        target = stage.path(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == checkpoint.config_file and (text := adapted_config(checkpoint.config or {}, plan.dtype)):
            target.write_text(text, encoding="utf-8")
        else:
            target.touch()
            for task in file_tasks(checkpoint.path(file), str(target), nbytes):
                run_task(task)
                count.add(0)
        stage.wrote(file)
    if plan.index is not None and plan.index_file is not None:
        stage.path(plan.index_file).write_text(plan.index, encoding="utf-8")
        stage.wrote(plan.index_file)


def _verify(
    checkpoint: Checkpoint,
    stage: Staging,
    workers: int | None,
    executor: Executor | None,
    progress: ProgressCallback | None,
) -> Verification:
    found = verify_checkpoint(checkpoint, stage.folder, workers=workers, executor=executor, progress=progress)
    if not found.equal:
        wrong = [m.tensor for m in found.mismatches] + [*found.missing, *found.extra]
        raise VerificationError(
            f"{stage.destination}: not published: {plural(len(wrong), 'tensor')} not as in the source "
            f"({listed(wrong)}); the source or the disk changed meanwhile"
        )
    return replace(found, destination=str(stage.destination))
