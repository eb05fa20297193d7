"""The folder that a destination grows in: journaled, resumable, published at the end.

The journal is bound to source and plan by a fingerprint. It tells which shards were finished; before one is
used again, it is compared with the source (one made from ranged reads, with the digests journaled of what
was received), so neither a torn journal nor lost writes can do harm.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import xxhash

from shardkit.checkpoint import Checkpoint
from shardkit.destination import (
    check_destination,
    clear_stale_lock,
    locked,
    put_in_place,
    resolve,
    staging_folder,
    sync,
)
from shardkit.errors import Cancelled, CheckpointError, DestinationError, ShardkitError, SpaceError
from shardkit.pickle_file import close_pickles
from shardkit.plan import ShardPlan
from shardkit.sizes import format_size
from shardkit.transfer import Lost, Outcome, Received

_JOURNAL = ".journal.jsonl"
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Staging:
    """A staging folder; `staging` makes one and holds its lock.

    Attributes
    ----------
    destination, folder
        What it will be, what it is.
    finished
        Shards that are written, with what casts lost in them and what was received of them.
    """

    def __init__(self, checkpoint: Checkpoint, plan: ShardPlan, destination: Path, overwrite: bool) -> None:
        self.destination, self.folder = destination, staging_folder(destination)
        self.finished: dict[str, Outcome] = {}
        self._checkpoint, self._plan, self._overwrite = checkpoint, plan, overwrite
        self._fingerprint = _fingerprint(checkpoint, plan)
        self._syncing = ThreadPoolExecutor(2, thread_name_prefix="shardkit-sync")
        self._synced: list[Future[None]] = []
        self._stats: dict[str, tuple[int, int]] = {}

    def check_destination(self) -> None:
        """Refuse a destination that overlaps the source, or holds what is not to be replaced."""
        check_destination(self._checkpoint, self.destination, self._overwrite)

    def open(self, resume: bool) -> None:
        """Create the folder, or take over what an earlier run of the same job has left."""
        if self.folder.exists():
            self.finished = self._read_journal() if resume else {}
            if not self.finished:
                shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        # Written anew, without the line that a kill has torn.
        entries = [{"fingerprint": self._fingerprint}, *(_entry(*shard) for shard in self.finished.items())]
        new = self.folder / f"{_JOURNAL}.new"
        new.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        new.replace(self.folder / _JOURNAL)
        for file in self.finished:
            self._sync_later(file)

    def path(self, file: str) -> Path:
        """Return where a file is written."""
        return self.folder / file

    def staged_bytes(self) -> int:
        """Bytes that are there already."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    def finish(self, file: str, outcome: Outcome) -> None:
        """Journal a shard whose last byte was written, and sync it off the caller's thread."""
        self.finished[file] = outcome
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(_entry(file, outcome)) + "\n")
        self._sync_later(file)

    def forget(self, file: str) -> None:
        """Write a shard again that the journal has as finished."""
        self.finished.pop(file, None)

    def wait(self) -> None:
        """Return when all finished shards are on the disk."""
        for future in self._synced:
            future.result()

    def publish(self) -> None:
        """Sync what is left and rename the folder to the destination.

        Raises
        ------
        CheckpointError
            If the source or a shard changed since it was copied.
        DestinationError
            If something appeared at the destination meanwhile.
        """
        self.wait()
        self._check_unchanged()
        for entry in sorted(self.folder.rglob("*")):
            if entry.name not in self._stats:
                sync(entry)
        self.check_destination()
        (self.folder / _JOURNAL).unlink()
        sync(self.folder)
        put_in_place(self.folder, self.destination, self._overwrite)

    def close(self) -> None:
        """End the sync threads, and let go of pickles."""
        self._syncing.shutdown(wait=True, cancel_futures=True)
        close_pickles()

    @contextmanager
    def kept_for_resume(self) -> Iterator[None]:
        """Remove the folder after an error, unless running again would find something finished in it."""
        try:
            yield
        except ShardkitError as error:
            if not (isinstance(error, (Cancelled, SpaceError, DestinationError)) and self.finished):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def full(self) -> SpaceError:
        """Return the error that says how many bytes are short."""
        disk = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        short = max(1, self._plan.disk_bytes - self.staged_bytes() - shutil.disk_usage(disk).free)
        return SpaceError(
            f"{self.destination}: the disk is full, {short:,} bytes ({format_size(short)}) short; "
            "make space and run the same again to go on"
        )

    def _check_unchanged(self) -> None:
        if _fingerprint(self._checkpoint, self._plan) != self._fingerprint:
            raise CheckpointError(
                "changed while it was copied; nothing was published", file=self._checkpoint.source
            )
        for file, seen in self._stats.items():
            if _stat(self.path(file)) != seen:
                raise CheckpointError(
                    "changed on disk after it was written; nothing was published", file=str(self.path(file))
                )

    def _sync_later(self, file: str) -> None:
        self._synced.append(self._syncing.submit(self._sync, file))

    def _sync(self, file: str) -> None:
        sync(self.path(file))
        self._stats[file] = _stat(self.path(file))

    def _read_journal(self) -> dict[str, Outcome]:
        """Return the finished shards; none where the journal is of another job, or unreadable."""
        shards = {shard.file: shard for shard in self._plan.shards}
        kept = {}
        for entry in self._journal_entries():
            try:
                shard, lost = shards[entry["shard"]], tuple(Lost(*loss) for loss in entry["lost"])
                received = tuple(Received(*part) for part in entry["received"])
            except (KeyError, TypeError):
                continue
            path = self.path(shard.file)
            if path.is_file() and path.stat().st_size == shard.nbytes:
                kept[shard.file] = Outcome(lost, received)
        return kept

    def _journal_entries(self) -> list[Any]:
        try:
            first, *lines = (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"fingerprint": self._fingerprint}:
                return []
            return [json.loads(line) for line in lines if line.endswith("}")]  # the last may be torn
        except (OSError, ValueError):
            return []


