"""Which source may be freed: files that hold nothing but its tensors, and that nobody else has or uses."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from shardkit.base.errors import CheckpointError, DestinationError
from shardkit.base.machine import MEMORY_FILESYSTEMS, filesystem
from shardkit.base.record import listed, plural
from shardkit.checkpoint.belonging import sort_out
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import read_config
from shardkit.checkpoint.metadata import is_of_a_file
from shardkit.checkpoint.scan import format_of
from shardkit.formats.names import is_index, is_weights
from shardkit.formats.pieces import Pieces
from shardkit.shard.destination import check_free, clear_after_end, only_copy_of


def open_to_free(
    source: str | os.PathLike[str], target: Path, opened: Callable[[], Checkpoint]
) -> Checkpoint:
    """Return a source that may be freed; one that an interrupted run has begun to free, as it was before.

    It is refused if freeing it could lose something, if there is a destination already, or one in memory.
    """
    record = only_copy_of(target)
    is_begun, checkpoint = record is not None, _begun(record) if record else _first(source, target, opened)
    links = _links_beside(checkpoint)
    for file in filter(lambda file: os.path.lexists(checkpoint.path(file)), checkpoint.files):
        why = _in_the_way(checkpoint, file, links) or ("" if is_begun else _held_beside(checkpoint, file))
        if why:
            then = "repeat this once that has changed" if is_begun else "leave out free_source"
            raise CheckpointError(f"{why}, so it is not freed; {then}", file=checkpoint.path(file))
    if not is_begun and os.path.abspath(os.path.expanduser(source)) != checkpoint.source:
        why = f"is in a cache that still offers it as {source}; to free it, name this folder"
        raise CheckpointError(why, file=checkpoint.source)
    return checkpoint


def _links_beside(checkpoint: Checkpoint) -> dict[str, str]:
    paths = {name: checkpoint.path(name) for name in checkpoint.place.names() if name not in checkpoint.files}
    return {os.path.realpath(path): name for name, path in paths.items() if os.path.islink(path)}


def _first(source: str | os.PathLike[str], target: Path, opened: Callable[[], Checkpoint]) -> Checkpoint:
    try:
        check_free(target, overwrite=False)  # or, after the end, it would be said that the source is gone
    except DestinationError as error:
        clear_after_end(target)
        if os.path.isdir(source) and not any(is_weights(path.name) for path in Path(source).iterdir()):
            done = (
                f"{target} is there, and {source} has no weights: a run that freed it seems to have finished"
            )
            raise DestinationError(done) from error
        raise
    checkpoint = opened()
    if checkpoint.place.folder is None:
        raise CheckpointError(
            "is not on this machine: stream it, which stores nothing", file=checkpoint.source
        )
    if os.path.isfile(source) and not is_index(Path(source).name) and len(checkpoint.files) > 1:
        several = f"is one of {plural(len(checkpoint.files), 'file')} that would be freed"
        raise CheckpointError(f"{several}; name the folder", file=os.fspath(source))
    kind = filesystem(str(target.parent))
    if kind in MEMORY_FILESYSTEMS and filesystem(checkpoint.folder) != kind:
        raise DestinationError(
            f"{target} is in memory ({kind}), which a restart clears, so a source on a disk is not freed for "
            "it; choose a folder on a disk, or leave out free_source"
        )
    if any(isinstance(tensor.layout, Pieces) for tensor in checkpoint.tensors.values()):
        why = "has pieces of tensors, which are put together, not freed; leave out free_source"
        raise CheckpointError(why, file=checkpoint.source)
    if checkpoint.format != "safetensors":
        why = "is not safetensors and may hold more than tensors, so it is not freed; leave out free_source"
        raise CheckpointError(why, file=checkpoint.path(checkpoint.files[0]))
    if differing := [key for key in checkpoint.file_metadata if not is_of_a_file(key)]:
        raise CheckpointError(
            f"its files differ in metadata that no shard would have ({listed(differing)}), so it is not "
            "freed; leave out free_source",
            file=checkpoint.source,
        )
    return checkpoint


def _begun(record: dict[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint.from_dict(record)
    if checkpoint.source == checkpoint.folder or checkpoint.config is not None:  # not a file alone
        config = read_config(checkpoint.place)
        found = sort_out(checkpoint.place, checkpoint.files, checkpoint.stem, config).side_files
        gone = [file for file in checkpoint.side_files if file not in found]
        words = f"removed from the source since it was first opened, so not copied: {listed(gone)}"
        notes = (*checkpoint.notes, *[words] * bool(gone))
        checkpoint = replace(checkpoint, config=config, side_files=found, notes=notes)
    checkpoint.seen.update({file: tuple(state) for file, state in record["seen"].items()})
    return checkpoint


def _held_beside(checkpoint: Checkpoint, file: str) -> str:
    others = {name for name, tensor in checkpoint.tensors.items() if tensor.file != file}
    twice = format_of(file).scan(checkpoint.place, [file]).tensors.keys() & others
    return f"contains tensors that a load takes from another file: {listed(sorted(twice))}" if twice else ""


def _in_the_way(checkpoint: Checkpoint, file: str, links: Mapping[str, str]) -> str:
    """Say why a file cannot be freed, or must not be, because others have it; empty where it can."""
    path, folder = checkpoint.path(file), os.path.realpath(checkpoint.folder)
    if (real := os.path.realpath(path)) != os.path.join(folder, file):
        return f"is a link to {real}, which may be in use under other names (as the Hub's cache is)"
    if real in links:
        return f"is what {links[real]} is a link to, which would lose it"
    if (names := os.stat(path).st_nlink) > 1:
        return f"has {names} names (hard links), all of which would lose it"
    try:
        open(path, "r+b").close()
    except OSError as error:
        immutable = ": it may be immutable, as `lsattr` shows" * (error.errno == errno.EPERM)
        return f"cannot be written ({error.strerror}{immutable})"
    if not os.access(os.path.dirname(path), os.W_OK):
        return "cannot be removed, because its folder cannot be written"
    if _is_in_use(path):
        return "is open in a program that would crash, perhaps as a loaded model"
    return ""


def _is_in_use(path: str) -> bool:
    """Whether somebody has a file open or mapped, as Linux shows whoever asks for a lease."""
    with suppress(ImportError, AttributeError, OSError):  # other systems refuse the cut, or keep the bytes
        with tempfile.TemporaryFile(dir=os.path.dirname(path)) as own:
            _lease(own.fileno())  # which fails where a network disk grants none at all
        with open(path, "r+b") as file:
            try:
                _lease(file.fileno())
            except BlockingIOError:
                return True
    return False


def _lease(handle: int) -> None:
    import fcntl

    fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)  # ignored; the usual signal would end this process
    fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def lock(file: IO[bytes], path: str) -> None:
    """Lock a file until it is closed; on Windows, being open keeps others from cutting it."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError("is being freed by another run", file=path) from None
        except OSError as error:
            why = f"cannot be locked ({error.strerror}), so it is not freed; leave out free_source"
            raise CheckpointError(why, file=path) from error
