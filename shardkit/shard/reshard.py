"""From Hub to Hub: each shard is made from ranged reads, checked, uploaded, dropped.

Neither model ever lies on this disk. Finished shards are committed to a draft branch of the target, so that a
run that was killed goes on from there, on this machine or another; the head changes once, at the end, in one
commit that takes the shards over from the draft.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import xxhash
from huggingface_hub import CommitOperationAdd, CommitOperationCopy

from shardkit.base import pages
from shardkit.base.errors import (
    Cancelled,
    CastError,
    CheckpointError,
    DestinationError,
    DownloadNeededError,
    SpaceError,
    VerificationError,
)
from shardkit.base.jobs import Crew, ProgressCallback, ProgressCount, resumable, run_all, worker_count
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.load.seen import ModelKeys
from shardkit.plan.plan import Shard, ShardPlan, Strategy, plan_shards
from shardkit.shard.copy import Lost, Outcome, run_task, shard_tasks
from shardkit.shard.destination import free_bytes, locked, remove_leftovers, staging_folder, sync
from shardkit.shard.engine import ShardReport, refuse_overflow, total_lost, write_beside
from shardkit.shard.hub_target import Target, digest_bytes, digest_file, is_same
from shardkit.shard.model_card import CARD, Story, model_card
from shardkit.shard.push import check_loadable, own_readme, shown_card
from shardkit.shard.verify import Verification, altered_parts, damaged_shards, digest_range, staged_range
from shardkit.sources.hub import RemoteFile, Repository
from shardkit.sources.hub_client import quiet
from shardkit.sources.resolve import hub_name

_DRAFT = re.compile(r"shardkit-[0-9a-f]{16}")
_NOTES = ".shardkit"  # a folder of the draft branch: what is known of each shard there


@resumable()
def shard_on_hub(
    source_id: str,
    target_id: str,
    *,
    max_shard_size: int | str = "2GB",
    strategy: Strategy = "size",
    dtype: object = None,
    revision: str | None = None,
    private: bool = True,
    workers: int | None = None,
    token: str | None = None,
    verify: bool = True,
    allow_overflow: bool = False,
    progress: ProgressCallback | None = None,
    work_folder: str | os.PathLike[str] | None = None,
) -> ShardReport:
    """Reshard a model of the Hub into another repository there, in bounded disk and memory.

    On this disk there are never more than `workers` + 1 shards, in memory some megabytes for each. A run that
    was interrupted goes on when it is repeated, from the shards that the target has already.

    Parameters
    ----------
    source_id
        "org/name" or "org/name@revision", in safetensors.
    target_id
        ``owner/name``; made where it is not there. Its head changes once, when all is there.
    max_shard_size, strategy, dtype
        As in `plan_shards`.
    revision
        Branch, tag or commit of the source.
    private
        Of a repository that is made. One that is there and public is refused, unless this is False.
    workers
        Of them and one more, each makes a shard or sends one (default: up to four).
    token
        One that may read the source and write the target; by default the environment's, or the client's.
    verify
        Read each shard back and hold it against what was received, before it is sent.
    allow_overflow
        Let a cast turn finite values into infinities.
    progress
        Called with a `Progress` (stage "stream", bytes received and sent); returning False stops.
    work_folder
        Where shards lie while they are made (default: the current folder). Cleaned up on every way out; what
        a killed run has left there, by the next one.

    Raises
    ------
    CheckpointError, PlanError, SizeError
        If the source cannot be read or is not in safetensors, or the plan cannot be made.
    DestinationError, SpaceError
        If the target cannot be written or was changed by somebody else, or the disk cannot hold a shard.
    CastError
        If a cast makes finite values infinite; names the tensors.
    VerificationError
        If a shard is not what was received, or the Hub lists other content than was sent.
    Cancelled
        If `progress` returned False.
    """
    start, workers = time.perf_counter(), worker_count(workers)
    checkpoint = _open(source_id, revision, token)
    plan = plan_shards(checkpoint, max_shard_size=max_shard_size, strategy=strategy, dtype=dtype)
    target = Target(target_id, token)
    if checkpoint.source.lower().startswith(f"{target.folder}@".lower()):
        raise DestinationError(f"{target.folder}: source and target are the same; give another repository")
    job = _Job(checkpoint, plan, target, verify, allow_overflow)
    with quiet(), _work_space(Path(work_folder or "."), job.name) as folder:
        target.create(private)
        job.begin(folder)
        reused = tuple(job.finished)
        job.carry_out(workers, progress)
        moved = time.perf_counter()
        sha = job.publish()
    return job.report(sha, reused, moved - start, time.perf_counter() - start)


def _open(source_id: str, revision: str | None, token: str | None) -> Checkpoint:
    if os.path.exists(source_id):
        raise CheckpointError("is on this machine: shard it to a folder, and push that", file=source_id)
    source = hub_name(source_id)
    checkpoint = None
    with suppress(DownloadNeededError):
        checkpoint = Checkpoint.open(source, revision=revision, token=token)
    if checkpoint is None or checkpoint.format == "pickle":
        raise CheckpointError(
            "holds pickles, which cannot be read in part: shard it to a folder, and push that", file=source
        )
    check_loadable(checkpoint)
    return checkpoint


@contextmanager
def _work_space(base: Path, name: str) -> Iterator[Path]:
    """Hold a folder of this job's own, gone on every way out; remove what killed runs have left."""
    base = base.expanduser().resolve()
    folder = staging_folder(base / name)
    with ExitStack() as held:
        with _disk(base):
            base.mkdir(parents=True, exist_ok=True)
            for left in base.glob(".shardkit-*.shardkit-*"):
                with suppress(DestinationError):  # it is held by a run that is alive
                    remove_leftovers(base / left.name[1:].partition(".")[0])
            held.enter_context(locked(base / name))
            folder.mkdir()
            held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Say of what fails on a work folder's disk where it was, and what to do."""
    try:
        yield
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DestinationError
        raise kind(
            f"{folder}: {error.strerror or error}; run the same again to go on, or with a work_folder on "
            "another disk"
        ) from error


