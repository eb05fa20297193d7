"""Where a result goes: what must not be written, who is writing, and the one step that puts it in place.

Beside a destination `out` lie `.out.shardkit-staging` and `.out.shardkit-journal` while it is written,
`.out.shardkit-lock` while somebody writes it, `.out.shardkit-source` while its source is being freed,
`.out.shardkit-trash` while something is removed, and, where two folders cannot be swapped in one step,
`.out.shardkit-old` for an instant. `.out.shardkit-part-3-of-8` is a part of it that is finished; while it is
written, it is a destination itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import filelock

from shardkit.base.errors import DestinationError, InUseError, SourceError
from shardkit.base.record import listed
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.names import is_index, is_weights
from shardkit.sources.resolve import is_elsewhere

_LOCK_SECONDS = 2.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_ROLES = ("staging", "journal", "source", "old", "trash", "lock")

warnings.filterwarnings("ignore", "flock not supported", UserWarning)  # its other way to lock does as well


def resolve(destination: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a destination, links followed; refuse one on the Hub."""
    name = os.fspath(destination)
    if is_elsewhere(name):
        raise DestinationError(
            f"{name} is not a local folder: use shard_on_hub, or shard to a folder and push it"
        )
    return Path(os.path.realpath(os.path.expanduser(name)))


def default_destination(source: str, *, here: bool = False) -> str:
    """Return where the shards of a source go if nobody says: beside it, or else, or if `here`, here."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if not path.exists():
        from shardkit.sources.hub_cache import parse_id  # whose client takes half a second to import

        name = source
        with suppress(SourceError):  # it is of a place that is neither
            name = parse_id(source).repo_id
        return f"{_last_name(name.split('/'))}-sharded"
    path = path.parent if is_index(path.name) else path
    here = (here or not os.access(path.parent, os.W_OK)) and not _is_within(Path(), path)
    made = path.parent / f"{path.stem if path.is_file() else _last_name(path.parts)}-sharded"
    return made.name if here else os.path.relpath(made)


def _last_name(parts: Sequence[str]) -> str:
    """Return the last part of a path that is a name, not a number, if there is one."""
    return next((part for part in reversed(parts) if part and not part.isdigit()), parts[-1])


def beside(target: Path, role: str) -> Path:
    """Return where something lies beside a destination, by its role: "staging", "journal", "lock"."""
    return target.parent / f".{target.name}.shardkit-{role}"


def check_destination(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    """Refuse a destination that overlaps the source, or holds what is not to be replaced."""
    if checkpoint.place.folder is not None:
        _check_apart(checkpoint, checkpoint.place.folder.resolve(), target)
    check_free(target, overwrite)


def refuse_leftover(source: str | os.PathLike[str], target: Path) -> None:
    """Refuse a source that would be taken for what a run has left beside a destination, and be removed."""
    for role in _ROLES:
        if _is_within(Path(source).expanduser(), kept := beside(target, role)):
            raise DestinationError(
                f"{source} lies in {kept}, which a run that writes {target} removes; rename it, or choose "
                "another destination"
            )


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a destination that holds what is not to be replaced; as `check_destination`."""
    if _is_within(Path(), target):
        raise DestinationError(
            f"{target} contains the current directory, so it is not replaced: run from another directory"
        )
    if target.exists() and not target.is_dir():
        raise DestinationError(f"{target} is a file; choose a folder")
    if os.path.ismount(target):
        raise DestinationError(f"{target} is a mount point; choose a folder inside it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise DestinationError(
            f"{target} already exists and is not empty; choose another folder, or replace it with "
            "overwrite=True"
        )
    if not any(is_weights(entry.name) for entry in target.iterdir()):
        raise DestinationError(
            f"{target} is not a checkpoint, so it is not overwritten; delete it or choose another folder"
        )


