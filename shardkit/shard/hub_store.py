"""From Hub to Hub: each shard is made from ranged reads, checked, uploaded, dropped.

Neither model ever lies on this disk. Finished shards are committed to a draft branch of the target, so that a
run that was killed goes on from there, on this machine or another; the head changes once, at the end, in one
commit that takes the shards over from the draft.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import xxhash
from huggingface_hub import CommitOperationAdd, CommitOperationCopy

from shardkit.base import pages
from shardkit.base.errors import CastError, DestinationError, SpaceError, VerificationError
from shardkit.base.jobs import Crew, run_all
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.load.seen import ModelKeys
from shardkit.plan.plan import Shard
from shardkit.shard.copy import Lost, Outcome
from shardkit.shard.destination import beside, free_bytes, locked, remove_leftovers, sync
from shardkit.shard.hub_target import Target, described, is_same
from shardkit.shard.model_card import CARD, model_card, own_readme, shown_card
from shardkit.shard.report import Verification
from shardkit.shard.store import Job, Store
from shardkit.shard.verify import altered, digest_range, shard_range
from shardkit.sources.hub import RemoteFile
from shardkit.sources.hub_client import quiet

_DRAFT = re.compile(r"shardkit-[0-9a-f]{16}")
_NOTES = ".shardkit"  # a folder of the draft branch: what is known of each shard there


@contextmanager
def _work_space(base: Path, name: str) -> Iterator[None]:
    """Hold a folder of this job's own, gone on every way out; remove what killed runs have left."""
    folder = beside(base / name, "staging")
    base.mkdir(parents=True, exist_ok=True)
    for left in base.glob(".shardkit-*.shardkit-*"):
        with suppress(DestinationError):  # it is held by a run that is alive
            remove_leftovers(base / left.name[1:].partition(".")[0])
    with locked(base / name):
        folder.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Say of what fails on a work folder's disk where it was, and what to do."""
    try:
        yield
    except ConnectionError:  # of no disk
        raise
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DestinationError
        raise kind(
            f"{folder}: {error.strerror or error}; run again to resume, or use a work_folder on another disk"
        ) from error


@dataclass(frozen=True)
class _Sent:
    """A shard that the draft branch has: its content, what casts lost in it, its tensors' digests."""

    content: RemoteFile
    lost: tuple[Lost, ...]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, note: bytes) -> _Sent | None:
        """Read what was committed beside it; None where that is not one of ours."""
        with suppress(ValueError, KeyError, TypeError):
            said: dict[str, Any] = json.loads(note)
            lost = tuple(Lost(**loss) for loss in said["lost"])
            return cls(RemoteFile(**said["content"]), lost, dict(said["digests"]))
        return None


