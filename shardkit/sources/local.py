"""The files of a checkpoint, wherever they lie: what is asked of a folder here, or of a commit on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from shardkit.base.errors import CheckpointError, reading
from shardkit.formats.safetensors import Header, read_header

if TYPE_CHECKING:
    from shardkit.sources.hub import Repository

# Of the tools that made the copy (`.git` may be a file): not of the model.
NOT_OURS = re.compile(r"\.git|\.cache|\.huggingface|__pycache__|\.ipynb_checkpoints|\..*\.shardkit-.*")

_CACHED = re.compile(r"(models|datasets|spaces)--")


def is_remote(path: str) -> bool:
    """Whether a folder or file is on the Hub: ``hf://org/name@commit/file``."""
    return path.startswith("hf://")


def is_inside(name: str) -> bool:
    """Whether a relative name stays in its folder, and cannot deceive a terminal."""
    return (
        name.isprintable() and not os.path.isabs(name) and ".." not in Path(name).parts and "\\" not in name
    )


class LocalFiles:
    """The files of a folder on this machine, by their names relative to `folder`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._path = Path(folder)
        self.folder = str(self._path)

    def is_file(self, name: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self._path / name)  # which, unlike Path, takes any text for an answer

    def size(self, name: str) -> int:
        """Return its size in bytes."""
        return (self._path / name).stat().st_size

    def read(self, name: str) -> bytes:
        """Return all of a small file."""
        return (self._path / name).read_bytes()

    def header(self, name: str) -> Header:
        """Read and validate the header of a safetensors file."""
        return read_header(self._path / name)

    def names(self) -> Iterable[str]:
        """Return the names of files in the folder and in the folders in it."""
        found = (*self._path.iterdir(), *self._path.glob("*/*"))
        return [path.relative_to(self._path).as_posix() for path in found if path.is_file()]

    def belonging(self) -> Iterator[str]:
        """Yield the names of files at any depth, in order; not those of tools that made the copy."""
        for root, folders, names in os.walk(self._path, onerror=_unreadable):
            folders[:] = sorted(name for name in folders if not NOT_OURS.fullmatch(name))
            for name in folders:
                if os.path.islink(path := os.path.join(root, name)):
                    raise CheckpointError("is a link to a folder: put a copy in its place", file=path)
            for name in sorted(name for name in names if not NOT_OURS.fullmatch(name)):
                path = os.path.join(root, name)
                if os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path)):  # no pipe
                    yield Path(os.path.relpath(path, self._path)).as_posix()

    def leaves(self, name: str) -> Path | None:
        """Return where a file really is, if that is outside the folder.

        The Hub's client links files of a folder, and of a snapshot in its cache, into that cache's `blobs`.
        """
        real, home = (self._path / name).resolve(), self._path.resolve()
        blobs, repository = real.parent, real.parent.parent
        is_of_snapshot = home.parent.name == "snapshots" and repository == home.parent.parent
        is_cached = blobs.name == "blobs" and (is_of_snapshot or _CACHED.match(repository.name) is not None)
        return None if real.is_relative_to(home) or is_cached else real


# Both answer the same questions; `folder` of one on the Hub is ``hf://org/name@commit``.
Files: TypeAlias = "LocalFiles | Repository"


def _unreadable(error: OSError) -> None:
    with reading():
        raise error