@contextmanager
def staging(
    checkpoint: Checkpoint,
    plan: ShardPlan,
    destination: str | os.PathLike[str],
    overwrite: bool,
    resume: bool,
) -> Iterator[Staging]:
    """Hold the staging folder of a destination; keep it for a resume if the job is cut short.

    Raises
    ------
    DestinationError
        If the destination must not be written, cannot be, or another run is writing it.
    SpaceError
        If the disk fills up.
    """
    held = Staging(checkpoint, plan, resolve(destination), overwrite)
    try:
        try:
            held.check_destination()
        except DestinationError:
            clear_stale_lock(held.destination)
            raise
        held.destination.parent.mkdir(parents=True, exist_ok=True)
        with locked(held.destination), held.kept_for_resume():
            held.check_destination()  # another run may just have published it
            held.open(resume)
            yield held
    except OSError as error:
        if error.errno in _FULL:
            raise held.full() from error
        where = error.filename or held.folder
        raise DestinationError(f"{held.destination}: {error.strerror or error} ({where})") from error
    finally:
        held.close()


def _entry(file: str, outcome: Outcome) -> dict[str, Any]:
    lost, received = ([astuple(item) for item in items] for items in outcome)
    return {"shard": file, "lost": lost, "received": received}


def _fingerprint(checkpoint: Checkpoint, plan: ShardPlan) -> str:
    planned = [(s.file, [(t.source.name, t.dtype, t.begin) for t in s.tensors]) for s in plan.shards]
    return xxhash.xxh3_128_hexdigest(json.dumps([_seen(checkpoint), planned]).encode())


def _seen(checkpoint: Checkpoint) -> list[Any]:
    """Return what would change with the source."""
    if checkpoint.is_remote:
        return [checkpoint.folder]  # the commit is in its name
    files = [*checkpoint.files, *checkpoint.side_files]
    try:
        return [(file, *_stat(Path(checkpoint.path(file)))) for file in files]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=error.filename) from error


def _stat(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