class HubStore(Store):
    """A repository of the Hub, by way of a draft branch of it; as `Store`."""

    stage = "stream"

    def __init__(self, job: Job, target_id: str, token: str | None, private: bool, base: Path) -> None:
        self._target, self._private = Target(target_id, token), private
        self._base = base.expanduser().resolve()
        source = job.checkpoint.source
        self._draft = f"shardkit-{xxhash.xxh3_64_hexdigest(job.told(source))}"
        super().__init__(job, beside(self._base / self._draft, "staging"))
        if source.lower().startswith(f"{self._target.folder}@".lower()):
            raise DestinationError(
                f"{self._target.folder}: source and target are the same; choose another repository"
            )
        self._committing = Lock()
        self._sent: dict[str, _Sent] = {}
        self._readme = own_readme(job.checkpoint)
        self._checking_seconds = 0.0
        self._in_memory: list[int | None] = []  # of each shard that was read back, whether it was in memory

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold a folder of this job's own, and the draft branch; as `Store.open`."""
        with quiet(), _disk(self._base), _work_space(self._base, self._draft):
            self._target.create(self._private)
            self._take_over()
            with self._keeping():
                yield

    def _take_over(self) -> None:
        """Find the draft branch, or make it, and see which shards it has."""
        shown_card(self._target.head(), self._readme)  # a card that cannot be kept is better refused now
        draft = self._target.branch_off(self._draft)
        self._draft_head, listing = draft.sha, draft.listing
        shards = self.job.plan.shards
        candidates = [s for s in shards if s.file in listing and _note_of(s.file) in listing]
        with run_all(lambda s: draft.read_bytes(_note_of(s.file)), candidates) as notes:
            for shard, note in notes:
                sent = _Sent.of(note)
                if sent and self._is_usable(shard, sent, listing[shard.file]):
                    self._sent[shard.file], self.finished[shard.file] = sent, Outcome(sent.lost)

    def _is_usable(self, shard: Shard, sent: _Sent, there: RemoteFile) -> bool:
        self.job.refuse_overflow([Outcome(sent.lost)])
        is_checked = len(sent.digests) == len(shard.tensors) or not self.job.verify
        return is_checked and sent.content.size == shard.nbytes and is_same(there, sent.content)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Say what is finished if the job fails; a draft without any is of no use."""
        try:
            yield
        except BaseException as error:
            if self.finished:
                error.add_note(
                    f"{plural(len(self.finished), 'finished shard')} kept on the branch {self._draft} of "
                    f"{self._target.repo_id}: run again to resume"
                )
            elif isinstance(error, (CastError, VerificationError)):
                with suppress(DestinationError):
                    self._target.drop(self._draft)
            raise

    def at_once(self, todo: Sequence[Shard]) -> int:
        """Return one more than there are workers, which make shards or send them, or what the disk holds."""
        largest = max(shard.nbytes for shard in todo)
        free = free_bytes(self.folder)
        if free < largest:
            raise SpaceError(
                f"{self._base}: a shard needs up to {largest:,} bytes ({format_size(largest)}), but its "
                f"disk has only {free:,} ({format_size(free)}) free: lower max_shard_size, or use a "
                "work_folder on another disk"
            )
        return min(self.job.crew.workers + 1, free // largest)

    def sends(self, shard: Shard) -> int:
        """Return the bytes of the file."""
        return shard.nbytes

    def put(self, shard: Shard, outcome: Outcome) -> None:
        """Check a shard, send it, note it on the draft, drop it."""
        path, file = self.folder / shard.file, shard.file
        self.job.refuse_overflow([outcome])
        digests = self._check(shard, outcome) if self.job.verify else {}
        sent = _Sent(described(path), outcome.lost, digests)
        shown = self._target.upload(file, path, sent.content, self._draft)
        note = CommitOperationAdd(_note_of(file), json.dumps(asdict(sent)).encode())
        with self._committing:
            self._draft_head = self._target.commit(
                [shown, note], {file: sent.content}, f"Draft of {file}", self._draft_head, self._draft
            )
            self._sent[file], self.finished[file] = sent, Outcome(sent.lost)
        path.unlink()

    def _check(self, shard: Shard, outcome: Outcome) -> dict[str, str]:
        """Read a shard back, compare it with what was received, and digest its tensors."""
        start, path = time.perf_counter(), self.folder / shard.file
        sync(path)
        self._in_memory.append(pages.drop([path]))
        if altered(replace(self.job, crew=Crew(1)), {shard.file: outcome}, self.folder):
            raise VerificationError(
                f"{path}: differs from what was received: the disk may be failing; nothing was sent"
            )
        digests = {t.source.name: digest_range(shard_range(self.folder, shard, t)) for t in shard.tensors}
        self._checking_seconds += time.perf_counter() - start
        return digests

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Make the head show all of it, in one commit; then the draft is of no more use."""
        plan, source, head = self.job.plan, self.job.checkpoint, self._target.head()
        shards = {shard.file: self._sent[shard.file].content for shard in plan.shards}
        card = model_card(head, self._readme, source, shards, plan.made, self._digests())
        operations: dict[str, Any] = {n: CommitOperationCopy(n, n, src_revision=self._draft) for n in shards}
        operations |= {name: CommitOperationAdd(name, self.folder / name) for name in files}
        operations[CARD] = CommitOperationAdd(CARD, card)
        contents = {name: described(self.folder / name) for name in files}
        contents |= {**shards, CARD: described(card)}
        message = f"Reshard {source.source} into {plural(len(shards), 'file')}"
        sha = self._target.publish(head, contents, operations, message)
        with suppress(DestinationError):  # the head is whole, whatever becomes of drafts
            self._target.drop(self._draft)
        with suppress(DestinationError):
            self.notes += map(self._told, filter(_DRAFT.fullmatch, self._target.branches()))
        destination = f"{self._target.folder}@{sha}"
        return destination, self._verification(destination) if self.job.verify else None

    def _told(self, draft: str) -> str:
        repo_id = self._target.repo_id
        return (
            f"{repo_id} still has the branch {draft}, left by an interrupted run: resume that run, or delete "
            f'the branch (HfApi().delete_branch("{repo_id}", branch="{draft}"))'
        )

    def _digests(self) -> dict[str, str]:
        """Return the digests of all tensors; none where some were not verified."""
        found = {n: d for sent in self._sent.values() for n, d in sent.digests.items()}
        return found if len(found) == len(self.job.checkpoint.tensors) else {}

    def _verification(self, destination: str) -> Verification:
        checkpoint, plan = self.job.checkpoint, self.job.plan
        return Verification(
            source=checkpoint.source,
            destination=destination,
            tensors=len(checkpoint.tensors),
            nbytes=checkpoint.total_bytes,
            cast=sum(tensor.is_cast for shard in plan.shards for tensor in shard.tensors),
            digests=self._digests(),
            seconds=self._checking_seconds,
            received=self.job.is_received,
            model=ModelKeys(why_unchecked="the copy is on the Hub"),
            files=len(self._in_memory),
            files_in_memory=None if None in self._in_memory else sum(filter(None, self._in_memory)),
        )


def _note_of(file: str) -> str:
    return f"{_NOTES}/{file}.json"
