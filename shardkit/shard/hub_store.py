"""From Hub to Hub: each shard is made from ranged reads, checked, uploaded, dropped.

Neither model ever lies on this disk. Finished shards are committed to a draft branch of the target, so that a
run that was killed goes on from there, on this machine or another; the head changes once, at the end, in one
commit that takes the shards over from the draft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy

from shardkit.base.errors import CastError, DestinationError, VerificationError
from shardkit.base.jobs import run_all
from shardkit.base.record import plural
from shardkit.plan.plan import Shard
from shardkit.shard.hub_target import Target, described, is_same
from shardkit.shard.model_card import CARD, model_card, own_readme, shown_card
from shardkit.shard.relay import RelayStore, work_space
from shardkit.shard.report import Verification
from shardkit.shard.sending import OTHER_DISK, Errand, Sending, Sent, make_and_send, send
from shardkit.shard.store import Job
from shardkit.shard.tasks import Outcome
from shardkit.shard.verify import Checked
from shardkit.sources.hub import RemoteFile
from shardkit.sources.hub_client import quiet
from shardkit.sources.resolve import is_on_hub

_DRAFT = re.compile(r"shardkit-[0-9a-f]{16}")
_NOTES = ".shardkit"  # a folder of the draft branch: what is known of each shard there


class HubStore(RelayStore):
    """A repository of the Hub, by way of a draft branch of it; as `Store`."""

    other_disk = OTHER_DISK

    def __init__(self, job: Job, target_id: str, token: str | None, private: bool, base: Path) -> None:
        self._target, self._private = Target(target_id, token), private
        super().__init__(job, base)
        source = job.checkpoint.source
        if source.lower().startswith(f"{self._target.folder}@".lower()):
            raise DestinationError(
                f"{self._target.folder}: source and target are the same; choose another repository"
            )
        self._committing = Lock()
        self._sent: dict[str, Sent] = {}
        self._readme = own_readme(job.checkpoint)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold a folder of this job's own, and the draft branch; as `Store.open`."""
        with quiet(), work_space(self.base, self.name, self.other_disk):
            self._target.create(self._private)
            self._take_over()
            try:
                yield
            except BaseException as error:
                if self.finished:
                    error.add_note(
                        f"{plural(len(self.finished), 'finished shard')} kept on the branch {self.name} of "
                        f"{self._target.repo_id}: run again to resume"
                    )
                elif isinstance(error, (CastError, VerificationError)):  # a draft without any is of no use
                    with suppress(DestinationError):
                        self._target.drop(self.name)
                raise

    def _take_over(self) -> None:
        shown_card(self._target.head(), self._readme)  # a card that cannot be kept is better refused now
        draft = self._target.branch_off(self.name)
        self._draft_head, listing = draft.sha, draft.listing
        shards = self.job.plan.shards
        candidates = [s for s in shards if s.file in listing and _note_of(s.file) in listing]
        with run_all(lambda s: draft.read_bytes(_note_of(s.file)), candidates) as notes:
            for shard, note in notes:
                sent = Sent.of(note)
                if sent and self._is_usable(shard, sent, listing[shard.file]):
                    self._keep(shard.file, sent, Checked(sent.digests))

    def _is_usable(self, shard: Shard, sent: Sent, there: RemoteFile) -> bool:
        self.job.refuse_overflow([Outcome(sent.lost)])
        is_checked = len(sent.digests) == len(shard.tensors) or not self.job.verify
        return is_checked and sent.content.size == shard.nbytes and is_same(there, sent.content)

    def at_once(self, todo: Sequence[Shard]) -> int:
        """Return how many shards may be under way; as `RelayStore.at_once` where they are made here."""
        return self.job.crew.workers + 1 if self.job.crew.executor else super().at_once(todo)

    def errand(self, shard: Shard) -> tuple[Callable[[Any], Outcome], list[Any]] | None:
        """Return what an executor's worker has to do; as `Store.errand`."""
        if not self.job.crew.executor:
            return None
        return make_and_send, [Errand(self.job.of([shard]), self._target.repo_id, self.name, self.base)]

    def put(self, shard: Shard, outcome: Outcome) -> None:
        """Check a shard, send it, note it on the draft, drop it; what a worker has sent is only noted."""
        file, branch = shard.file, self.name
        done: Sending = outcome.sent or send(self.job, shard, outcome, self.folder, self._target, branch)
        sent = done.sent
        note = CommitOperationAdd(_note_of(file), json.dumps(asdict(sent)).encode())
        with self._committing:
            self._draft_head = self._target.commit(
                [done.shown, note], {file: sent.content}, f"Draft of {file}", self._draft_head, branch
            )
            self._keep(file, sent, done.checked)
        (self.folder / file).unlink(missing_ok=True)

    def _keep(self, file: str, sent: Sent, check: Checked) -> None:
        self._sent[file], self.checks[file], self.finished[file] = sent, check, Outcome(sent.lost)

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Make the head show all of it, in one commit; then the draft is of no more use."""
        plan, source, head = self.job.plan, self.job.checkpoint, self._target.head()
        shards = {shard.file: self._sent[shard.file].content for shard in plan.shards}
        found = self.verification(self._target.folder, "on the Hub")
        card = model_card(head, self._readme, source, shards, plan.made, found.digests if found else {})
        operations: dict[str, Any] = {n: CommitOperationCopy(n, n, src_revision=self.name) for n in shards}
        operations |= {name: CommitOperationAdd(name, self.folder / name) for name in files}
        operations[CARD] = CommitOperationAdd(CARD, card)
        contents = {name: described(self.folder / name) for name in files}
        contents |= {**shards, CARD: described(card)}
        self.check_source()
        what = source.source if is_on_hub(source.source) else "a checkpoint"  # an address stays private
        message = f"Reshard {what} into {plural(len(shards), 'file')}"
        sha = self._target.publish(head, contents, operations, message)
        with suppress(DestinationError):  # the head is whole, whatever becomes of drafts
            self._target.drop(self.name)
        with suppress(DestinationError):
            self.notes += map(self._told, filter(_DRAFT.fullmatch, self._target.branches()))
        destination = f"{self._target.folder}@{sha}"
        return destination, found and replace(found, destination=destination)

    def _told(self, draft: str) -> str:
        repo_id = self._target.repo_id
        return (
            f"{repo_id} still has the branch {draft}, left by an interrupted run: resume that run, or delete "
            f'the branch (HfApi().delete_branch("{repo_id}", branch="{draft}"))'
        )


def _note_of(file: str) -> str:
    return f"{_NOTES}/{file}.json"
