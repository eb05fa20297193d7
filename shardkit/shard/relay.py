"""What stores share that lie elsewhere: a shard is made in a work folder here, checked, sent, dropped."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from shardkit.base import pages
from shardkit.base.errors import DestinationError, SpaceError
from shardkit.base.sizes import format_size
from shardkit.load.seen import ModelKeys
from shardkit.plan.plan import Shard
from shardkit.shard.destination import beside, free_bytes, leftovers, locked, remove_leftovers, sync
from shardkit.shard.report import Verification
from shardkit.shard.store import Job, Store
from shardkit.shard.tasks import Outcome
from shardkit.shard.verify import read_back


@contextmanager
def work_space(base: Path, name: str) -> Iterator[Path]:
    """Hold a folder of one's own, gone on every way out; remove what killed runs have left."""
    folder = beside(base / name, "staging")
    base.mkdir(parents=True, exist_ok=True)
    for left in base.glob(".shardkit-*.shardkit-*"):
        with suppress(DestinationError):
            if leftovers(owner := base / left.name[1:].partition(".")[0]):  # of nobody who is alive
                remove_leftovers(owner)
    with locked(base / name):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk(folder: Path, other_disk: str) -> Iterator[None]:
    """Say of what fails on a work folder's disk where it was, and how to use another."""
    try:
        yield
    except ConnectionError:  # of no disk
        raise
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DestinationError
        raise kind(f"{folder}: {error.strerror or error}; run again to resume, or {other_disk}") from error


def room(base: Path, nbytes: int, other_disk: str) -> int:
    """Return how many bytes are free on the disk of a work folder; refuse one without room for a shard."""
    if (free := free_bytes(base)) < nbytes:
        raise SpaceError(
            f"{base}: a shard needs up to {nbytes:,} bytes ({format_size(nbytes)}), but its disk has only "
            f"{free:,} ({format_size(free)}) free: lower max_shard_size, or {other_disk}"
        )
    return free


class Checked(NamedTuple):
    """What reading a shard back has found: its tensors' digests, and how long it took.

    `in_memory` has, for each file that was read, whether it was in memory, as `pages.drop` says.
    """

    digests: Mapping[str, str] = {}
    seconds: float = 0.0
    in_memory: tuple[int | None, ...] = ()


def checked(job: Job, shard: Shard, outcome: Outcome, folder: Path) -> Checked:
    """Read a shard back and compare it with what it was made of, unless nobody wants that."""
    if not job.verify:
        return Checked()
    start, path = time.perf_counter(), folder / shard.file
    sync(path)
    in_memory = (pages.drop([path]),)
    digests = read_back(job, shard, outcome, folder)
    return Checked(digests, time.perf_counter() - start, in_memory)


class RelayStore(Store):
    """A store whose shards pass a folder of this job's own in `base`; as `Store`.

    `name` is what the job is called there, for as long as it is the same. `digests` are those of the tensors
    of each shard that was sent, where it was verified. `other_disk` says how to use one.
    """

    stage = "stream"
    other_disk: str

    def __init__(self, job: Job, base: Path) -> None:
        super().__init__(job)
        self._base, self.name = base.expanduser().resolve(), f"shardkit-{self.fingerprint[:16]}"
        self.folder = beside(self._base / self.name, "staging")
        self.digests: dict[str, Mapping[str, str]] = {}
        self._checking_seconds = 0.0
        self._in_memory: list[int | None] = []  # of each shard that was read back, whether it was in memory

    @contextmanager
    def work_space(self) -> Iterator[None]:
        """Hold the work folder."""
        with disk(self._base, self.other_disk), work_space(self._base, self.name):
            yield

    def at_once(self, todo: Sequence[Shard]) -> int:
        """Return one more than there are workers, which make shards or send them, or what the disk holds."""
        largest = max(shard.nbytes for shard in todo)
        return min(self.job.crew.workers + 1, room(self._base, largest, self.other_disk) // largest)

    def sends(self, shard: Shard) -> int:
        """Return the bytes of the file."""
        return shard.nbytes

    def note(self, file: str, found: Checked) -> None:
        """Take over what reading a shard back has found."""
        self.digests[file] = found.digests
        self._checking_seconds += found.seconds
        self._in_memory += found.in_memory

    def all_digests(self) -> dict[str, str]:
        """Return the digests of all tensors; none where some were not verified."""
        found = {name: digest for digests in self.digests.values() for name, digest in digests.items()}
        return found if len(found) == len(self.job.checkpoint.tensors) else {}

    def verification(self, destination: str, where: str) -> Verification | None:
        """Return the proof of what was sent to `where`; None where it was not requested."""
        if not self.job.verify:
            return None
        checkpoint, plan = self.job.checkpoint, self.job.plan
        return Verification(
            source=checkpoint.source,
            destination=destination,
            tensors=len(checkpoint.tensors),
            nbytes=checkpoint.total_bytes,
            cast=sum(tensor.is_cast for shard in plan.shards for tensor in shard.tensors),
            digests=self.all_digests(),
            seconds=self._checking_seconds,
            received=self.job.is_received,
            model=ModelKeys(why_unchecked=f"the copy is {where}"),
            files=len(self._in_memory),
            files_in_memory=None if None in self._in_memory else sum(filter(None, self._in_memory)),
        )
