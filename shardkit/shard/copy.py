"""Moving bytes: from file to file in the kernel, through a cast, gathered, or from the Hub.

Each task finds out whether its worker sees the same disk, and syncs what it has written on another machine,
which this one could not. It may be carried out twice, as where a worker dies: it writes the same again. A
task holds one chunk in memory, however large its tensors are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress

import xxhash

from shardkit.base.errors import CheckpointError, reading
from shardkit.formats.pieces import Pieces
from shardkit.formats.strided import MAX_RECEIVED_SPAN, PIECE_BYTES, gather, read_strided
from shardkit.shard.tasks import Lost, Outcome, Range, Received, Task, sub_range

_CAST_BYTES = 1 << 20  # as much as is read at once: fewer calls cost less than what leaves the caches
_BLOCK_BYTES = 4096
_BINARY = getattr(os, "O_BINARY", 0)  # or Windows changes ends of lines

# What a kernel or filesystem says when it cannot copy this way; the next way is tried then.
_CANNOT = {
    errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSUP, errno.EBADF,
    errno.ENOTSOCK,
}  # fmt: skip


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
        target = os.open(task.path, os.O_WRONLY | _BINARY)
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
        done += _copy_by(_sendfile, source, target, sub_range(part, done, part.nbytes - done))
    finally:
        os.close(source)
    if done < part.nbytes:
        for chunk in read_chunks(sub_range(part, done, part.nbytes - done)):
            _write_all(target, part.target_offset + done, chunk)
            done += len(chunk)


def _copy_by(copy: Callable[[int, int, Range], int], source: int, target: int, part: Range) -> int:
    """Copy as much as the kernel will in one way; return how many bytes."""
    done = 0
    try:
        while done < part.nbytes:
            count = copy(source, target, sub_range(part, done, part.nbytes - done))
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
