"""What stores share that lie elsewhere: a shard is made in a work folder here, checked, sent, dropped."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from shardkit.base import pages
from shardkit.base.errors import DestinationError, SpaceError, VerificationError
from shardkit.base.jobs import Crew
from shardkit.base.sizes import format_size
from shardkit.load.seen import ModelKeys
from shardkit.plan.plan import Shard
from shardkit.shard.copy import Outcome
from shardkit.shard.destination import beside, free_bytes, locked, remove_leftovers, sync
from shardkit.shard.report import Verification
from shardkit.shard.store import Job, Store
from shardkit.shard.verify import altered, digest_range, shard_range


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
        """Hold the work folder, gone on every way out; remove what killed runs have left."""
        with self._disk():
            self._base.mkdir(parents=True, exist_ok=True)
            for left in self._base.glob(".shardkit-*.shardkit-*"):
                with suppress(DestinationError):  # it is held by a run that is alive
                    remove_leftovers(self._base / left.name[1:].partition(".")[0])
            with locked(self._base / self.name):
                self.folder.mkdir()
                try:
                    yield
                finally:
                    shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Say of what fails on the disk where it was, and what to do."""
        try:
            yield
        except ConnectionError:  # of no disk
            raise
        except OSError as error:
            kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DestinationError
            raise kind(
                f"{self._base}: {error.strerror or error}; run again to resume, or {self.other_disk}"
            ) from error

    def at_once(self, todo: Sequence[Shard]) -> int:
        """Return one more than there are workers, which make shards or send them, or what the disk holds."""
        largest = max(shard.nbytes for shard in todo)
        free = free_bytes(self.folder)
        if free < largest:
            raise SpaceError(
                f"{self._base}: a shard needs up to {largest:,} bytes ({format_size(largest)}), but its "
                f"disk has only {free:,} ({format_size(free)}) free: lower max_shard_size, or "
                f"{self.other_disk}"
            )
        return min(self.job.crew.workers + 1, free // largest)

    def sends(self, shard: Shard) -> int:
        """Return the bytes of the file."""
        return shard.nbytes

    def checked(self, shard: Shard, outcome: Outcome) -> dict[str, str]:
        """Read a shard back and compare it with what was received; return its tensors' digests."""
        if not self.job.verify:
            return {}
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