def _check_apart(checkpoint: Checkpoint, folder: Path, target: Path) -> None:
    source = Path(checkpoint.source).resolve()
    if _is_same(target, source) or _is_same(target, folder):
        raise DestinationError(f"{target}: destination and source are the same; choose another folder")
    if _is_within(target, folder) and (source == folder or checkpoint.config is not None):
        raise DestinationError(f"{target} is inside the source {folder}; choose another folder")
    for file in (checkpoint.folder, *(checkpoint.path(name) for name in checkpoint.files)):
        if _is_within(Path(file), target):
            raise DestinationError(f"{target} contains the source file {file}; choose another folder")


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, by any name: mounts and letter case make others."""
    try:
        path = path.resolve()
    except FileNotFoundError:  # the working folder is gone
        return False
    return any(_is_same(part, folder) for part in (path, *path.parents))


def _is_same(path: Path, other: Path) -> bool:
    with suppress(OSError):
        return os.path.samefile(path, other)
    return False


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a destination, unless another run does; what a dead process left is no obstacle."""
    path = beside(target, "lock")
    lock = filelock.FileLock(path, timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        if not path.exists():
            raise DestinationError(
                f"{target} cannot be written: no access to the folder {target.parent}"
            ) from None
        holder = ""
        with suppress(OSError):
            holder = f" ({' '.join(path.read_text(encoding='utf-8').split())})"
        raise InUseError(f"{target} is being written by another run{holder}") from None
    # Without flock the file's being there is the lock, and what is in it tells whether it is stale.
    is_soft = isinstance(lock, filelock.SoftFileLock)
    try:
        if not is_soft:
            with suppress(PermissionError):  # Windows lets nobody else write a file that is locked
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        recover(target)
        yield
    finally:
        if not is_soft:
            with suppress(PermissionError):  # nor remove it: there the lock itself does, when it is released
                path.unlink(missing_ok=True)  # while held: whoever waits sees that it is gone, and retries
        lock.release()


def clear_after_end(target: Path) -> None:
    """Remove what a run that ended just after it had put its result in place has left beside it."""
    if _all_beside(target):
        with suppress(DestinationError, OSError), locked(target):
            pass


def leftovers(destination: str | os.PathLike[str]) -> list[Path]:
    """Return what interrupted runs have left beside a destination; nothing while one is running."""
    if is_elsewhere(destination):
        return []
    target = resolve(destination)
    found = _all_beside(target)
    for lock in (path for path in found if path.name.endswith("-lock")):
        try:
            filelock.FileLock(lock, timeout=0).acquire().lock.release()
        except (OSError, filelock.Timeout):
            return []
    return found


def remove_leftovers(destination: str | os.PathLike[str]) -> list[Path]:
    """Remove what interrupted runs have left, and return what it was; put back an old destination."""
    target = resolve(destination)
    found = _all_beside(target)
    is_aside = not os.path.lexists(target)
    if found:
        with ExitStack() as held:
            for one in (target, *parts(target)):
                held.enter_context(locked(one))
            for part in parts(target):
                discard_unfinished(part)
                discard(part, part)
            discard_unfinished(target)
        if left := _all_beside(target):
            raise DestinationError(f"{target} cannot be removed: {listed(map(str, left))}")
    return [path for path in found if not (is_aside and path == beside(target, "old"))]


def discard_unfinished(target: Path) -> None:
    """Remove what a run has written so far, unless that is all there is of its source."""
    refuse_only_copy(target)
    discard(beside(target, "staging"), target)
    beside(target, "journal").unlink(missing_ok=True)


def only_copy_of(target: Path) -> dict[str, Any] | None:
    """Return the record of a source that an interrupted run was freeing, and has left tensors of; or None."""
    record, staging = beside(target, "source"), beside(target, "staging")
    if os.path.lexists(record) and os.path.lexists(staging):
        try:
            return dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            why = f"{record} is damaged: {staging} may have the only copy of tensors, and stays as it is"
            raise DestinationError(why) from error
    return None


def refuse_only_copy(target: Path, resumed: str | os.PathLike[str] = "") -> None:
    """Refuse to do without what an interrupted run has left of the source that it was freeing.

    The run of the source that is `resumed` may do with it what it has to.
    """
    record = only_copy_of(target)
    if record is None or (resumed and os.path.abspath(os.path.expanduser(resumed)) == record["source"]):
        return
    raise DestinationError(
        f"{beside(target, 'staging')} has the only copy of tensors of {record['source']}: a run was "
        f"interrupted that was freeing it; repeat it as it was ({record['planned']}), with free_source=True, "
        "to resume"
    )


def discard(path: Path, target: Path) -> Path | None:
    """Remove what lies beside a destination; return what is left of it if it will not go."""
    trash = beside(target, "trash")
    remove(trash)
    if os.path.lexists(path) and not os.path.lexists(trash):
        with suppress(OSError):
            path.rename(trash)  # so that a kill in the middle leaves nothing that looks whole
    remove(path)
    remove(trash)
    return next(filter(os.path.lexists, (path, trash)), None)


def remove(path: Path) -> None:
    """Remove a file, a link, or as much of a folder as goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with suppress(OSError):
            path.unlink()


def put_in_place(new: Path, target: Path, overwrite: bool) -> None:
    """Rename a finished folder to its destination; an old one there takes its place in the same step."""
    if overwrite and target.is_dir() and any(target.iterdir()):
        _exchange(new, target)
    else:
        try:
            new.rename(target)
        except FileExistsError:  # on Windows, an empty folder is no place for another
            target.rmdir()
            new.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk; Windows opens no folder."""
    is_folder = path.is_dir()
    flags = os.O_RDONLY if is_folder else os.O_RDWR  # nor does it sync what is open for reading only
    with suppress(PermissionError) if is_folder else nullcontext():
        handle = os.open(path, flags)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def recover(target: Path) -> None:
    """Undo or complete what a killed run was about: an exchange by way of a third name, a removal."""
    aside = beside(target, "old")
    if aside.exists() and not target.exists():
        aside.rename(target)
    discard(aside, target)
    if not os.path.lexists(beside(target, "staging")):  # of what was put in place
        beside(target, "journal").unlink(missing_ok=True)
        beside(target, "source").unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> None:
    renameat2: Callable[..., int] | None = None
    with suppress(TypeError):  # Windows has no library without a name
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(new), os.fsencode(old)
    if renameat2 and not renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return
    aside = beside(old, "old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def parts(target: Path) -> dict[Path, tuple[int, int]]:
    """Return the parts of a destination, finished or not: number and how many, by where they go."""
    name = re.compile(rf"\.{{1,2}}{re.escape(target.name)}\.shardkit-part-(\d+)-of-(\d+)(\.shardkit-.*)?")
    beside_it = os.listdir(target.parent) if target.parent.is_dir() else ()
    numbers = {(int(at[1]), int(at[2])) for at in map(name.fullmatch, beside_it) if at}
    return {part_folder(target, *number): number for number in sorted(numbers)}


def part_folder(target: Path, number: int, of: int) -> Path:
    """Return where a part of a destination goes."""
    return beside(target, f"part-{number}-of-{of}")


def _all_beside(target: Path) -> list[Path]:
    made = parts(target)
    found = [beside(one, role) for one in (target, *made) for role in _ROLES]
    return list(filter(os.path.lexists, (*found, *made)))
