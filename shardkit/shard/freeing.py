"""A source whose disk space goes over to its shards, so that no disk needs room for both; no tensor is lost.

A shard is proven once it is on the disk, was read back and compared with the source, and the journal has its
digests. What only proven shards were made of is cut off the end of its file, so shards are made from the end,
one after the other. A file that was cut is refused by every reader; one with holes would be read as zeros.
When all are proven, what is left of the files is removed, and then the result is put in place. From the first
cut on, `.out.shardkit-source` beside the destination has what the source was: with it a run resumes, and so
long nothing discards the shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from shardkit.base.errors import CheckpointError, PlanError, ShardkitError, VerificationError
from shardkit.base.jobs import ProgressCount, run_all
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.layout import find_weights
from shardkit.formats.names import is_index
from shardkit.plan.plan import Shard
from shardkit.shard.copy import run_task
from shardkit.shard.destination import beside, sync
from shardkit.shard.folder_store import FolderStore
from shardkit.shard.freeable import lock
from shardkit.shard.side_files import write_side_files
from shardkit.shard.store import Job
from shardkit.shard.tasks import Outcome, Received, shard_tasks
from shardkit.shard.verify import checked, verify_headers
from shardkit.sources.fileset import State

_CHANGED = "changed since it was opened to be freed; the rest of it was not touched"


class FreeingStore(FolderStore):
    """A folder that becomes `destination` while its source is freed; as `FolderStore`."""

    is_sending = True

    def __init__(self, job: Job, target: Path, overwrite: bool, resume: bool) -> None:
        if overwrite or not job.verify:
            given = "overwrite=True" if overwrite else "verify=False"
            raise PlanError(f"{given} and free_source=True exclude each other: leave out free_source")
        super().__init__(job, target, overwrite, resume)
        self._record = beside(self.destination, "source")
        self._states: dict[str, State | None] = {}
        self._proven: set[str] = set()  # unlike `finished`, only once the journal on the disk has them

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the store and its source; find out what could be wrong in the end before anything is freed."""
        with self._held(), super().open():
            if not self._record.exists():
                self._rehearse()
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Lock what is left of the source, which another run may free, too; before it is looked at again."""
        with ExitStack() as held:
            for path in map(self.job.checkpoint.path, self.job.checkpoint.files):
                with suppress(FileNotFoundError):
                    lock(held.enter_context(open(path, "r+b")), path)
            yield

    def ordered(self, todo: Sequence[Shard]) -> list[Shard]:
        """Return shards from the end of the source on."""
        number = {file: place for place, file in enumerate(self.job.checkpoint.files)}

        def end(shard: Shard) -> tuple[int, int]:
            sources = (tensor.source for tensor in shard.tensors)
            return max(((number[s.file], s.offset + s.nbytes) for s in sources), default=(-1, 0))

        return sorted(todo, key=end, reverse=True)

    def put(self, shard: Shard, outcome: Outcome) -> None:
        """Prove a shard, journal its digests, and free what only proven shards needed; as `Store.put`."""
        sync(self.folder)
        digests = checked(replace(self.job, free_source=False), shard, outcome, self.folder).digests
        begins = ((t, shard.header_bytes + t.begin) for t in shard.tensors)
        proven = tuple(Received(begin, t.nbytes, digests[t.source.name]) for t, begin in begins)
        super().put(shard, outcome._replace(received=proven))
        sync(self._journal)
        self._proven.add(shard.file)
        self._remember()
        self._cut()

    def _rehearse(self) -> None:
        """Try the cast, and write all but the tensors, of which a model must get what the source gives it."""
        job = self.job
        if job.plan.dtype and not job.allow_overflow:
            tasks = [t for s in job.plan.shards for t in shard_tasks(s, job.checkpoint.place, os.devnull)]
            count = ProgressCount(job.crew.progress, "cast", sum(task.nbytes for task in tasks))
            outcomes = []
            with run_all(run_task, tasks, job.crew.workers, job.crew.executor) as results:
                for task, outcome in results:
                    outcomes.append(outcome)
                    count.add(task.nbytes)
            job.refuse_overflow(outcomes)
        begun = [job.begin(s, self.folder) for s in job.plan.shards if s.file not in self.finished]
        write_side_files(job, self.folder, lambda: None)
        found = verify_headers(job, self.folder)
        for path in begun:
            path.unlink()  # a disk that is memory has made pages of what was mapped
        if not found.equal:
            raise VerificationError(f"{self.destination}: nothing was freed: {found.why_unequal}")

    def _needed(self, proven: Collection[str]) -> dict[str, int]:
        """Return how many bytes of each source file stay: its header, and what is not in proven shards."""
        ends = {t.file: t.offset for t in reversed(self.job.checkpoint.tensors.values())}
        for shard in (shard for shard in self.job.plan.shards if shard.file not in proven):
            for tensor in (tensor.source for tensor in shard.tensors):
                ends[tensor.file] = max(ends[tensor.file], tensor.offset + tensor.nbytes)
        return ends

    def _remember(self) -> None:
        """Record what the source is, for good before a byte of it is freed."""
        if not self._record.exists():
            checkpoint, draft = self.job.checkpoint, self.folder / self._record.name
            exact = {"config": checkpoint.config, "seen": checkpoint.seen, "planned": self._planned()}
            draft.write_text(json.dumps(checkpoint.to_dict() | exact), encoding="utf-8")
            sync(draft)
            draft.rename(self._record)
            sync(self._record.parent)

    def _planned(self) -> str:
        plan = self.job.plan
        files = f"{plural(len(plan.shards), 'file')} of at most {plan.max_shard_size:,} bytes"
        return f"{files}, strategy {plan.strategy}, {plan.dtype or 'as stored'}"

    def _cut(self) -> None:
        checkpoint = self.job.checkpoint
        for file, end in self._needed(self._proven).items():
            state = self._state(file)
            if state is not None and int(state[0]) > end:
                self._check_state(file)
                os.truncate(checkpoint.path(file), end)
                self._states[file] = self._state(file)

    def _state(self, file: str) -> State | None:
        try:
            return self.job.checkpoint.place.state(file)
        except CheckpointError:
            return None

    def _check_state(self, file: str) -> None:
        if self._state(file) != self._states[file]:
            raise CheckpointError(_CHANGED, file=self.job.checkpoint.path(file))

    def _take_stock(self, finished: Collection[str]) -> None:
        """Refuse a source that is not what it was, but for what earlier runs have cut off or removed."""
        checkpoint, floor = self.job.checkpoint, self._needed({s.file for s in self.job.plan.shards})
        for file, end in self._needed(finished).items():
            was, now = checkpoint.seen[file], self._state(file)
            is_cut = now is not None and end <= int(now[0]) < int(was[0]) and now[2] == was[2]
            if now != was and not is_cut and (now is not None or end > floor[file]):
                raise CheckpointError(
                    f"is not what it was: {plural(end, 'byte')} of it are not in finished shards",
                    file=checkpoint.path(file),
                )
            self._states[file] = now

    def _read_journal(self) -> dict[str, Outcome]:
        found = super()._read_journal()
        self._take_stock(found)  # before what is not finished is removed
        return found

    def _check_finished(self) -> None:
        super()._check_finished()
        self._take_stock(self.finished)
        sync(self._journal)
        self._proven.update(self.finished)

    def _check_unchanged(self) -> None:
        super()._check_unchanged()
        for file in self._states:
            self._check_state(file)

    def _space(self) -> tuple[int, int]:
        """Return what the disk needs at most while it takes over from the source, instead of all shards."""
        needed, free = super()._space()
        folder = self.job.checkpoint.place.folder
        if folder is None or folder.stat().st_dev != self.destination.parent.stat().st_dev:
            return needed, free
        todo = self.ordered([shard for shard in self.job.plan.shards if shard.file not in self.finished])
        done, rises, kept = set(self.finished), [0], sum(self._needed(self.finished).values())
        made = 0
        for shard in todo:
            made += shard.nbytes
            rises.append(made - kept + sum(self._needed(done).values()))
            done.add(shard.file)
        return needed - made + max(rises), free

    def _explained(self, error: OSError) -> ShardkitError:
        """Return what a failed system call means; those that name a file of weights would have freed it."""
        if error.filename in map(self.job.checkpoint.path, self.job.checkpoint.files):
            return CheckpointError(f"cannot be freed: {error.strerror}", file=error.filename)
        return super()._explained(error)

    def _put_in_place(self) -> None:
        """Remove the weights of the source and their index, of which no byte is needed, then publish."""
        checkpoint, place = self.job.checkpoint, self.job.checkpoint.place
        for file in (*filter(self._is_spent, list(place.names())), *checkpoint.files):
            with suppress(FileNotFoundError):
                os.unlink(checkpoint.path(file))
        sync(Path(checkpoint.folder))
        self.freed = {file: int(checkpoint.seen[file][0]) for file in checkpoint.files}
        size = format_size(sum(self.freed.values()))
        self.notes.append(
            f"the source was freed: {plural(len(self.freed), 'file')} of weights ({size}) removed after all "
            "tensors were verified; its other files are as they were"
        )
        super()._put_in_place()
        self._record.unlink(missing_ok=True)

    def _is_spent(self, file: str) -> bool:
        """Whether a file is an index of nothing but what is removed."""
        with suppress(CheckpointError):
            weights = find_weights(self.job.checkpoint.place, None, file).files if is_index(file) else ()
            return bool(weights) and set(weights) <= set(self.job.checkpoint.files)
        return False
