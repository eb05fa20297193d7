"""A job in parts, each made by a process that knows nothing of the others; all see the same disk.

Part 3 of 8 is a run of its own, with a destination of its own beside the real one: locked, journaled,
resumable, absent or complete, like any. It has some of the shards, all read back and compared with the
source, and a record of what was found. Whoever finds all eight there links their shards into one folder, and
publishes it: of the shards, no byte is read again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from shardkit.base.errors import DestinationError, PlanError, ShardkitError, VerificationError
from shardkit.base.jobs import ProgressCount, run_all
from shardkit.base.record import Record, listed, plural
from shardkit.plan.plan import Shard
from shardkit.shard.destination import (
    check_destination,
    discard,
    discard_unfinished,
    part_folder,
    parts,
    remove,
)
from shardkit.shard.folder_store import FolderStore
from shardkit.shard.report import Verification
from shardkit.shard.store import Job
from shardkit.shard.tasks import Lost, Outcome
from shardkit.shard.verify import Checked, checked, proof, verify_headers

FINISH: Literal["finish"] = "finish"
Part: TypeAlias = tuple[int, int] | Literal["finish"]
_RECORD = "part.json"


def check_part(part: Part, *, free_source: bool = False) -> None:
    """Refuse a part that there cannot be, and one that would free a source that others need."""
    if free_source:
        raise PlanError("a part cannot free the source, which other parts need: leave out free_source")
    if part != FINISH and not 1 <= part[0] <= part[1]:
        raise PlanError(f"there is no part {part[0]} of {part[1]}: the first is 1, the last {part[1]}")


def is_part(destination: str) -> bool:
    """Whether a report is of a part, which is not published yet."""
    return ".shardkit-part-" in destination


@dataclass(frozen=True)
class _PartRecord(Record):
    """What lies beside the shards of a part: of which job it is, what casts lost, proof, and their states.

    A state is size and time of the last change, in nanoseconds.
    """

    job: str
    lost: dict[str, tuple[Lost, ...]]
    verification: Verification | None
    states: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path) -> _PartRecord:
        try:
            return cls.from_dict(json.loads((folder / _RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, ShardkitError) as error:
            why = f"{folder / _RECORD} is damaged or gone: remove {folder}, and make that part again"
            raise DestinationError(why) from error


def finished_parts(job: Job, target: Path, of: int | None = None) -> dict[tuple[int, int], _PartRecord]:
    """Return the parts of a job that are there; refuse those of another, or of another number of parts."""
    found = {number: _PartRecord.read(folder) for folder, number in parts(target).items() if folder.is_dir()}
    for (number, count), record in found.items():
        if record.job != job.fingerprint():
            raise DestinationError(
                f"{part_folder(target, number, count)}: part {number} of {count} was made of another source "
                f"or plan; run all parts with the same arguments, after `shardkit clean {target}`"
            )
    if len(counts := {count for _, count in found} | ({of} if of else set())) > 1:
        raise DestinationError(
            f"{target}: there are parts of {listed(map(str, sorted(counts)))}; run all with the same number, "
            f"after `shardkit clean {target}`"
        )
    return found


def missing_parts(job: Job, target: Path) -> list[int]:
    """Return the numbers of the parts that are not finished; as `finished_parts`."""
    found = finished_parts(job, target)
    if not found:
        raise DestinationError(f"{target}: no part of it is finished")
    return sorted({*range(1, next(iter(found))[1] + 1)} - {number for number, _ in found})


def _state(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


class PartStore(FolderStore):
    """The folder of one part of a job; as `FolderStore`."""

    def __init__(self, job: Job, target: Path, part: tuple[int, int], overwrite: bool, resume: bool) -> None:
        number, of = part
        if of > (files := len(job.plan.shards)):
            raise PlanError(f"{plural(files, 'file')} cannot be made in {of} parts: choose at most {files}")
        own = replace(job.of(job.plan.shards[number - 1 :: of]), crew=job.crew)
        super().__init__(own, part_folder(target, number, of), overwrite=False, resume=resume)
        check_destination(job.checkpoint, target, overwrite)
        finished_parts(job, target, of)
        self._whole, self._is_made = job.fingerprint(), self.destination.is_dir()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder; one that is finished needs not be held."""
        if not self._is_made:
            with super().open():
                yield
            return
        self.folder = self.destination
        lost = _PartRecord.read(self.folder).lost
        self.finished = {shard.file: Outcome(lost[shard.file]) for shard in self.job.plan.shards}
        yield

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Read the shards back, write the record, and put the folder where the last part will look for it."""
        if self._is_made:
            return str(self.destination), _PartRecord.read(self.folder).verification
        self.settle()
        found = self._proof() if self.job.verify else None
        states = {file: _state(self.folder / file) for file in self.finished}
        lost = {file: outcome.lost for file, outcome in self.finished.items()}
        record = _PartRecord(self._whole, lost, found, states).to_dict()
        (self.folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        return super().publish([*files, _RECORD])[0], found

    def _verify(self) -> None:
        """Leave it at the proof in the record."""

    def _proof(self) -> Verification:
        job, shards, start, checks = self.job, self.job.plan.shards, time.perf_counter(), list[Checked]()
        count = ProgressCount(job.crew.progress, "verify", sum(shard.nbytes for shard in shards))

        def read(shard: Shard) -> Checked:
            return checked(job, shard, self.finished[shard.file], self.folder)

        with run_all(read, shards, job.crew.workers) as results:
            for shard, found in results:
                checks.append(found)
                count.add(shard.nbytes)
        proven = proof(job, checks, str(self.destination), "it is a part of a model")
        return replace(proven, seconds=time.perf_counter() - start)


class JoinedStore(FolderStore):
    """The destination of a job whose parts are all finished; as `FolderStore`."""

    def _take_over(self) -> None:
        """Link the shards of all parts into one folder, which has some already where a run was killed."""
        begun = json.dumps({"joined": self.fingerprint}) + "\n"
        if not (self._journal.is_file() and self._journal.read_text() == begun and self.folder.is_dir()):
            discard_unfinished(self.destination)
            self.folder.mkdir()
            self._write_journal(begun.strip())
        self._records = finished_parts(self.job, self.destination)
        made = {file: number for number, record in self._records.items() for file in record.lost}
        for file in (shard.file for shard in self.job.plan.shards):
            if file not in made:
                raise DestinationError(f"{self.destination}: not all parts of it are finished")
            record, part = self._records[made[file]], part_folder(self.destination, *made[file])
            _link(part / file, staged := self.folder / file)
            if not staged.exists() or _state(staged) != record.states[file]:
                raise DestinationError(
                    f"{part / file} was changed after it was verified: remove {part}, and make it again"
                )
            self.finished[file] = Outcome(record.lost[file])
            self._wrote(file)

    def _check_finished(self) -> None:
        """Leave it at what the parts have found."""

    def _compared(self) -> Verification:
        found = verify_headers(self.job, self.folder)
        proofs = [record.verification for record in self._records.values() if record.verification]
        digests = {name: digest for proof in proofs for name, digest in proof.digests.items()}
        if found.equal and digests.keys() != self.job.checkpoint.tensors.keys():
            raise VerificationError(
                f"{self.destination}: not published: a part of it was made with verify=False"
            )
        in_memory = [proof.files_in_memory for proof in proofs]
        return replace(
            found,
            digests=digests,
            seconds=found.seconds + sum(proof.seconds for proof in proofs),
            received=self.job.is_received,
            files_in_memory=None if None in in_memory else sum(filter(None, in_memory)),
        )

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Publish; then the parts are of no more use."""
        published = super().publish(files)
        for folder in parts(self.destination):
            discard(folder, folder)
        self.notes.append(f"made in {plural(len(self._records), 'part')}")
        return published


def _link(source: Path, target: Path) -> None:
    """Give a shard a second name, or move it where a file has one only, unless an earlier run has done so."""
    if source.exists():
        remove(target)
        try:
            os.link(source, target)
        except OSError:
            source.rename(target)
