"""To a bucket: shards first, each read back, and last the file by which a load finds them.

A bucket has no folders that could be renamed, so one file makes a destination complete: the index, or, where
there is none, the weights themselves, which wait beside it until all else is there. What is known of each
shard that was sent lies beside it, too, so that a run that was killed resumes from there, on any machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from inspect import signature
from pathlib import Path
from typing import Any

from shardkit.base.errors import CheckpointError, DestinationError, VerificationError
from shardkit.base.jobs import run_all
from shardkit.base.record import listed, plural
from shardkit.plan.plan import Shard
from shardkit.shard.digests import digest_range
from shardkit.shard.relay import RelayStore, work_space
from shardkit.shard.report import Verification
from shardkit.shard.store import Job
from shardkit.shard.tasks import Lost, Outcome, Range, file_range
from shardkit.shard.verify import Checked, checked
from shardkit.sources.bucket import BLOCK_BYTES, BucketFiles, reaching
from shardkit.sources.fileset import State

_JOB = "job.json"
_MAX_PARTS = 10_000  # of one upload to S3


class _Place(BucketFiles):
    def __init__(self, address: str) -> None:
        with _as_destination():
            super().__init__(address)

    def send(self, path: Path, name: str) -> None:
        """Send a file, a few megabytes of it at a time."""
        with _as_destination(), reaching(where := self.where(name)):
            system = self.system
            # What some file systems have for uploads; their own defaults hold half a gigabyte.
            part = max(BLOCK_BYTES, -(-path.stat().st_size // _MAX_PARTS))
            known = signature(getattr(system, "_put_file", system.put_file)).parameters
            limits = {"chunksize": part, "max_concurrency": 2}
            system.put_file(str(path), where, **{key: limits[key] for key in limits.keys() & known})
        self.listing[name] = path.stat().st_size, ""

    def take(self, other: _Place, name: str) -> None:
        with _as_destination(), reaching(where := self.where(name)):
            self.system.copy(other.where(name), where)
        self.look(name)

    def look(self, name: str) -> State:
        with _as_destination(), reaching(where := self.where(name)):
            self.listing[name] = self._state(where, self.system.info(where))
        return self.listing[name]

    def digest(self, name: str) -> str:
        """Read a file back; return its XXH3-128."""
        with _as_destination():
            return digest_range(Range(self, name, 0, self.size(name), 0, "", "U8", "U8"))

    def abandon_uploads(self) -> None:
        """End uploads that a kill has cut off: S3 would keep their parts, and charge for them, unseen."""
        system = self.system
        if hasattr(system, "abort_mpu"):
            with suppress(DestinationError), _as_destination(), reaching(self.name):
                bucket, key, _ = system.split_path(self.name)
                for upload in system.list_multipart_uploads(bucket):
                    if upload["Key"].startswith(f"{key}/"):
                        system.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def note(self, name: str) -> dict[str, Any]:
        """Return a note; an empty one where there is none, or none of ours."""
        found: Any = None
        with _as_destination(), suppress(ValueError):
            found = json.loads(self.content(name)) if self.is_file(name) else None
        return found if isinstance(found, dict) else {}

    def drop(self, names: Iterable[str]) -> list[str]:
        found = [name for name in names if self.listing.pop(name, None)]
        with _as_destination(), reaching(self.name):
            if found:
                self.system.rm([self.where(name) for name in found])
        return [self.where(name) for name in found]


@contextmanager
def _as_destination() -> Iterator[None]:
    """Make errors of a destination of those of files."""
    try:
        yield
    except CheckpointError as error:
        raise DestinationError(str(error)) from error


def _places(address: str) -> tuple[_Place, _Place]:
    parent, _, name = address.rpartition("/")
    return _Place(address), _Place(f"{parent}/.{name}.shardkit-journal")


def discard_in_bucket(address: str) -> list[str]:
    """Remove what interrupted runs have sent to a destination that is not complete; return what it was."""
    there, beside = _places(address.rstrip("/"))
    job = beside.note(_JOB)
    sent = [] if job.get("last") in there.listing else there.drop(job.get("names", ()))
    return sent + beside.drop(list(beside.listing))


class BucketStore(RelayStore):
    """Files below an address that fsspec reaches; as `Store`."""

    other_disk = "run it in a folder on another disk"

    def __init__(self, job: Job, address: str, resume: bool, base: Path) -> None:
        super().__init__(job, base)
        self.address, self._resume = address.rstrip("/"), resume
        scheme, _, path = self.address.partition("://")
        if scheme.lower() in ("http", "https"):
            raise DestinationError(f"{self.address} can only be read: choose a folder or a bucket")
        if "/" not in path.strip("/") and scheme.lower() != "memory":
            raise DestinationError(f"{self.address} is a bucket: choose a folder in it")
        if f"{self.address}/".startswith(f"{job.checkpoint.folder}/"):
            raise DestinationError(f"{self.address} is the source, or inside it; choose another address")
        plan = job.plan
        self._last = plan.index_file or plan.shards[0].file
        self._names = [*(shard.file for shard in plan.shards), *job.checkpoint.side_files, self._last]
        self._whole: dict[str, str] = {}  # digests of shards, as files

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold a work folder, and see what an earlier run has sent; as `Store.open`."""
        with work_space(self.base, self.name, self.other_disk):
            self.make_mark()
            self._there, self._beside = _places(self.address)
            self._shards = self._there if self.job.plan.index_file else self._beside
            self._take_over()
            try:
                yield
            except BaseException as error:
                if self.finished:
                    error.add_note(
                        f"{plural(len(self.finished), 'finished shard')} kept in {self._shards}: run again "
                        f"to resume, or `shardkit clean {self.address}` to remove them"
                    )
                raise

    def _take_over(self) -> None:
        job = self._beside.note(_JOB)
        is_same = job.get("fingerprint") == self.fingerprint
        is_complete = job.get("last") in self._there.listing and not is_same
        if foreign := self._there.listing.keys() - (() if is_complete else job.get("names", ())):
            has = f"{plural(len(foreign), 'file')} ({listed(sorted(foreign))})"
            raise DestinationError(
                f"{self.address} already has {has}, which cannot be replaced in one step there: choose "
                "another address, or delete them"
            )
        if is_same and self._resume:
            with run_all(self._recall, self.job.plan.shards) as found:
                self.finished = {shard.file: outcome for shard, outcome in found if outcome}
        elif notes := self._beside.listing.keys() - {_JOB, *self._names}:
            self.notes.append(f"starting over: {plural(len(notes), 'finished shard')} discarded")
        kept = {_JOB, *self.finished, *map(_note_of, self.finished)}
        for place in (self._there, self._beside) if job else ():
            place.abandon_uploads()
        self._there.drop([self._last])  # first: an earlier run may have been killed after its end
        self._there.drop([name for name in self._there.listing if name not in kept])
        self._beside.drop([name for name in self._beside.listing if name not in kept])
        if not is_same:
            self._note(_JOB, {"fingerprint": self.fingerprint, "names": self._names, "last": self._last})

    def _recall(self, shard: Shard) -> Outcome | None:
        """Return what came of a shard that was sent, where all that was noted of it still holds."""
        said = self._beside.note(_note_of(shard.file))
        with suppress(KeyError, TypeError):
            outcome = Outcome(tuple(Lost(*loss) for loss in said["lost"]))
            is_checked = len(said["digests"]) == len(shard.tensors) or not self.job.verify
            if is_checked and said["state"] == list(self._shards.listing.get(shard.file, ())):
                self.job.refuse_overflow([outcome])
                self.checks[shard.file] = Checked(dict(said["digests"]))
                self._whole[shard.file] = said["whole"]
                return outcome
        return None

    def _note(self, name: str, said: dict[str, Any]) -> None:
        path = self.folder / name
        path.write_text(json.dumps(said, default=astuple), encoding="utf-8")
        self._beside.send(path, name)
        path.unlink()

    def put(self, shard: Shard, outcome: Outcome) -> None:
        """Check a shard, send it, read it back, note it, drop it."""
        file, path = shard.file, self.folder / shard.file
        self.job.refuse_overflow([outcome])
        check = self.checks[file] = checked(self.job, shard, outcome, self.folder)
        whole = self._whole[file] = self._send(self._shards, file)
        said = {"state": self._shards.look(file), "whole": whole, "digests": check.digests}
        self._note(_note_of(file), {**said, "lost": outcome.lost})
        self.finished[file] = Outcome(outcome.lost)
        path.unlink()

    def _send(self, place: _Place, file: str) -> str:
        path = self.folder / file
        place.send(path, file)
        digest = digest_range(file_range(path, path.stat().st_size)) if self.job.verify else ""
        self._read_back(place, file, digest)
        return digest

    def _read_back(self, place: _Place, file: str, digest: str) -> None:
        start = time.perf_counter()
        if digest and place.digest(file) != digest:
            place.drop([file])
            raise VerificationError(
                f"{place.where(file)} differed from what was sent, and was deleted: run again to resume"
            )
        check = self.checks.get(file, Checked())
        self.checks[file] = check._replace(seconds=check.seconds + time.perf_counter() - start)

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Send the other files, see that nothing has changed, then send what makes it complete."""
        for file in files:
            if file != self._last:
                self._send(self._there, file)
        self.check_source()
        with _as_destination():
            now = self._shards.now()
            for file in self.finished:
                if now.state(file) != self._shards.state(file):
                    raise CheckpointError(
                        "changed after it was sent; nothing was published", file=now.where(file)
                    )
        if self._shards is self._there:
            self._send(self._there, self._last)
        else:
            self._there.take(self._beside, self._last)
            self._read_back(self._there, self._last, self._whole[self._last])
        with suppress(DestinationError):  # it is complete, whatever becomes of what lies beside it
            self._beside.drop(list(self._beside.listing))
        if self.job.verify:
            self.notes.append("each file was read back from the destination and compared with what was sent")
        return self.address, self.verification(self.address, "in a bucket")


def _note_of(file: str) -> str:
    return f"{file}.json"
