"""Moving bytes: from file to file in the kernel, through a cast, gathered, or from the Hub.

A `Task` is plain data and `run_task` a plain function, so any executor can carry them out, in threads,
processes or on other machines that see the same disk: each task finds out whether its worker does, and syncs
what it has written, which this machine could not. It may be carried out twice, as where a worker dies: it
writes the same again. A task holds one chunk in memory, however large its tensors are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from shardkit.base.errors import CheckpointError, reading
from shardkit.formats.pieces import Pieces
from shardkit.formats.safetensors import DTYPE_BITS
from shardkit.formats.strided import MAX_RECEIVED_SPAN, PIECE_BYTES, Layout, gather, read_strided
from shardkit.formats.tensor import TensorInfo
from shardkit.plan.plan import Shard
from shardkit.shard.mark import Mark
from shardkit.sources.fileset import FileSet
from shardkit.sources.local import LocalFiles

_CAST_BYTES = 1 << 19  # with its result and what is counted, what a core has close at hand
_BLOCK_BYTES = 4096
TASK_BYTES = 16 << 20  # small enough to stop within a second, whatever the disk

# What a kernel or filesystem says when it cannot copy this way; the next way is tried then.
_CANNOT = {
    errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSUP, errno.EBADF,
    errno.ENOTSOCK,
}  # fmt: skip


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
    """Ranges that go into one shard file: about `TASK_BYTES` of them."""

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


def _part(whole: Range, start: int, nbytes: int) -> Range:
    written = start * DTYPE_BITS[whole.target] // DTYPE_BITS[whole.dtype]
    return replace(
        whole,
        offset=whole.offset if whole.layout else whole.offset + start,
        nbytes=nbytes,
        target_offset=whole.target_offset + written,
        begin=whole.begin + start,
    )


def shard_tasks(shard: Shard, files: FileSet, path: str, mark: Mark | None = None) -> list[Task]:
    """Cut a shard, to be written at `path`, into tasks of about `TASK_BYTES`."""
    tasks: list[Task] = []
    pending: list[Range] = []
    room = TASK_BYTES
    for part in chain.from_iterable(map(cut, _shard_ranges(shard, files))):
        if pending and part.nbytes > room:
            tasks.append(Task(path, tuple(pending), mark))
            pending, room = [], TASK_BYTES
        pending.append(part)
        room -= part.nbytes
    # A shard of empty tensors has a task as well, so that it finishes as the others do.
    return [*tasks, Task(path, tuple(pending), mark)] if pending or not tasks else tasks


def _shard_ranges(shard: Shard, files: FileSet) -> list[Range]:
    """Return what makes up a shard's data, neighbours in both files joined into one range."""
    ranges: list[Range] = []
    for planned in (planned for planned in shard.tensors if planned.nbytes):
        whole = tensor_range(files, planned.source, planned.dtype, shard.header_bytes + planned.begin)
        for new in _stacked(whole):
            if ranges and _are_neighbours(ranges[-1], new):
                first = ranges.pop()
                new = _part(first, 0, first.nbytes + new.nbytes)
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
        part = _part(whole, start, nbytes)
        yield replace(part, file=piece.file, offset=piece.offset, layout=None, begin=0)
        start += nbytes


def cut(whole: Range) -> Iterator[Range]:
    """Yield a range in parts of at most `TASK_BYTES`."""
    for start in range(0, whole.nbytes, TASK_BYTES):
        yield _part(whole, start, min(TASK_BYTES, whole.nbytes - start))


def file_range(path: Path, nbytes: int, offset: int = 0) -> Range:
    """Return bytes of a file on this machine, to be taken as they are."""
    return Range(LocalFiles(path.parent), path.name, offset, nbytes, 0, "", "U8", "U8")


def run_task(task: Task) -> Outcome:
    """Write a task's ranges into its shard file, which exists; return what casts lost, and what was received.

    Raises
    ------
    CheckpointError
        If a source file ends before its header says, or the Hub refuses, fails or sends something else.
    DestinationError
        If a worker elsewhere does not see the same disk.
    OSError
        If the disk is full or fails.
    """
    outcome, mark = Outcome(), task.mark
    try:
        target = os.open(
            task.path, os.O_WRONLY | getattr(os, "O_BINARY", 0)
        )  # or Windows changes ends of lines
    except FileNotFoundError as error:
        if mark is None:
            raise
        raise mark.unseen(task.path) from error
    try:
        if mark:
            mark.check()  # after that: now it is known to be open in a folder of this run, and no other's
        for part in task.ranges:
            if part.is_received or part.is_cast or part.layout:
                outcome += _write_chunks(part, target)
            else:
                _copy_range(part, target)
        if mark and mark.is_elsewhere:
            os.fsync(target)  # where the run is, the system knows nothing of what is written here
        _start_writeback(target, task)
    finally:
        os.close(target)
    return outcome