@dataclass(frozen=True)
class _Finished:
    """A shard that the draft branch has: its content, what casts lost in it, its tensors' digests."""

    content: RemoteFile
    lost: tuple[Lost, ...]
    digests: Mapping[str, str]

    def note(self) -> bytes:
        """Return what is committed beside it, for a run that goes on."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, note: bytes) -> _Finished | None:
        """Read a note; None where it is not one of ours."""
        try:
            said: dict[str, Any] = json.loads(note)
            lost = tuple(Lost(**loss) for loss in said["lost"])
            return cls(RemoteFile(**said["content"]), lost, dict(said["digests"]))
        except (ValueError, KeyError, TypeError):
            return None


class _Job:
    """One resharding: which shards the draft has, which are to be made."""

    def __init__(
        self, checkpoint: Checkpoint, plan: ShardPlan, target: Target, verify: bool, allow_overflow: bool
    ) -> None:
        self.finished: dict[str, _Finished] = {}
        self.notes: list[str] = []
        self._checkpoint, self._plan, self._target = checkpoint, plan, target
        self._verify, self._allow_overflow = verify, allow_overflow
        planned = [(s.file, [(t.source.name, t.dtype, t.begin) for t in s.tensors]) for s in plan.shards]
        told = json.dumps([checkpoint.source, plan.metadata, planned])
        self.name = f"shardkit-{xxhash.xxh3_64_hexdigest(told.encode())}"
        self._stop, self._committing = Event(), Lock()
        self._readme = own_readme(checkpoint)
        self._checking_seconds = 0.0
        self._in_memory: list[int | None] = []  # of each shard that was read back, whether it was in memory

    def begin(self, folder: Path) -> None:
        """Find the draft branch, or make it, and see which shards it has."""
        self._folder, self._base = folder, folder.parent
        self._shown()  # a card that cannot be kept is better refused now
        self._target.branch_off(self.name)
        draft = self._target.commit_at(self._target.head(self.name))
        self._draft_head = draft.sha
        listing = draft.listing
        candidates = [s for s in self._plan.shards if s.file in listing and _note_of(s.file) in listing]
        with run_all(lambda s: draft.read_bytes(_note_of(s.file)), candidates) as notes:
            for shard, note in notes:
                found = _Finished.of(note)
                if found and self._is_usable(shard, found, listing[shard.file]):
                    self.finished[shard.file] = found

    def _is_usable(self, shard: Shard, found: _Finished, there: RemoteFile) -> bool:
        refuse_overflow(found.lost, self._plan, self._allow_overflow)
        is_checked = len(found.digests) == len(shard.tensors) or not self._verify
        return is_checked and found.content.size == shard.nbytes and is_same(there, found.content)

    def carry_out(self, workers: int, progress: ProgressCallback | None) -> None:
        """Make, send and drop the shards that the draft lacks."""
        todo = [shard for shard in self._plan.shards if shard.file not in self.finished]
        if not todo:
            return
        at_once = self._room(todo, workers + 1)
        source_bytes = sum(tensor.source.nbytes for shard in todo for tensor in shard.tensors)
        count = ProgressCount(progress, "stream", source_bytes + sum(shard.nbytes for shard in todo))
        try:
            with run_all(lambda s: self._one(s, count), todo, at_once) as results, ExitStack() as first:
                first.callback(self._stop.set)  # before what is under way is waited for
                deque(results, maxlen=0)
        except Exception as error:
            if self.finished:
                error.add_note(
                    f"{plural(len(self.finished), 'finished shard')} kept on the branch {self.name} of "
                    f"{self._target.repo_id}: the same call resumes from there"
                )
            elif isinstance(error, (CastError, VerificationError)):
                with suppress(DestinationError):
                    self._target.drop(self.name)
            raise

    def _room(self, todo: list[Shard], wanted: int) -> int:
        """Return how many shards may lie on the disk at once."""
        largest = max(shard.nbytes for shard in todo)
        free = free_bytes(self._folder)
        if free < largest:
            raise SpaceError(
                f"{self._base}: a shard takes up to {largest:,} bytes ({format_size(largest)}), its "
                f"disk has {free:,} ({format_size(free)}) free: lower max_shard_size, or give a work_folder "
                "on another disk"
            )
        return min(wanted, free // largest)

    def _one(self, shard: Shard, count: ProgressCount) -> None:
        """Make a shard, check it, send it, note it on the draft, drop it."""
        path = self._folder / shard.file
        try:
            outcome = self._make(shard, path, count)
            refuse_overflow(outcome.lost, self._plan, self._allow_overflow)
            with _disk(self._base):
                digests = self._check(shard, outcome) if self._verify else {}
                finished = _Finished(digest_file(path), outcome.lost, digests)
                self._send(shard.file, path, finished)
            count.add(shard.nbytes)
        finally:
            path.unlink(missing_ok=True)

    def _make(self, shard: Shard, path: Path, count: ProgressCount) -> Outcome:
        outcome = Outcome()
        with _disk(self._base):
            path.write_bytes(self._plan.header(shard))
            os.truncate(path, shard.nbytes)
        for task in shard_tasks(shard, self._checkpoint.place, str(path)):
            if self._stop.is_set():
                raise Cancelled("stopped")
            with _disk(self._base):
                outcome += run_task(task)
            count.add(task.nbytes)
        return outcome

    def _check(self, shard: Shard, outcome: Outcome) -> dict[str, str]:
        """Read a shard back, hold it against what was received, and digest its tensors."""
        start = time.perf_counter()
        sync(self._folder / shard.file)
        self._in_memory.append(pages.drop([self._folder / shard.file]))
        if self._checkpoint.place.folder is None:
            wrong = [*altered_parts(self._plan, {shard.file: outcome.received}, self._folder, Crew(1))]
        else:
            wrong = damaged_shards(self._checkpoint, self._plan, [shard], self._folder, Crew(1))
        if wrong:
            raise VerificationError(
                f"{self._folder / shard.file}: is not as it was received: the disk failed; nothing was sent"
            )
        digests = {t.source.name: digest_range(staged_range(self._folder, shard, t)) for t in shard.tensors}
        self._checking_seconds += time.perf_counter() - start
        return digests

    def _send(self, file: str, path: Path, finished: _Finished) -> None:
        operation, note = self._target.upload(file, path, finished.content, self.name), finished.note()
        wanted = {file: finished.content, _note_of(file): digest_bytes(note)}
        with self._committing:
            self._draft_head = self._target.commit(
                [operation, CommitOperationAdd(_note_of(file), note)],
                wanted,
                f"Draft of {file}",
                self._draft_head,
                self.name,
            )
            self.finished[file] = finished

    def _shown(self) -> tuple[Repository, str | None]:
        """Return the target's head, and its card."""
        head = self._target.commit_at(self._target.head())
        return head, shown_card(head, self._readme)

    def publish(self) -> str:
        """Make the head show all of it, in one commit; then the draft is of no more use."""
        beside = self._folder / "beside"
        with _disk(self._base):
            beside.mkdir()
            write_beside(self._checkpoint, self._plan, beside)
            paths = {p.relative_to(beside).as_posix(): p for p in beside.rglob("*") if p.is_file()}
            contents = {name: digest_file(path) for name, path in paths.items()}
        head, shown = self._shown()
        shards = {shard.file: self.finished[shard.file].content for shard in self._plan.shards}
        story = replace(Story.of(self._plan.made), digests=self._digests())
        card = model_card(shown, self._readme, self._target.repo_id, self._checkpoint, shards, story).encode()
        operations: dict[str, Any] = {n: CommitOperationAdd(n, path) for n, path in paths.items()}
        operations |= {n: CommitOperationCopy(n, n, src_revision=self.name) for n in shards}
        operations[CARD] = CommitOperationAdd(CARD, card)
        contents |= {**shards, CARD: digest_bytes(card)}
        message = f"Reshard {self._checkpoint.source} into {plural(len(shards), 'file')}"
        sha = self._target.publish(head, contents, operations, message)
        with suppress(DestinationError):  # the head is whole, whatever becomes of drafts
            self._target.drop(self.name)
        with suppress(DestinationError):
            self.notes += map(self._told, filter(_DRAFT.fullmatch, self._target.branches()))
        return sha

    def _told(self, draft: str) -> str:
        repo_id = self._target.repo_id
        return (
            f"{repo_id} still has the branch {draft}, the draft of a run that did not end: unless it goes "
            f'on, remove it (HfApi().delete_branch("{repo_id}", branch="{draft}"))'
        )

    def _digests(self) -> dict[str, str]:
        """Return the digests of all tensors; none where some were not verified."""
        found = {n: d for finished in self.finished.values() for n, d in finished.digests.items()}
        return found if len(found) == len(self._checkpoint.tensors) else {}

    def report(self, sha: str, reused: tuple[str, ...], moved: float, seconds: float) -> ShardReport:
        """Say what was done."""
        checkpoint, plan = self._checkpoint, self._plan
        destination = f"{self._target.folder}@{sha}"
        verification = Verification(
            source=checkpoint.source,
            destination=destination,
            tensors=len(checkpoint.tensors),
            nbytes=checkpoint.total_bytes,
            cast=sum(tensor.is_cast for shard in plan.shards for tensor in shard.tensors),
            mismatches=(),
            missing=(),
            extra=(),
            digests=self._digests(),
            seconds=self._checking_seconds,
            received=checkpoint.place.folder is None,
            model=ModelKeys(why_unchecked="the copy lies on the Hub"),
            files=len(self._in_memory),
            files_in_memory=None if None in self._in_memory else sum(filter(None, self._in_memory)),
        )
        outcomes = [Outcome(finished.lost) for finished in self.finished.values()]
        return ShardReport(
            source=checkpoint.source,
            destination=destination,
            files={shard.file: shard.nbytes for shard in plan.shards},
            tensors=len(checkpoint.tensors),
            nbytes=plan.total_bytes,
            dtype=plan.dtype,
            lost=total_lost(plan, outcomes),
            reused=reused,
            side_files=checkpoint.side_files,
            left_out=checkpoint.left_out,
            verification=verification if self._verify else None,
            copy_seconds=moved,
            seconds=seconds,
            notes=(*checkpoint.summary().notes, *plan.summary().notes, *self.notes),
            kept=plan.kept,
        )


def _note_of(file: str) -> str:
    return f"{_NOTES}/{file}.json"
