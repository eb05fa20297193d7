"""Where a result goes: what must not be written, who is writing, and the one step that puts it in place.

Beside a destination `out` lies `.out.shardkit-staging` while it is written, `.out.shardkit-lock` while
somebody writes it, and, where two folders cannot be swapped in one step, `.out.shardkit-old` for an instant.
"""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from shardkit.checkpoint import Checkpoint
from shardkit.errors import DestinationError
from shardkit.layout import is_weights

_LOCK_SECONDS = 2.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def resolve(destination: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a destination, links followed."""
    return Path(os.path.realpath(os.path.expanduser(destination)))


def staging_folder(target: Path) -> Path:
    """Return where a destination is staged."""
    return _beside(target, "staging")


def check_destination(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    """Refuse a destination that overlaps the source, or holds what is not to be replaced.

    Raises
    ------
    DestinationError
        As said.
    """
    if not checkpoint.is_remote:
        _check_apart(checkpoint, target)
    check_free(target, overwrite)


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a destination that holds what is not to be replaced; as `check_destination`."""
    if target.exists() and not target.is_dir():
        raise DestinationError(f"{target}: is a file; give a folder")
    if os.path.ismount(target):
        raise DestinationError(f"{target}: is where a disk is mounted; give a folder inside it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise DestinationError(
            f"{target}: already exists and is not empty; give another folder, or replace it "
            "(overwrite=True, --overwrite)"
        )
    if not any(is_weights(entry.name) for entry in target.iterdir()):
        raise DestinationError(
            f"{target}: holds no checkpoint, and would be replaced whole: remove it yourself"
        )


def _check_apart(checkpoint: Checkpoint, target: Path) -> None:
    source, folder = Path(checkpoint.source).resolve(), Path(checkpoint.folder).resolve()
    if target in (source, folder):
        raise DestinationError(f"{target}: destination and source are the same; give another folder")
    if folder in target.parents and (source == folder or checkpoint.config is not None):
        raise DestinationError(f"{target}: the destination lies inside the source {folder}")
    for file in (checkpoint.folder, *(checkpoint.path(name) for name in checkpoint.files)):
        if Path(file).resolve().is_relative_to(target):
            raise DestinationError(f"{target}: {file}, of the source, lies inside the destination")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a destination; a lock that a dead process left is no obstacle.

    Raises
    ------
    DestinationError
        If another run holds it; says which process, on which machine.
    """
    path = _lock_path(target)
    lock = filelock.FileLock(path, timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        if not path.exists():
            raise DestinationError(f"{target}: the folder {target.parent} cannot be written") from None
        holder = ""
        with suppress(OSError):
            holder = f" ({path.read_text(encoding='utf-8')})"
        raise DestinationError(f"{target}: another run is writing it{holder}") from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        recover(target)
        yield
    finally:
        path.unlink(missing_ok=True)  # while held: whoever waits for it sees that it is gone, and retries
        lock.release()


def clear_stale_lock(target: Path) -> None:
    """Remove the lock of a run that died just after it had put its result in place."""
    if _lock_path(target).exists():
        with suppress(DestinationError, OSError), locked(target):
            pass


def leftovers(destination: str | os.PathLike[str]) -> list[Path]:
    """Return what interrupted runs have left beside a destination; nothing while one is running."""
    target = resolve(destination)
    found = _all_beside(target)
    if _lock_path(target) in found:
        try:
            filelock.FileLock(_lock_path(target), timeout=0).acquire().lock.release()
        except (OSError, filelock.Timeout):
            return []
    return found


def remove_leftovers(destination: str | os.PathLike[str]) -> list[Path]:
    """Remove what interrupted runs have left, and return what it was.

    Raises
    ------
    DestinationError
        If a run is writing the destination just now.
    """
    target = resolve(destination)
    found = _all_beside(target)
    if found:
        with locked(target):
            for path in _all_beside(target):
                if path.is_dir():
                    shutil.rmtree(path)
    return found


def put_in_place(new: Path, target: Path, overwrite: bool) -> None:
    """Rename a finished folder to its destination; an old one there is replaced in one step, and removed.

    Raises
    ------
    OSError
        If the destination is not empty and is not to be replaced.
    """
    if overwrite and target.is_dir() and any(target.iterdir()):
        _exchange(new, target)
        shutil.rmtree(new)
    else:
        new.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(target: Path) -> None:
    """Undo or complete an exchange by way of a third name that was cut short."""
    aside = _beside(target, "old")
    if aside.exists() and not target.exists():
        aside.rename(target)
    elif aside.exists():
        shutil.rmtree(aside)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can; otherwise by way of a third name."""
    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if renameat2 and not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return
    aside = _beside(old, "old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _beside(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.shardkit-{role}"


def _lock_path(target: Path) -> Path:
    return _beside(target, "lock")


def _all_beside(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.shardkit-*"))