def _start_writeback(target: int, task: Task) -> None:
    """Let the disk begin at once, so that the sync at the end finds little left to do.

    Linux answers POSIX_FADV_DONTNEED on dirty pages by writing them; none is dropped before that. What is
    synced is dropped, so that it is read from the disk where it is read again.
    """
    if hasattr(os, "posix_fadvise") and task.ranges:
        first, last = task.ranges[0], task.ranges[-1]
        end = last.target_offset + last.nbytes
        with suppress(OSError):  # not every filesystem takes advice
            os.posix_fadvise(target, first.target_offset, end - first.target_offset, os.POSIX_FADV_DONTNEED)


def read_chunks(part: Range) -> Iterator[memoryview]:
    """Yield the source bytes of a range, at most 1 MiB at a time, in a buffer used again."""
    try:
        if part.layout is None:
            yield from part.files.pieces(part.file, part.offset, part.nbytes)
        elif isinstance(part.layout, Pieces):
            most = MAX_RECEIVED_SPAN if part.is_received else PIECE_BYTES
            yield from part.layout.read(part.files.read_bytes, part.begin, part.nbytes, most)
        elif not part.is_received:
            yield from read_strided(part.where, part.offset, part.layout, part.begin, part.nbytes)
        else:
            data = part.files.read_bytes(part.file, part.offset, part.layout.span)
            yield from gather(data, 0, part.layout, part.begin, part.nbytes)
    except CheckpointError as error:
        raise error.of(part.tensor) from error.__cause__


def cast_chunks(part: Range) -> Iterator[tuple[memoryview, int, int]]:
    """Yield the bytes of a range as they are in the shard, and how many values overflowed and flushed."""
    if not part.is_cast:
        yield from ((chunk, 0, 0) for chunk in read_chunks(part))
        return
    from shardkit.formats.cast import Caster

    caster = Caster(part.dtype, part.target, _CAST_BYTES)
    for chunk in read_chunks(part):
        for start in range(0, len(chunk), _CAST_BYTES):
            yield caster.cast(chunk[start : start + _CAST_BYTES])


def _write_chunks(part: Range, target: int) -> Outcome:
    position, digest, overflowed, flushed = part.target_offset, xxhash.xxh3_128(), 0, 0
    for data, to_infinity, to_zero in cast_chunks(part):
        if part.is_received:
            digest.update(data)
        _write_all(target, position, data)
        position += len(data)
        overflowed += to_infinity
        flushed += to_zero
    lost = Lost(part.tensor, overflowed, flushed)
    received = Received(part.target_offset, position - part.target_offset, digest.hexdigest())
    return Outcome((lost,) * bool(overflowed or flushed), (received,) * part.is_received)


def _write_all(target: int, position: int, data: memoryview) -> None:
    written = 0
    while written < len(data):
        written += _write_at(target, data[written:], position + written)


def _write_at(target: int, data: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(target, data, position)
    os.lseek(target, position, os.SEEK_SET)  # as good: each task has opened the file for itself
    return os.write(target, data)


def _copy_range(part: Range, target: int) -> None:
    """Copy in the kernel where it can: `copy_file_range`, then `sendfile`, then through a buffer."""
    with reading(part.where, part.tensor or None):
        source = os.open(part.where, os.O_RDONLY)
    try:
        done = _copy_by(_copy_file_range, source, target, part)
        done += _copy_by(_sendfile, source, target, _part(part, done, part.nbytes - done))
    finally:
        os.close(source)
    if done < part.nbytes:
        for chunk in read_chunks(_part(part, done, part.nbytes - done)):
            _write_all(target, part.target_offset + done, chunk)
            done += len(chunk)


def _copy_by(copy: Callable[[int, int, Range], int], source: int, target: int, part: Range) -> int:
    """Copy as much as the kernel will in one way; return how many bytes."""
    done = 0
    try:
        while done < part.nbytes:
            count = copy(source, target, _part(part, done, part.nbytes - done))
            if not count:
                break  # the end of the file, or a filesystem that copies nothing: the buffer tells which
            done += count
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    except AttributeError:  # not on this system
        pass
    return done


def _copy_file_range(source: int, target: int, part: Range) -> int:
    """Copy up to where both files begin a block, if they ever do: from there on, some disks share blocks."""
    head = -part.offset % _BLOCK_BYTES if (part.offset - part.target_offset) % _BLOCK_BYTES == 0 else 0
    nbytes = min(head, part.nbytes) or part.nbytes
    return os.copy_file_range(source, target, nbytes, part.offset, part.target_offset)


def _sendfile(source: int, target: int, part: Range) -> int:
    os.lseek(target, part.target_offset, os.SEEK_SET)  # it writes at the descriptor's own position
    return os.sendfile(target, source, part.offset, part.nbytes)
