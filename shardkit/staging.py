"""The folder that a destination grows in: locked, journaled, resumable, published by one rename.

Beside a destination `out` lies `.out.shardkit-staging` while it is written, and `.out.shardkit-lock` while
somebody writes it. The journal in the staging folder is bound to source and plan by a fingerprint, and a
shard enters it only when its bytes are on the disk.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import xxhash

from shardkit.checkpoint import Checkpoint
from shardkit.errors import Cancelled, CheckpointError, DestinationError, ShardkitError, SpaceError
from shardkit.layout import is_weights
from shardkit.plan import ShardPlan
from shardkit.sizes import format_size
from shardkit.transfer import Lost

_JOURNAL = ".journal.jsonl"
_LOCK_SECONDS = 2.0
_LOCK_SUFFIX = ".shardkit-lock"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Staging:
    """A staging folder, held by a lock; `staging` makes one."""

    def __init__(self, checkpoint: Checkpoint, plan: ShardPlan, destination: Path) -> None:
        self.destination = destination
        self.folder = staging_folder(destination)
        self.finished: dict[str, list[Lost]] = {}
        self._checkpoint, self._plan = checkpoint, plan
        self._fingerprint = _fingerprint(checkpoint, plan)
        self._syncing = ThreadPoolExecutor(2, thread_name_prefix="shardkit-sync")
        self._synced: list[Future[None]] = []
        self._stats: dict[str, tuple[int, int]] = {}

    def open(self, resume: bool) -> None:
        """Create the folder, or take over what an earlier run of the same job has left."""
        if self.folder.exists():
            self.finished = self._read_journal() if resume else {}
            if not self.finished:
                shutil.rmtree(self.folder)
        if not self.folder.exists():
            self.folder.mkdir()
            self._append({"fingerprint": self._fingerprint})

    def path(self, file: str) -> Path:
        """Return where a file is written."""
        return self.folder / file

    def staged_bytes(self) -> int:
        """Bytes that are there already."""
        return sum(entry.stat().st_blocks * 512 for entry in self.folder.iterdir() if entry.is_file())

    def finish(self, file: str, lost: Sequence[Lost]) -> None:
        """Sync a shard whose last byte was written, off the caller's thread, and journal it."""
        self.finished[file] = list(lost)
        self._synced.append(self._syncing.submit(self._sync, file, list(lost)))

    def forget(self, file: str) -> None:
        """Write a shard again that the journal has as finished."""
        self.finished.pop(file, None)

    def wait(self) -> None:
        """Return when all finished shards are on the disk."""
        for future in self._synced:
            future.result()

    def close(self) -> None:
        """End the sync threads."""
        self._syncing.shutdown(wait=True, cancel_futures=True)

    def publish(self) -> None:
        """Sync what is left and rename the folder to the destination.

        Raises
        ------
        CheckpointError
            If the source or a shard changed since it was copied.
        DestinationError
            If the destination appeared meanwhile.
        """
        self.wait()
        self._check_unchanged()
        for entry in sorted(self.folder.rglob("*")):
            if entry.name not in self._stats:
                sync(entry)
        (self.folder / _JOURNAL).unlink()
        sync(self.folder)
        if self.destination.exists() and any(self.destination.iterdir()):
            _exchange(self.folder, self.destination)
            shutil.rmtree(self.folder)
        else:
            self.folder.rename(self.destination)
        sync(self.destination.parent)

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

    def _sync(self, file: str, lost: list[Lost]) -> None:
        sync(self.path(file))
        self._stats[file] = _stat(self.path(file))
        losses = [[x.tensor, x.overflowed, x.flushed] for x in lost]
        self._append({"shard": file, "lost": losses})

    def _append(self, entry: dict[str, Any]) -> None:
        with (self.folder / _JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _read_journal(self) -> dict[str, list[Lost]]:
        """Return the finished shards; none where the journal is of another job, or unreadable."""
        sizes = {shard.file: shard.nbytes for shard in self._plan.shards}
        try:
            first, *lines = (self.folder / _JOURNAL).read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"fingerprint": self._fingerprint}:
                return {}
            entries = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be torn
        except (OSError, ValueError):
            return {}
        kept = {}
        for entry in entries:
            path = self.path(entry["shard"])
            if path.is_file() and path.stat().st_size == sizes[entry["shard"]]:
                kept[entry["shard"]] = [Lost(*loss) for loss in entry["lost"]]
                self._stats[entry["shard"]] = _stat(path)
        return kept


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
        If the destination must not be written, or another run is writing it.
    SpaceError
        If the disk fills up inside the block.
    """
    target = Path(os.path.realpath(os.path.expanduser(destination)))
    check_destination(checkpoint, target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        held = Staging(checkpoint, plan, target)
        try:
            held.open(resume)
            yield held
        except OSError as error:
            if error.errno in _FULL:
                raise _full(plan, held) from error
            raise DestinationError(
                f"{target}: {error.strerror or error} ({error.filename or held.folder})"
            ) from error
        except ShardkitError as error:
            if not _can_resume(error):
                shutil.rmtree(held.folder, ignore_errors=True)
            raise
        finally:
            held.close()


def staging_folder(destination: Path) -> Path:
    """Return where a destination is staged."""
    return destination.parent / f".{destination.name}.shardkit-staging"


def leftovers(destination: str | os.PathLike[str]) -> list[Path]:
    """Return what interrupted runs have left beside a destination: staging folders, mostly."""
    target = Path(os.path.realpath(os.path.expanduser(destination)))
    pattern = f".{glob.escape(target.name)}.shardkit-*"
    found = target.parent.glob(pattern) if target.parent.is_dir() else ()
    return sorted(path for path in found if not path.name.endswith(_LOCK_SUFFIX))


def remove_leftovers(destination: str | os.PathLike[str]) -> list[Path]:
    """Remove what interrupted runs have left, and return what it was.

    Raises
    ------
    DestinationError
        If a run is writing the destination just now.
    """
    target = Path(os.path.realpath(os.path.expanduser(destination)))
    found = leftovers(target)
    if found:
        with _locked(target):
            for path in found:
                shutil.rmtree(path)
    return found


def check_destination(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    """Refuse a destination that overlaps the source, or holds something that is not to be replaced."""
    source, folder = Path(checkpoint.source).resolve(), Path(checkpoint.folder).resolve()
    if target in (source, folder):
        raise DestinationError(f"{target}: destination and source are the same; give another folder")
    if folder in target.parents and (source == folder or checkpoint.config is not None):
        raise DestinationError(f"{target}: the destination lies inside the source {folder}")
    for file in (checkpoint.folder, *(checkpoint.path(name) for name in checkpoint.files)):
        if Path(file).resolve().is_relative_to(target):
            raise DestinationError(f"{target}: {file}, of the source, lies inside the destination")
    if target.is_file():
        raise DestinationError(f"{target}: is a file; give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise DestinationError(
            f"{target}: already exists and is not empty; give another folder, or overwrite it"
        )
    if not any(is_weights(entry.name) for entry in target.iterdir()):
        raise DestinationError(
            f"{target}: holds no checkpoint, and would be replaced whole: remove it yourself"
        )


def _can_resume(error: ShardkitError) -> bool:
    return isinstance(error, (Cancelled, SpaceError))


def _full(plan: ShardPlan, held: Staging) -> SpaceError:
    short = max(1, plan.disk_bytes - held.staged_bytes() - shutil.disk_usage(held.folder).free)
    return SpaceError(
        f"{held.destination}: the disk is full, {short:,} bytes ({format_size(short)}) short; "
        "make space and run the same again to go on"
    )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.parent / f".{target.name}{_LOCK_SUFFIX}"
    lock = filelock.FileLock(path, timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        with suppress(OSError):
            raise DestinationError(f"{target}: another run is writing it ({path.read_text()})") from None
        raise DestinationError(f"{target}: another run is writing it") from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        path.unlink(missing_ok=True)  # while held: whoever waits for it sees that it is gone, and retries
        lock.release()


def _fingerprint(checkpoint: Checkpoint, plan: ShardPlan) -> str:
    files = [*checkpoint.files, *checkpoint.side_files]
    try:
        seen = [(file, *_stat(Path(checkpoint.path(file)))) for file in files]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=error.filename) from error
    planned = [(s.file, [(t.source.name, t.dtype, t.begin) for t in s.tensors]) for s in plan.shards]
    return xxhash.xxh3_128_hexdigest(json.dumps([seen, planned]).encode())


def _stat(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can; otherwise by way of a third name."""
    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if renameat2 and not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return
    aside = old.parent / f".{old.name}.shardkit-old"
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
