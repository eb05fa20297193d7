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
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from shardkit.base import pages
from shardkit.base.errors import DestinationError, PlanError, VerificationError
from shardkit.base.jobs import ProgressCount, run_all
from shardkit.base.record import listed, plural
from shardkit.load.seen import ModelKeys
from shardkit.plan.plan import Shard
from shardkit.shard.destination import (
    check_destination,
    discard,
    discard_unfinished,
    part_folder,
    parts,
)
from shardkit.shard.folder_store import FolderStore
from shardkit.shard.report import Verification
from shardkit.shard.side_files import altered_files
from shardkit.shard.store import Job
from shardkit.shard.tasks import Lost, Outcome
from shardkit.shard.verify import read_back, verify_headers

FINISH: Literal["finish"] = "finish"
Part: TypeAlias = tuple[int, int] | Literal["finish"]
_RECORD = "part.json"


def check_part(part: Part, *, free_source: bool = False) -> None:
    """Refuse a part that there cannot be.

    Raises
    ------
    PlanError
        If its number is not from 1 to that of all; or if it would free a source that others need.
    """
    if free_source:
        raise PlanError("a part cannot free the source, which other parts need: leave out free_source")
    if part != FINISH and not 1 <= part[0] <= part[1]:
        raise PlanError(f"there is no part {part[0]} of {part[1]}: the first is 1, the last {part[1]}")


def is_part(destination: str) -> bool:
    """Whether a report is of a part, which is not published yet."""
    return ".shardkit-part-" in destination


