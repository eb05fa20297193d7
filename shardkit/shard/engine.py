"""Carry out a plan: make each shard, put it where it goes, then publish all of it in one step.

A destination is absent or complete, be it a folder, a bucket or a repository on the Hub; what an interrupted
run has finished is used by the next one of the same source and plan.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from shardkit.base.errors import Cancelled, DestinationError, InUseError
from shardkit.base.jobs import Crew, ProgressCallback, ProgressCount, resumable, run_all, worker_count
from shardkit.base.machine import Watch, seen
from shardkit.base.record import listed, plural
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import DtypeLike
from shardkit.plan.plan import Shard, Strategy
from shardkit.shard.bucket_store import BucketStore
from shardkit.shard.copy import run_task
from shardkit.shard.destination import check_free, resolve
from shardkit.shard.folder_store import FolderStore
from shardkit.shard.freeable import open_to_free
from shardkit.shard.freeing import FreeingStore
from shardkit.shard.in_parts import FINISH, JoinedStore, Part, PartStore, missing_parts
from shardkit.shard.opening import is_streamed, open_there, planned, refuse_early
from shardkit.shard.report import ShardReport
from shardkit.shard.side_files import write_side_files
from shardkit.shard.store import Job, Store
from shardkit.shard.tasks import Outcome, Task, shard_tasks, task_bytes
from shardkit.shard.verify import head_start
from shardkit.sources.resolve import is_address


@resumable()
def shard_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "2GB",
    strategy: Strategy = "size",
    dtype: DtypeLike | None = None,
    files: int | None = None,
    ranks: int | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    allow_overflow: bool = False,
    stream: bool | None = None,
    free_source: bool = False,
    part: Part | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> ShardReport:
    """Rewrite a checkpoint as shards that plain `from_pretrained` loads, without loading it.

    Parameters
    ----------
    source
        A folder, a weights file, a model on the Hub ("org/name", "org/name@revision"), an address that fsspec
        reaches ("s3://bucket/name"), or a `Checkpoint`. A `ShardPlan` is carried out.
    destination
        A folder that does not exist, or is empty; or an address that fsspec reaches ("s3://bucket/name"), to
        which shards go by way of the current folder, at most `workers` + 1 at a time.
    max_shard_size, strategy, dtype, files, ranks
        As in `plan_shards`.
    workers
        How many files are written at once (default: up to four, or as many as the executor has workers).
    executor
        A `concurrent.futures` executor to use instead of threads: its workers may be on other machines that
        see source and destination under the same paths, such as those of Dask's `Client.get_executor()`.
    overwrite
        Replace an existing checkpoint, once the new one is complete; not in a bucket.
    resume
        Use the shards that an earlier, interrupted run of the same job has finished.
    verify
        Read both sides again and compare every tensor before the destination appears; of a model that is
        streamed, read the destination back and compare it with what was received. The shards are dropped from
        memory first, so the disk is read; the report says if that was not possible.
    allow_overflow
        Allow a cast that turns finite values infinite.
    stream
        Stream a model on the Hub with range requests, without storing it on this disk. False downloads it
        first; None does so if the disk has room for both.
    free_source
        Free the source's disk space while the shards are made, so that there need not be room for both: what
        shards have that are on the disk and verified is cut off its files, whose last rest is removed, with
        their index, just before the destination appears. Its other files stay. It cannot be undone; an
        interrupted run can only be resumed, with the same arguments. Files that others may use, or that hold
        more than the tensors, are refused: links, the Hub's cache, files that torch saved; and so is a
        destination in memory for a source on a disk.
    part
        Make one part of the job, as (3, 8): every eighth shard from the third on, verified. Processes on any
        machines that see the same disk can make the others, all with the same arguments; the last to finish
        publishes the destination, and reports on all of it, or "finish" does. A model on the Hub is streamed.
    revision, token
        For the Hub, as in `Checkpoint.open`.
    progress
        Called with a `Progress`; returning False stops the job, which can be resumed.

    Returns
    -------
    ShardReport
        What was written, lost in a cast, left out and proven.

    Raises
    ------
    CheckpointError, PlanError, SizeError
        If the source is not a valid checkpoint, or the plan cannot be made.
    DestinationError, SpaceError
        If the destination exists, overlaps the source, or does not fit on its disk.
    CastError
        If a cast turns finite values infinite; names the tensors.
    VerificationError
        If the result does not match the source.
    Cancelled
        If `progress` returned False.

    Examples
    --------
    >>> plan = plan_shards("mistral-demo", max_shard_size="2MB")
    >>> report = shard_checkpoint(plan, "planned")
    >>> len(report.files), report.verification.equal
    (3, True)
    """
    watch, crew = Watch(), Crew(worker_count(workers, executor), executor, progress)
    layout = {"max_shard_size": max_shard_size, "strategy": strategy, "dtype": dtype}
    layout |= {"files": files, "ranks": ranks}
    opened = partial(Checkpoint.open, source, revision=revision, token=token)
    is_here = not is_address(destination)
    refuse_early(source, destination, free_source, part)
    checkpoint = open_to_free(source, resolve(destination), opened) if free_source else opened()
    plan = planned(source, checkpoint, **layout)
    wants_stream = True if part and stream is None else stream
    if checkpoint.place.folder is None and not is_streamed(checkpoint, plan, destination, wants_stream):
        if is_here:
            check_free(resolve(destination), overwrite)  # rather now than after a long download
        checkpoint = opened(download=True)
        plan = planned(source, checkpoint, **layout)
    job = Job(checkpoint, plan, verify, allow_overflow, crew, free_source)
    if not is_here:
        return reshard(BucketStore(job, os.fspath(destination), resume, Path()), watch)
    if part:
        return _in_parts(job, resolve(destination), part, overwrite, resume, watch)
    if free_source:
        return reshard(FreeingStore(job, resolve(destination), overwrite, resume), watch)
    with head_start(job) as ask:
        return reshard(FolderStore(job, resolve(destination), overwrite, resume, ask), watch)


@resumable()
def shard_on_hub(
    source_id: str | os.PathLike[str],
    target_id: str,
    *,
    max_shard_size: int | str = "2GB",
    strategy: Strategy = "size",
    dtype: DtypeLike | None = None,
    files: int | None = None,
    revision: str | None = None,
    private: bool = True,
    workers: int | None = None,
    executor: Executor | None = None,
    token: str | None = None,
    verify: bool = True,
    allow_overflow: bool = False,
    progress: ProgressCallback | None = None,
    work_folder: str | os.PathLike[str] | None = None,
) -> ShardReport:
    """Reshard a model of the Hub into another repository there, in bounded disk and memory.

    There are never more than `workers` + 1 shards on this disk, and a few megabytes for each in memory. An
    interrupted run resumes when it is repeated, from the shards that the target already has.

    Parameters
    ----------
    source_id
        "org/name", "org/name@revision", or an address that fsspec reaches ("s3://bucket/name"); a
        `Checkpoint` of it; or a `ShardPlan`, which is carried out.
    target_id
        ``owner/name``; created if it does not exist. Its head changes once, when everything is there.
    max_shard_size, strategy, dtype, files
        As in `plan_shards`.
    revision
        Branch, tag or commit of the source.
    private
        Visibility of a new repository. An existing public one is refused, unless this is False.
    workers
        Number of threads that make or upload shards, plus one (default: up to four, or as many as the
        executor has workers).
    executor
        A `concurrent.futures` executor to use instead of threads: its workers stream, check and upload a
        shard each. They need no shared disk, and each uses the token that it finds where it runs.
    token
        A token that can read the source and write the target (default: from the environment or the client).
    verify, allow_overflow
        As in `shard_checkpoint`: each shard is read back before it is sent.
    progress
        Called with a `Progress` (stage "stream", bytes received and sent); returning False stops.
    work_folder
        Where shards are stored while they are made (default: the current folder); of workers, on each one's
        machine. Always cleaned up; after a kill, by the next run.

    Returns
    -------
    ShardReport
        As of `shard_checkpoint`; its destination names the commit.

    Raises
    ------
    CheckpointError, PlanError, SizeError
        If the source cannot be read or streamed, or the plan cannot be made.
    DestinationError, SpaceError
        If the target cannot be written or was changed by somebody else, or the disk cannot hold a shard.
    CastError
        If a cast turns finite values infinite; names the tensors.
    VerificationError
        If a shard is not what was received, or the Hub lists other content than was sent.
    Cancelled
        If `progress` returned False.

    Examples
    --------
    >>> shard_on_hub("me/mistral", "me/mistral-float16", dtype="float16").destination
    'hf://me/mistral-float16@...'
    """
    from shardkit.shard.hub_store import HubStore
    from shardkit.shard.push import check_loadable

    watch, crew = Watch(), Crew(worker_count(workers, executor), executor, progress)
    checkpoint = open_there(source_id, revision, token)
    check_loadable(checkpoint)
    layout = {"max_shard_size": max_shard_size, "strategy": strategy, "dtype": dtype, "files": files}
    plan = planned(source_id, checkpoint, **layout)
    job = Job(checkpoint, plan, verify, allow_overflow, crew)
    return reshard(HubStore(job, target_id, token, private, Path(work_folder or ".")), watch)


def _in_parts(job: Job, target: Path, part: Part, overwrite: bool, resume: bool, watch: Watch) -> ShardReport:
    report = None
    if part != FINISH:
        report = reshard(PartStore(job, target, part, overwrite, resume), watch)
    try:
        if not (missing := missing_parts(job, target)):
            joined = reshard(JoinedStore(job, target, overwrite, resume), watch)
            made = {*report.files}.difference(report.reused) if report else set()
            others = tuple(file for file in joined.reused if file not in made)
            own_seconds = report.copy_seconds if report else 0
            return replace(joined, reused=others, copy_seconds=own_seconds + joined.copy_seconds)
        note = f"not finished: {plural(len(missing), 'part')} ({listed(map(str, missing))}); run them"
        if report is None:
            raise DestinationError(f"{target}: {note}")
    except (DestinationError, FileNotFoundError) as error:
        if report is None or (os.path.isdir(report.destination) and not isinstance(error, InUseError)):
            raise
        note = "another part publishes it"
    return replace(report, notes=(*report.notes, f"{target}: {note}; the last to finish publishes it"))


def reshard(store: Store, watch: Watch) -> ShardReport:
    """Do the job of a store, watched since it began."""
    checkpoint, plan = store.job.checkpoint, store.job.plan
    with store.open():
        reused = tuple(shard.file for shard in plan.shards if shard.file in store.finished)
        making = watch.seconds
        count = _make_all(store, watch)
        store.settle()
        made = watch.seconds
        outcomes = store.finished.values()
        store.job.refuse_overflow(outcomes)
        side_files = write_side_files(store.job, store.folder, lambda: count.add(0))
        destination, verification = store.publish(side_files)
    return ShardReport(
        source=checkpoint.source,
        destination=destination,
        files={shard.file: shard.nbytes for shard in plan.shards},
        tensors=len(checkpoint.tensors),
        nbytes=plan.total_bytes,
        dtype=plan.dtype,
        lost=store.job.lost(outcomes),
        reused=reused,
        side_files=checkpoint.side_files,
        left_out=checkpoint.left_out,
        verification=verification,
        copy_seconds=made - making,
        seconds=watch.seconds,
        notes=(*checkpoint.summary().notes, *plan.summary().notes, *store.notes),
        kept=plan.kept,
        freed=store.freed,
        peak_bytes=watch.peak_bytes,
        before_bytes=watch.before_bytes,
    )


def _make_all(store: Store, watch: Watch) -> ProgressCount:
    """Make the shards that are not finished, some at once, each in tasks that any executor can carry out.

    Writes into one file wait for each other in the kernel, so workers are spread over files.
    """
    job, stop = store.job, Event()
    todo = store.ordered([shard for shard in job.plan.shards if shard.file not in store.finished])
    source_bytes = sum(tensor.source.nbytes for shard in todo for tensor in shard.tensors)
    sent_bytes = sum(shard.nbytes for shard in todo) * store.is_sending
    count = ProgressCount(job.crew.progress, store.stage, source_bytes + sent_bytes)
    if not todo:
        return count
    at_once = min(len(todo), store.at_once(todo))
    width = -(-job.crew.workers // at_once)

    def one(shard: Shard) -> None:
        outcome, uncounted = _make(store, shard, width, count, stop, watch)
        store.put(shard, outcome)
        count.add(uncounted + shard.nbytes * store.is_sending)  # so that what is counted is finished

    with run_all(one, todo, at_once) as results, ExitStack() as first:
        first.callback(stop.set)  # before what is under way is waited for
        deque(results, maxlen=0)
    return count


def _make(
    store: Store, shard: Shard, width: int, count: ProgressCount, stop: Event, watch: Watch
) -> tuple[Outcome, int]:
    """Make one shard; return also how many source bytes are still to be counted."""
    outcome, uncounted = Outcome(), 0
    run, tasks = store.errand(shard) or (run_task, _tasks(store, shard))
    with run_all(partial(seen, run), tasks, width, store.job.crew.executor, stop) as results:
        for task, (part, who, peak) in results:
            watch.add(who, peak)
            if stop.is_set():
                raise Cancelled("stopped")
            outcome += part
            count.add(uncounted)
            uncounted = task.nbytes
    return outcome, uncounted


def _tasks(store: Store, shard: Shard) -> list[Task]:
    job, path = store.job, store.job.begin(shard, store.folder)
    nbytes = task_bytes(job.plan.total_bytes, job.crew)
    return shard_tasks(shard, job.checkpoint.place, str(path), store.mark, nbytes)
