"""What a job is cut into: ranges of bytes, and tasks of some megabytes that any worker can carry out.

A `Task` is plain data and `shard.copy.run_task` a plain function, so any executor can carry them out, in
threads, processes or on other machines that see the same disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from shardkit.base.jobs import Crew
from shardkit.formats.pieces import Pieces
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.strided import Layout
from shardkit.formats.tensor import TensorInfo
from shardkit.plan.plan import Shard
from shardkit.shard.mark import Mark
from shardkit.sources.fileset import FileSet
from shardkit.sources.local import LocalFiles

TASK_BYTES = 16 << 20  # small enough to stop within a second, whatever the disk
_LARGEST_TASK = 16 * TASK_BYTES
_TASKS_EACH = 32  # so that workers that are slower than others hold up the end by little


@dataclass(frozen=True, slots=True)
class Range:
    """Source bytes, and where they go in the shard file."""

    files: FileSet
    file: str
    offset: int  # where `layout` is given, that of the whole tensor
    nbytes: int  # of the source; whole elements where they are cast
    target_offset: int
    tensor: str  # the first, where a range covers several
    dtype: str
    target: str  # the dtype to cast to; the same where bytes are only copied
    layout: Layout | Pieces | None = None  # how items lie, where they have to be gathered
    begin: int = 0  # its first byte in the tensor as it is written

    @property
    def is_cast(self) -> bool:
        """Whether bytes change on the way."""
        return self.dtype != self.target

    @property
    def is_received(self) -> bool:
        """Whether its bytes come from another machine."""
        return self.files.folder is None

    @property
    def where(self) -> str:
        """What to call the source file."""
        return self.files.where(self.file)


@dataclass(frozen=True, slots=True)
class Task:
    """Ranges that go into one shard file: some megabytes of them."""

    path: str
    ranges: tuple[Range, ...]
    mark: Mark | None = None  # where a worker elsewhere may carry it out

    @property
    def nbytes(self) -> int:
        """Source bytes."""
        return sum(r.nbytes for r in self.ranges)


@dataclass(frozen=True, slots=True)
class Lost:
    """What the cast of one tensor lost: finite values that became infinite, others that became zero."""

    tensor: str
    overflowed: int
    flushed: int


@dataclass(frozen=True, slots=True)
class Received:
    """Bytes that came from the Hub: where they went in the shard file, and their XXH3-128 as written there.

    The digest is taken of the bytes in hand, before the disk has them: a file that was made of ranges read
    once is proven by reading it back.
    """

    offset: int
    nbytes: int
    digest: str


class Outcome(NamedTuple):
    """What carrying out a task, or all tasks of a shard, came to."""

    lost: tuple[Lost, ...] = ()
    received: tuple[Received, ...] = ()
    sent: Any = None  # what a store's own tasks have to say to it

    def __add__(self, other: Outcome) -> Outcome:  # type: ignore[override]
        return Outcome(self.lost + other.lost, self.received + other.received, self.sent or other.sent)


def tensor_range(files: FileSet, tensor: TensorInfo, target: str, target_offset: int = 0) -> Range:
    """Return the bytes of one whole tensor, to be written as dtype `target` at `target_offset`."""
    place = files, tensor.file, tensor.offset, tensor.nbytes, target_offset
    return Range(*place, tensor.name, tensor.dtype, target, tensor.layout)


def _are_neighbours(first: Range, second: Range) -> bool:
    return (
        first.file == second.file
        and not (first.layout or second.layout or first.is_cast or second.is_cast)
        and first.offset + first.nbytes == second.offset
        and first.target_offset + first.nbytes == second.target_offset
    )


def sub_range(whole: Range, start: int, nbytes: int) -> Range:
    """Return a part of a range, where it goes."""
    written = start * DTYPE_BITS[whole.target] // DTYPE_BITS[whole.dtype]
    return replace(
        whole,
        offset=whole.offset if whole.layout else whole.offset + start,
        nbytes=nbytes,
        target_offset=whole.target_offset + written,
        begin=whole.begin + start,
    )


def task_bytes(total: int, crew: Crew) -> int:
    """Return how large tasks are, of so many bytes in all: those of an executor large where there are many.

    A scheduler such as Dask's takes milliseconds for each, and is one for all workers.
    """
    each = total // (crew.workers * _TASKS_EACH) if crew.executor else 0
    return max(TASK_BYTES, min(each, _LARGEST_TASK))


def shard_tasks(
    shard: Shard, files: FileSet, path: str, mark: Mark | None = None, nbytes: int | None = None
) -> list[Task]:
    """Cut a shard, to be written at `path`, into tasks of about `nbytes`, by default `TASK_BYTES`."""
    tasks: list[Task] = []
    pending: list[Range] = []
    room = nbytes = nbytes or TASK_BYTES
    for part in chain.from_iterable(cut(whole, nbytes) for whole in _shard_ranges(shard, files)):
        if pending and part.nbytes > room:
            tasks.append(Task(path, tuple(pending), mark))
            pending, room = [], nbytes
        pending.append(part)
        room -= part.nbytes
    # A shard of empty tensors has a task as well, so that it finishes as the others do.
    return [*tasks, Task(path, tuple(pending), mark)] if pending or not tasks else tasks


def _shard_ranges(shard: Shard, files: FileSet) -> list[Range]:
    ranges: list[Range] = []
    for planned in (planned for planned in shard.tensors if planned.nbytes):
        whole = tensor_range(files, planned.source, planned.dtype, shard.header_bytes + planned.begin)
        for new in _stacked(whole):
            if ranges and _are_neighbours(ranges[-1], new):
                first = ranges.pop()
                new = sub_range(first, 0, first.nbytes + new.nbytes)
            ranges.append(new)
    return ranges


def _stacked(whole: Range) -> Iterator[Range]:
    """Yield a tensor; piece by piece, which need no gathering, if they lie in it one after the other."""
    if not (isinstance(whole.layout, Pieces) and whole.layout.is_stacked):
        yield whole
        return
    start = 0
    for piece in whole.layout.pieces:
        nbytes = prod(piece.shape) * whole.layout.itemsize
        part = sub_range(whole, start, nbytes)
        yield replace(part, file=piece.file, offset=piece.offset, layout=None, begin=0)
        start += nbytes


def cut(whole: Range, nbytes: int = 0) -> Iterator[Range]:
    """Yield a range in parts of `TASK_BYTES`, or of as many times that as `nbytes` has room for."""
    nbytes = max(1, nbytes // TASK_BYTES) * TASK_BYTES
    for start in range(0, whole.nbytes, nbytes):
        yield sub_range(whole, start, min(nbytes, whole.nbytes - start))


def file_range(path: Path, nbytes: int, offset: int = 0) -> Range:
    """Return bytes of a file on this machine, to be taken as they are."""
    return Range(LocalFiles(path.parent), path.name, offset, nbytes, 0, "", "U8", "U8")
