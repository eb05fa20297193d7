"""What stores share that lie elsewhere: a shard is made in a work folder here, checked, sent, dropped."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shardkit.base.errors import DestinationError, SpaceError
from shardkit.base.machine import free_bytes
from shardkit.base.sizes import format_size
from shardkit.plan.plan import Shard
from shardkit.shard.destination import beside, leftovers, locked, remove_leftovers
from shardkit.shard.report import Verification
from shardkit.shard.store import Job, Store
from shardkit.shard.verify import Checked, proof


@contextmanager
def work_space(base: Path, name: str, other_disk: str) -> Iterator[Path]:
    """Hold a folder of one's own, gone on every way out; remove what killed runs have left.

    What fails on its disk says where that was, and how to use another.
    """
    folder = beside(base / name, "staging")
    try:
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
    except ConnectionError:  # of no disk
        raise
    except OSError as error:
        kind = SpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DestinationError
        raise kind(f"{base}: {error.strerror or error}; run again to resume, or {other_disk}") from error


def room(base: Path, nbytes: int, other_disk: str) -> int:
    """Return how many bytes are free on the disk of a work folder; refuse one without room for a shard."""
    if (free := free_bytes(base)) < nbytes:
        raise SpaceError(
            f"{base}: a shard needs up to {nbytes:,} bytes ({format_size(nbytes)}), but its disk has only "
            f"{free:,} ({format_size(free)}) free: lower max_shard_size, or {other_disk}"
        )
    return free


class RelayStore(Store):
    """A store whose shards pass a folder of this job's own in `base`; as `Store`.

    `name` is what the job is called there, for as long as it is the same. `checks` are what reading back has
    found, by file. `other_disk` says how to use one.
    """

    stage, is_sending = "stream", True
    other_disk: str

    def __init__(self, job: Job, base: Path) -> None:
        super().__init__(job)
        self.base, self.name = base.expanduser().resolve(), f"shardkit-{self.fingerprint[:16]}"
        self.folder = beside(self.base / self.name, "staging")
        self.checks: dict[str, Checked] = {}

    def at_once(self, todo: Sequence[Shard]) -> int:
        """Return one more than there are workers, which make shards or send them, or what the disk holds."""
        largest = max(shard.nbytes for shard in todo)
        return min(self.job.crew.workers + 1, room(self.base, largest, self.other_disk) // largest)

    def verification(self, destination: str, where: str) -> Verification | None:
        """Return the proof of what was sent to `where`; None where it was not requested."""
        if not self.job.verify:
            return None
        return proof(self.job, self.checks.values(), destination, f"the copy is {where}")
