"""Where shards go: the questions that the engine asks of a folder here, the Hub or a bucket."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from shardkit.base.errors import CastError, CheckpointError
from shardkit.base.jobs import Crew
from shardkit.base.record import listed, plural
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.plan.plan import Shard, ShardPlan
from shardkit.shard.mark import Mark
from shardkit.shard.report import Verification
from shardkit.shard.tasks import Lost, Outcome
from shardkit.sources.fileset import State

_CHANGED = "changed while being copied; nothing was published"


@dataclass(frozen=True)
class Job:
    """One resharding: what is written, and on which terms."""

    checkpoint: Checkpoint
    plan: ShardPlan
    verify: bool
    allow_overflow: bool
    crew: Crew
    free_source: bool = False

    @property
    def is_received(self) -> bool:
        """Whether the source's bytes come over a network, where each is read once."""
        return self.checkpoint.place.folder is None

    @property
    def is_read_once(self) -> bool:
        """Whether finished shards are compared with their digests, not with a source that may be gone."""
        return self.is_received or self.free_source

    def fingerprint(self) -> str:
        """Return the digest of what tells this job from another: its plan, and weights as they are now.

        Other files are copied from scratch by every run. Weights that are freed count as what they were;
        others are refused where they are no longer what was opened.
        """
        checkpoint, shards, states = self.checkpoint, self.plan.shards, []
        files, seen = checkpoint.place.now(), checkpoint.seen
        for file in checkpoint.files:
            state = seen[file] if self.free_source else files.state(file)
            if seen.get(file, state) != state:
                raise CheckpointError(_CHANGED, file=checkpoint.path(file))
            states.append((file, *state[:2]))
        planned = [(s.file, [(t.source.name, t.dtype, t.begin) for t in s.tensors]) for s in shards]
        return xxhash.xxh3_128_hexdigest(json.dumps([states, self.plan.metadata, planned]).encode())

    def beside(self) -> dict[str, State]:
        """Return what would change with the files that are copied as they are; refuse another size."""
        checkpoint, files = self.checkpoint, self.checkpoint.place.now()
        found = {file: files.state(file) for file in checkpoint.side_files}
        for file, state in found.items():
            if state[0] != checkpoint.side_files[file]:
                raise CheckpointError(_CHANGED, file=checkpoint.path(file))
        return found

    def of(self, shards: Sequence[Shard]) -> Job:
        """Return the part of a job that makes some of its shards alone; any process can have it."""
        tensors = {t.source.name: t.source for shard in shards for t in shard.tensors}
        checkpoint = replace(self.checkpoint, tensors=tensors, side_files={})
        checkpoint.seen.update(self.checkpoint.seen)
        plan = replace(self.plan, shards=tuple(shards), side_bytes=0)
        return replace(self, checkpoint=checkpoint, plan=plan, crew=Crew(1))

    def begin(self, shard: Shard, folder: Path) -> Path:
        """Make the file of a shard: its header, and room for its tensors, of which the disk has none yet."""
        path = folder / shard.file
        path.write_bytes(self.plan.header(shard))
        os.truncate(path, shard.nbytes)
        return path

    def lost(self, outcomes: Iterable[Outcome]) -> tuple[Lost, ...]:
        """Add up what casts lost, by tensor: a tensor may have been cast by several tasks."""
        overflowed: Counter[str] = Counter()
        flushed: Counter[str] = Counter()
        for loss in (loss for outcome in outcomes for loss in outcome.lost):
            overflowed[loss.tensor] += loss.overflowed
            flushed[loss.tensor] += loss.flushed
        names = (tensor.source.name for shard in self.plan.shards for tensor in shard.tensors)
        return tuple(Lost(n, overflowed[n], flushed[n]) for n in names if overflowed[n] or flushed[n])

    def refuse_overflow(self, outcomes: Iterable[Outcome]) -> None:
        """Raise `CastError` where a cast made finite values infinite, unless that is allowed."""
        hit = [loss for loss in self.lost(outcomes) if loss.overflowed]
        if hit and not self.allow_overflow:
            named = listed(f"{loss.tensor} ({plural(loss.overflowed, 'value')})" for loss in hit)
            raise CastError(
                f"{self.plan.source}: a cast to {self.plan.dtype} turns finite values infinite in {named}; "
                f"{self._wider(hit)}leave out dtype, or allow it with allow_overflow=True"
            )

    def _wider(self, hit: Sequence[Lost]) -> str:
        """Advise a dtype of wider range: bfloat16 has that of float32, but for its last step."""
        stored = {self.checkpoint.tensors[loss.tensor].dtype for loss in hit}
        if self.plan.dtype == "float16":
            return "choose bfloat16 or float32, or "
        return "choose float32, or " if "F64" not in stored else ""


class Store(ABC):
    """Where a job's shards go: they are made in `folder`, on this machine, and `put` from there.

    `fingerprint` is the job's as it began. `finished` is what is done, by shard: what an earlier run
    finished, once the store is open, and what was `put`. `mark` is what workers elsewhere have to see.
    `freed` are files of the source that were removed, with their sizes in bytes. `notes` are for a person;
    `stage` is what its `Progress` is called, which counts shards again as they are `put`, where that
    `is_sending` them elsewhere or reads them again.
    """

    stage: str
    is_sending = False
    folder: Path

    def __init__(self, job: Job) -> None:
        self.job, self.fingerprint, self._copied = job, job.fingerprint(), job.beside()
        self.finished: dict[str, Outcome] = {}
        self.freed: dict[str, int] = {}
        self.notes: list[str] = []
        self.mark: Mark | None = None

    def make_mark(self) -> None:
        """Make what workers have to see, in `folder`, where an executor has them: they may be elsewhere."""
        if self.job.crew.executor:
            self.mark = Mark.made(self.folder, self.job.checkpoint.place, self.job.checkpoint.files)

    def check_source(self) -> None:
        """Refuse to publish what was read of files that have changed since."""
        if self.job.beside() != self._copied or self.job.fingerprint() != self.fingerprint:
            raise CheckpointError(_CHANGED, file=self.job.checkpoint.source)

    @abstractmethod
    def open(self) -> AbstractContextManager[None]:
        """Hold the store, find what an earlier run of the job finished, refuse what cannot be done.

        Whatever ends the block, what is finished stays, for a run that resumes.
        """

    def ordered(self, todo: Sequence[Shard]) -> list[Shard]:
        """Return shards in the order in which they are to be made."""
        return list(todo)

    @abstractmethod
    def at_once(self, todo: Sequence[Shard]) -> int:
        """Return how many shards may be under way."""

    def errand(self, _: Shard) -> tuple[Callable[[Any], Outcome], list[Any]] | None:
        """Return what a worker calls to make a shard, and with what; None where it is made in `folder`."""
        return None

    @abstractmethod
    def put(self, shard: Shard, outcome: Outcome) -> None:
        """Take over a shard that was made in `folder`; from any thread."""

    def settle(self) -> None:
        """Return when all shards that were put are where they stay."""
        return

    @abstractmethod
    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Put all in place, in one step, with `files`, which are in `folder`; return where, and the proof."""