@dataclass(frozen=True)
class _Record:
    """What lies beside the shards of a part: of which job it is, what casts lost, proof, and their states.

    A state is size and time of the last change, in nanoseconds.
    """

    job: str
    lost: dict[str, list[Lost]]
    verification: Verification | None
    states: dict[str, list[int]]

    @classmethod
    def read(cls, folder: Path) -> _Record:
        try:
            said = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            lost = {file: [Lost(*loss) for loss in losses] for file, losses in said["lost"].items()}
            proof = said["verification"] and Verification.from_dict(said["verification"])
            return cls(said["job"], lost, proof, said["states"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{folder / _RECORD} is damaged or gone: remove {folder}, and make that part again"
            raise DestinationError(why) from error

    def write(self, folder: Path) -> None:
        proof = self.verification and self.verification.to_dict()
        said = {"job": self.job, "lost": self.lost, "verification": proof, "states": self.states}
        text = json.dumps(said, default=astuple)
        (folder / _RECORD).write_text(text, encoding="utf-8")


def finished_parts(job: Job, target: Path, of: int | None = None) -> dict[tuple[int, int], _Record]:
    """Return the parts of a job that are there; refuse those of another one, or of another number of parts.

    Raises
    ------
    DestinationError
        If a part beside the destination is of another source or plan, or of another number of parts.
    """
    found = {number: _Record.read(folder) for folder, number in parts(target).items() if folder.is_dir()}
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


def _state(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


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
        lost = _Record.read(self.folder).lost
        self.finished = {shard.file: Outcome(tuple(lost[shard.file])) for shard in self.job.plan.shards}
        yield

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Read the shards back, write the record, and put the folder where the last part will look for it."""
        if self._is_made:
            return str(self.destination), _Record.read(self.folder).verification
        self.settle()
        proof = self._proof() if self.job.verify else None
        states = {file: _state(self.folder / file) for file in self.finished}
        lost = {file: [*outcome.lost] for file, outcome in self.finished.items()}
        _Record(self._whole, lost, proof, states).write(self.folder)
        return super().publish([*files, _RECORD])[0], proof

    def _verify(self) -> None:
        """Leave it at the proof in the record."""

    def _proof(self) -> Verification:
        job, shards = self.job, self.job.plan.shards
        start, in_memory = time.perf_counter(), pages.drop(self.folder / shard.file for shard in shards)
        count = ProgressCount(job.crew.progress, "verify", sum(shard.nbytes for shard in shards))
        digests: dict[str, str] = {}

        def proven(shard: Shard) -> dict[str, str]:
            return read_back(job, shard, self.finished[shard.file], self.folder)

        with run_all(proven, shards, job.crew.workers) as results:
            for shard, found in results:
                digests |= found
                count.add(shard.nbytes)
        return Verification(
            source=job.checkpoint.source,
            destination=str(self.destination),
            tensors=len(job.checkpoint.tensors),
            nbytes=job.checkpoint.total_bytes,
            cast=sum(tensor.is_cast for shard in shards for tensor in shard.tensors),
            digests=digests,
            seconds=time.perf_counter() - start,
            received=job.is_received,
            model=ModelKeys(why_unchecked="it is a part of a model"),
            files=len(shards),
            files_in_memory=in_memory,
        )


class JoinedStore(FolderStore):
    """The destination of a job whose parts are all finished; as `FolderStore`."""

    def __init__(self, job: Job, target: Path, overwrite: bool) -> None:
        super().__init__(job, target, overwrite, resume=True)
        self._records: dict[tuple[int, int], _Record] = {}

    def _take_over(self) -> None:
        """Link the shards of all parts into one folder, which a killed run may have begun."""
        begun = json.dumps({"joined": self.fingerprint}) + "\n"
        if not (self._journal.is_file() and self._journal.read_text() == begun and self.folder.is_dir()):
            discard_unfinished(self.destination)
            self.folder.mkdir()
            self._write_journal(begun.strip())
        self._records = finished_parts(self.job, self.destination)
        lost = {file: losses for record in self._records.values() for file, losses in record.lost.items()}
        states = {file: state for record in self._records.values() for file, state in record.states.items()}
        sources = {
            file: part_folder(self.destination, *n) for n, r in self._records.items() for file in r.lost
        }
        for shard in self.job.plan.shards:
            if shard.file not in lost:
                raise DestinationError(f"{self.destination}: not all parts of it are finished")
            if _state(made := sources[shard.file] / shard.file) != states[shard.file]:
                raise DestinationError(
                    f"{made} was changed after it was verified: remove {made.parent}, and make it again"
                )
            _link(made, self.folder / shard.file, shard.nbytes)
            self.finished[shard.file] = Outcome(tuple(lost[shard.file]))
            self._wrote(shard.file)

    def _check_finished(self) -> None:
        """Leave it at what the parts have found."""

    def _verify(self) -> Verification:
        proofs = [record.verification for record in self._records.values()]
        if wrong := altered_files(self.job, self.folder):
            raise VerificationError(
                f"{self.destination}: not published: {listed(wrong)} not as in the source"
            )
        found, proven = verify_headers(self.job, self.folder), [proof for proof in proofs if proof]
        digests = {name: digest for proof in proven for name, digest in proof.digests.items()}
        if not found.equal or digests.keys() != self.job.checkpoint.tensors.keys():
            why = found.why_unequal or "a part of it was made with verify=False"
            raise VerificationError(f"{self.destination}: not published: {why}")
        in_memory = [proof.files_in_memory for proof in proven]
        return replace(
            found,
            destination=str(self.destination),
            digests=digests,
            seconds=found.seconds + sum(proof.seconds for proof in proven),
            received=self.job.is_received,
            files=sum(proof.files for proof in proven),
            files_in_memory=None if None in in_memory else sum(filter(None, in_memory)),
        )

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Publish; then the parts are of no more use."""
        published = super().publish(files)
        for folder in parts(self.destination):
            discard(folder, folder)
        self.notes.append(f"made in {plural(len(self._records), 'part')}")
        return published


def _link(source: Path, target: Path, nbytes: int) -> None:
    """Give a shard a second name, or move it where a file has one only."""
    if not target.exists() and source.is_file():
        try:
            os.link(source, target)
        except OSError:
            source.rename(target)
    if not (target.is_file() and target.stat().st_size == nbytes):
        raise DestinationError(
            f"{source} is missing or damaged: remove {source.parent}, then run that part again"
        )
