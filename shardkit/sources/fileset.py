"""The files of one checkpoint, wherever they are: a folder here, a commit on the Hub, a bucket."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from shardkit.base.errors import CheckpointError, reading
from shardkit.base.jobs import run_all
from shardkit.base.machine import ResultT, TaskT
from shardkit.formats.ranged import RangedFile, Span

CHUNK_BYTES = 1 << 20
_AT_ONCE = 8  # of reads that each cost a round trip
State: TypeAlias = tuple[int | str, ...]  # of a file
# Of the tools that made the copy (`.git` may be a file): not of the model.
NOT_OURS = re.compile(r"\.git|\.cache|\.huggingface|__pycache__|\.ipynb_checkpoints|\..*\.shardkit-.*")


def is_inside(name: str) -> bool:
    """Whether a relative name stays in its folder, and cannot deceive a terminal."""
    return (
        name.isprintable() and not os.path.isabs(name) and ".." not in Path(name).parts and "\\" not in name
    )


class FileSet(ABC):
    """The files of one checkpoint, by names relative to where they are. A task carries it to any process.

    Attributes
    ----------
    name
        What it is called: shown to people, never parsed.
    folder
        The folder on this machine that they lie in; None where they lie elsewhere.
    is_fixed
        Whether they stay as they are for good: those of a commit.
    """

    name: str
    folder: Path | None
    is_fixed = False

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the names of files in the folder and in the folders in it."""

    def belonging(self) -> Iterator[str]:
        """Yield the names of files at any depth, in order; not those of tools that made the copy."""
        for name in sorted(self.names()):
            if os.path.isabs(name) or ".." in name.split("/"):
                raise CheckpointError(f"has a file outside of it: {name[:200]!a}", file=self.name)
            if not any(map(NOT_OURS.fullmatch, name.split("/"))):
                yield name

    def is_file(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self.names()

    @abstractmethod
    def state(self, name: str) -> State:
        """Return what tells one state of a file from another; its size comes first."""

    def size(self, name: str) -> int:
        """Return its size in bytes."""
        return int(self.state(name)[0])

    def now(self) -> FileSet:
        """Return the same files in the states that they are in now: another, where states are kept."""
        return self

    @abstractmethod
    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range of a file, `CHUNK_BYTES` at a time (the last may be less), in a buffer used again."""

    def ranged(self, name: str) -> RangedFile:
        """Return a file to read small ranges of."""

        def read(span: Span) -> bytes:
            return self.read_bytes(name, *span)

        with reading(where := self.where(name)):
            return RangedFile(lambda spans: self.each(read, spans).values(), self.size(name), where)

    def each(self, function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT]) -> dict[TaskT, ResultT]:
        """Return what comes of tasks that read; several at once where each read costs a round trip."""
        if self.folder is not None or len(tasks) == 1:
            return {task: function(task) for task in tasks}
        with run_all(function, tasks, _AT_ONCE) as results:
            found = dict(results)
        return {task: found[task] for task in tasks}

    @abstractmethod
    def fetched(self, name: str) -> Path:
        """Return the path of a small file on this machine, downloaded if need be."""

    def pieces(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range as `read` does, sure to be as long as requested."""
        left, where = nbytes, self.where(name)
        with reading(where):
            for piece in self.read(name, offset, nbytes):
                left -= len(piece)
                yield piece
        if left:
            wanted = f"{nbytes} bytes from byte {offset} on"
            raise CheckpointError(f"{nbytes - left} bytes came where {wanted} were requested", file=where)

    def read_bytes(self, name: str, offset: int = 0, nbytes: int | None = None) -> bytes:
        """Return a range of a file, by default to its end; as `read`."""
        nbytes = self.size(name) - offset if nbytes is None else nbytes
        return b"".join(map(bytes, self.pieces(name, offset, nbytes)))  # each piece is in the same buffer

    def content(self, name: str) -> bytes:
        """Return all of a small file."""
        return self.fetched(name).read_bytes()

    def path(self, name: str) -> Path | None:
        """Return where the kernel may copy a file from; None where it is not on this machine."""
        return self.folder / name if self.folder is not None else None

    def check(self, name: str) -> None:
        """Refuse a file that is not there, or a link that leads out of the folder."""
        if not self.is_file(name):
            raise CheckpointError("does not exist: the download may be incomplete", file=self.where(name))

    def where(self, name: str) -> str:
        """Return what to call one of the files where a person is told of it."""
        return os.path.join(self.name, name) if self.folder is not None else f"{self.name}/{name}"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Found(NamedTuple):
    """The files that a source means, what to call them, and which of them is meant; None where all are."""

    files: FileSet
    source: str
    notes: tuple[str, ...] = ()
    chosen: str | None = None


Needed: TypeAlias = Callable[[FileSet], list[str]]
