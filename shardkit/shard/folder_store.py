"""The folder that a destination grows in: journaled, resumable, published at the end.

The journal is bound to source and plan by a fingerprint. It tells which shards were finished; before one is
used again, it is compared with the source (one made from ranged reads, with the digests journaled of what
was received), so neither a torn journal nor lost writes can do harm. So no error needs to discard what is
finished: it is forgotten where the fingerprint is another, or a digest does not match.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path
from threading import Lock
from typing import Any

from shardkit.base import pages
from shardkit.base.errors import (
    CheckpointError,
    DestinationError,
    ShardkitError,
    SpaceError,
    VerificationError,
)
from shardkit.base.machine import free_bytes
from shardkit.base.record import listed, plural
from shardkit.base.sizes import format_size
from shardkit.load.seen import Ask
from shardkit.plan.plan import Shard
from shardkit.shard.destination import (
    beside,
    check_destination,
    clear_after_end,
    discard,
    discard_unfinished,
    locked,
    only_copy_of,
    put_in_place,
    refuse_only_copy,
    remove,
    sync,
)
from shardkit.shard.report import AUTO_DTYPE, Verification, read_from
from shardkit.shard.side_files import altered_files
from shardkit.shard.store import Job, Store
from shardkit.shard.tasks import Lost, Outcome, Received
from shardkit.shard.verify import altered, verify_written
from shardkit.sources.local import file_state
from shardkit.sources.resolve import is_on_hub

_FULL = {errno.ENOSPC, errno.EDQUOT}
_USUAL_BLOCK = 4096


class FolderStore(Store):
    """A folder that becomes `destination`; as `Store`."""

    stage = "copy"

    def __init__(self, job: Job, target: Path, overwrite: bool, resume: bool, ask: Ask | None = None) -> None:
        super().__init__(job)
        self.destination, self.folder = target, beside(target, "staging")
        self._overwrite, self._resume, self._ask = overwrite, resume, ask
        self._journal, self._writing = beside(target, "journal"), Lock()
        self._syncing = ThreadPoolExecutor(2, thread_name_prefix="shardkit-sync")
        self._synced: list[Future[None]] = []
        self._stats: dict[str, tuple[int, ...] | None] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the staging folder; as `Store.open`."""
        try:
            try:
                self._check_destination()
            except DestinationError:
                clear_after_end(self.destination)
                raise
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.destination):
                self._check_destination()  # another run may just have published it
                self._take_over()
                with self._keeping():
                    self._check_finished()
                    self._check_space()
                    self.make_mark()
                    yield
        except OSError as error:
            raise self._explained(error) from error
        finally:
            self._unmark()
            # Without waiting for a slow disk.
            self._syncing.shutdown(wait=False, cancel_futures=True)

    def at_once(self, _: Sequence[Shard]) -> int:
        """Return as many as workers; of what is received or freed one, so that a kill costs one at most."""
        return 1 if self.job.is_read_once else self.job.crew.workers

    def put(self, shard: Shard, outcome: Outcome) -> None:
        """Journal a shard whose last byte was written, and sync it off the caller's thread."""
        self.finished[shard.file] = outcome
        self._write_journal(json.dumps({"shard": shard.file} | outcome._asdict(), default=astuple))
        self._wrote(shard.file)

    def settle(self) -> None:
        """Return when all that was written is on the disk."""
        for future in self._synced:
            future.result()

    def publish(self, files: Sequence[str]) -> tuple[str, Verification | None]:
        """Verify, sync what is left and rename the folder to the destination."""
        self._unmark()
        for file in files:
            self._wrote(file)
        found = self._verify() if self.job.verify else None
        self.settle()
        for folder in (path for path in self.folder.rglob("*") if path.is_dir()):
            sync(folder)
        sync(self.folder)
        self._check_destination()
        self._check_unchanged()
        self._note_replaced()
        self._put_in_place()
        with suppress(OSError):  # it is done; what stays behind is in nobody's way
            self._journal.unlink()
        if left := discard(self.folder, self.destination):
            self.notes.append(
                f"the previous destination could not be removed completely; the rest is in {left}"
            )
        if self.job.is_received:
            place = self.job.checkpoint.place.name
            where = "the Hub" if is_on_hub(place) else place
            self.notes.append(f"streamed from {where}: the source was not downloaded")
        return str(self.destination), found

    def _unmark(self) -> None:
        if self.mark:
            Path(self.mark.path).unlink(missing_ok=True)

    def _put_in_place(self) -> None:
        put_in_place(self.folder, self.destination, self._overwrite)

    def _note_replaced(self) -> None:
        files = [path for path in self.destination.rglob("*") if path.is_file()]
        if files:
            size = format_size(sum(path.stat().st_size for path in files))
            self.notes.append(f"replaced what was there before: {plural(len(files), 'file')}, {size}")

    def _check_destination(self) -> None:
        check_destination(self.job.checkpoint, self.destination, self._overwrite)

    def _take_over(self) -> None:
        is_ours = self._resume and not self.folder.is_symlink()
        self.finished = self._read_journal() if is_ours else {}
        if self.finished:
            for path in self.folder.iterdir():
                if path.name not in self.finished:
                    remove(path)
            self._write_journal("")  # ends the line that a kill has torn
        else:
            discard_unfinished(self.destination)
            self.folder.mkdir()
            self._write_journal(json.dumps({"fingerprint": self.fingerprint}))
        for file in self.finished:
            self._wrote(file)

    def _check_finished(self) -> None:
        """Check what an earlier run left, byte by byte, against the source; forget what is not right."""
        self.settle()  # on the disk: only what it has can be dropped
        in_memory = pages.drop(self.folder / file for file in self.finished)
        if self.finished and in_memory != 0:
            self.notes.append(f"when reused shards were checked: {read_from(len(self.finished), in_memory)}")
        wrong, _ = altered(self.job, self.finished, self.folder)
        for file in wrong:
            del self.finished[file]

    def _verify(self) -> Verification | None:
        if wrong := altered_files(self.job, self.folder):
            raise VerificationError(
                f"{self.destination}: not published: {listed(wrong)} not as in the source"
            )
        found = self._compared()
        if not found.equal:
            differ = {mismatch.tensor for mismatch in found.mismatches} - {AUTO_DTYPE}
            cause = "; the source or the disk has changed" if differ or found.missing else ""
            raise VerificationError(f"{self.destination}: not published: {found.why_unequal}{cause}")
        return replace(found, destination=str(self.destination), files=len(self.job.plan.shards))

    def _compared(self) -> Verification:
        in_memory = pages.drop(self.folder / shard.file for shard in self.job.plan.shards)
        found = verify_written(self.job, self.finished, self.folder, self._ask)
        in_memory = None if self.job.crew.elsewhere else in_memory  # which each machine has of its own
        return replace(found, files_in_memory=in_memory)

    def _check_space(self) -> None:
        needed, free = self._space()
        if needed > free:
            raise SpaceError(
                f"{self.destination} needs {needed:,} bytes ({format_size(needed)}), but its disk has "
                f"only {free:,} ({format_size(free)}) free: free another {needed - free:,} bytes, then run "
                "again"
            )

    def _wrote(self, file: str) -> None:
        """Remember the state of a file, so that a later change is seen; sync it off the caller's thread."""
        self._stats[file] = _state_of(self.folder / file)
        self._synced.append(self._syncing.submit(sync, self.folder / file))

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep what is finished, whatever happens, and say so; what is not finished is of no use."""
        try:
            yield
        except BaseException as error:
            failure = self._explained(error) if isinstance(error, OSError) else error
            if not self.finished:
                with suppress(OSError, DestinationError):
                    discard_unfinished(self.destination)
            elif self.folder.is_dir():  # or it is in place already
                kept = f"{plural(len(self.finished), 'finished shard')} kept in {self.folder}"
                is_only_copy = only_copy_of(self.destination) is not None
                or_clean = f", or `shardkit clean {self.destination}` to remove them" * (not is_only_copy)
                failure.add_note(f"{kept}: run again to resume{or_clean}")
            if failure is error:
                raise
            raise failure from error

    def _explained(self, error: OSError) -> ShardkitError:
        if error.errno in _FULL:
            needed, free = self._space()
            short = needed - free if needed > free else needed  # as under a quota, which no disk tells of
            return SpaceError(
                f"{self.destination}: the disk is full: free another {short:,} bytes "
                f"({format_size(short)}), then run again to resume"
            )
        files = (*self.job.checkpoint.files, *self.job.checkpoint.side_files)
        if error.filename in map(self.job.checkpoint.path, files):
            return CheckpointError(f"cannot be read: {error.strerror}", file=error.filename)
        where = error.filename or self.folder
        return DestinationError(f"{self.destination}: {error.strerror or error} ({where})")

    def _space(self) -> tuple[int, int]:
        plan, side_files = self.job.plan, self.job.checkpoint.side_files
        disk = next(path for path in (self.folder, *self.folder.parents) if path.is_dir())
        block = os.statvfs(disk).f_frsize if hasattr(os, "statvfs") else _USUAL_BLOCK
        # A header names all that a line of the journal can.
        sizes = [*(shard.nbytes for shard in plan.shards), sum(shard.header_bytes for shard in plan.shards)]
        sizes += [*side_files.values(), len((plan.index or "").encode())]
        folders = {"", *map(os.path.dirname, side_files)}
        blocks = sum(-(-size // block) for size in sizes) + len(folders)
        blocks += 3  # the folder of all this, the lock, and a config that a cast makes longer
        return blocks * block - sum(map(_held, self.folder.rglob("*"))), free_bytes(disk)

    def _is_repeated(self, file: str) -> bool:
        """Whether an executor, one of whose workers died, had the same written again."""
        outcome = self.finished.get(file) if self.job.crew.executor else None
        return outcome is not None and not altered(self.job, {file: outcome}, self.folder)[0]

    def _check_unchanged(self) -> None:
        self.check_source()
        for file, seen in self._stats.items():
            is_same = seen is not None and _state_of(self.folder / file) == seen
            if not is_same and not self._is_repeated(file):
                raise CheckpointError(
                    "changed on disk after it was written; nothing was published",
                    file=str(self.folder / file),
                )

    def _write_journal(self, line: str) -> None:
        with self._writing, self._journal.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")

    def _read_journal(self) -> dict[str, Outcome]:
        """Return the finished shards; none where the journal is of another job, or unreadable."""
        entries: list[Any] = []
        with suppress(FileNotFoundError):
            for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):  # torn by a kill, or garbled
                    entries.append(json.loads(line))
        if entries[:1] != [{"fingerprint": self.fingerprint}]:
            refuse_only_copy(self.destination)
            if entries:
                what = plural(max(0, len(entries) - 1), "finished shard")
                self.notes.append(f"starting over: {what} of another source or plan discarded")
                warnings.warn(self.notes[-1], stacklevel=2)  # which is noticed before the work
            return {}
        sizes, kept = {shard.file: shard.nbytes for shard in self.job.plan.shards}, {}
        for entry in entries[1:]:
            with suppress(KeyError, TypeError):  # it makes no sense
                size, path = sizes[entry["shard"]], self.folder / entry["shard"]
                lost = tuple(Lost(*loss) for loss in entry["lost"])
                received = tuple(Received(*part) for part in entry["received"])
                if path.is_file() and not path.is_symlink() and path.stat().st_size == size:
                    kept[entry["shard"]] = Outcome(lost, received)
        return kept


def _state_of(path: Path) -> tuple[int, ...] | None:
    """Return what tells that a file was changed, even if its time was put back; None where it is gone."""
    try:
        with path.open("rb") as file:  # opened, so that a network disk asks its server
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return *file_state(status), status.st_ctime_ns


def _held(path: Path) -> int:
    """Return the bytes that the disk has given to a file: on Windows, all of it at once."""
    if not path.is_file():
        return 0
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
