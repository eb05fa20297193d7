"""A shard on its way to the Hub, made here or by a worker elsewhere: checked, uploaded, dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from huggingface_hub import CommitOperationAdd

from shardkit.base.cluster import is_cancelled
from shardkit.base.errors import Cancelled
from shardkit.plan.plan import Shard
from shardkit.shard.copy import run_task
from shardkit.shard.hub_target import Target, described
from shardkit.shard.relay import room, work_space
from shardkit.shard.store import Job
from shardkit.shard.tasks import Lost, Outcome, shard_tasks
from shardkit.shard.verify import Checked, checked
from shardkit.sources.hub import RemoteFile
from shardkit.sources.hub_client import quiet

OTHER_DISK = "use a work_folder on another disk"


@dataclass(frozen=True)
class Sent:
    """A shard that the draft branch has: its content, what casts lost in it, its tensors' digests."""

    content: RemoteFile
    lost: tuple[Lost, ...]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, note: bytes) -> Sent | None:
        """Read what was committed beside it; None where that is not one of ours."""
        with suppress(ValueError, KeyError, TypeError):
            said: dict[str, Any] = json.loads(note)
            lost = tuple(Lost(**loss) for loss in said["lost"])
            return cls(RemoteFile(**said["content"]), lost, dict(said["digests"]))
        return None


class Sending(NamedTuple):
    """A shard that was checked and uploaded, and what a commit needs to show it."""

    shown: CommitOperationAdd
    sent: Sent
    checked: Checked


def send(job: Job, shard: Shard, outcome: Outcome, folder: Path, target: Target, branch: str) -> Sending:
    """Read a shard in `folder` back, compare it with what was received, and upload it."""
    job.refuse_overflow([outcome])
    path, found = folder / shard.file, checked(job, shard, outcome, folder)
    content = described(path)
    shown = target.upload(shard.file, path, content, branch)
    return Sending(shown, Sent(content, outcome.lost, found.digests), found)


@dataclass(frozen=True)
class Errand:
    """One shard to be made, checked and uploaded by a worker, on its own disk and with its own token."""

    job: Job
    repo_id: str
    branch: str
    base: Path

    @property
    def nbytes(self) -> int:
        """Source bytes."""
        return sum(tensor.nbytes for tensor in self.job.checkpoint.tensors.values())


def make_and_send(errand: Errand) -> Outcome:
    """Do a worker's errand; what is left to do is a commit."""
    job, base, (shard,) = errand.job, errand.base, errand.job.plan.shards
    name = f"{errand.branch}-{uuid4().hex[:8]}"
    with quiet(), work_space(base, name, OTHER_DISK) as folder:
        room(base, shard.nbytes, OTHER_DISK)
        path, outcome = job.begin(shard, folder), Outcome()
        for task in shard_tasks(shard, job.checkpoint.place, str(path)):
            if is_cancelled():
                raise Cancelled("stopped")
            outcome += run_task(task)
        done = send(job, shard, outcome, folder, Target(errand.repo_id), errand.branch)
        if done.shown._upload_mode != "lfs":  # a small one, which is in the commit itself
            done.shown.path_or_fileobj = path.read_bytes()
    return Outcome(sent=done)
