"""The files of a folder on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from shardkit.base.disk import PAGE, DiskFile, own_memory, pages_of
from shardkit.base.errors import CheckpointError, reading
from shardkit.sources.fileset import CHUNK_BYTES, NOT_OURS, FileSet

_AHEAD_BYTES = 8 << 20
_CACHED = re.compile(r"(models|datasets|spaces)--")


class LocalFiles(FileSet):
    """The files of a folder on this machine, by their names relative to `folder`."""

    folder: Path

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.name = str(self.folder)

    def is_file(self, name: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.folder / name)  # which, unlike Path, takes any text for an answer

    def state(self, name: str) -> tuple[int, ...]:
        """Return size, time and inode."""
        with reading():
            return file_state(os.stat(self.folder / name))

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range of a file; as `FileSet.read`."""
        path = self.where(name)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, nbytes)))
        with reading(path), open(path, "rb") as source:
            source.seek(offset)
            for done in range(0, nbytes, CHUNK_BYTES):
                if done % _AHEAD_BYTES == 0 and nbytes > CHUNK_BYTES:  # let the disk work meanwhile
                    ahead = min(2 * _AHEAD_BYTES, nbytes - done)
                    with suppress(OSError, AttributeError):  # not on every system
                        os.posix_fadvise(source.fileno(), offset + done, ahead, os.POSIX_FADV_WILLNEED)
                chunk = buffer[: nbytes - done]
                if source.readinto(chunk) < len(chunk):
                    raise CheckpointError(
                        f"ends at byte {os.fstat(source.fileno()).st_size}, but its data extends to byte "
                        f"{offset + nbytes}: it was truncated while being read",
                        file=path,
                    )
                yield chunk

    def fetched(self, name: str) -> Path:
        """Return the path of a file."""
        return self.folder / name

    def names(self) -> Iterable[str]:
        """Return the names of files in the folder and in the folders in it."""
        found = (*self.folder.iterdir(), *self.folder.glob("*/*"))
        return [path.relative_to(self.folder).as_posix() for path in found if path.is_file()]

    def belonging(self) -> Iterator[str]:
        """Yield the names of files at any depth, in order; not those of tools that made the copy."""
        for root, folders, names in os.walk(self.folder, onerror=_unreadable):
            folders[:] = sorted(name for name in folders if not NOT_OURS.fullmatch(name))
            for name in folders:
                if os.path.islink(path := os.path.join(root, name)):
                    raise CheckpointError("is a symlink to a folder: replace it with a copy", file=path)
            for name in sorted(name for name in names if not NOT_OURS.fullmatch(name)):
                path = os.path.join(root, name)
                if os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path)):  # no pipe
                    yield Path(os.path.relpath(path, self.folder)).as_posix()

    def check(self, name: str) -> None:
        """Refuse a file that is not there, or a link that leads out of the folder.

        The Hub's client links files of a folder, and of a snapshot in its cache, into that cache's `blobs`.
        """
        path = self.where(name)
        if not self.is_file(name):
            if os.path.exists(path):
                raise CheckpointError("is not a regular file", file=path)
            link = f"is a link to {os.readlink(path)}, which " if os.path.islink(path) else ""
            raise CheckpointError(f"{link}does not exist: the download may be incomplete", file=path)
        real, home = Path(path).resolve(), self.folder.resolve()
        blobs, repository = real.parent, real.parent.parent
        is_of_snapshot = home.parent.name == "snapshots" and repository == home.parent.parent
        is_cached = blobs.name == "blobs" and (is_of_snapshot or _CACHED.match(repository.name) is not None)
        if not (real.is_relative_to(home) or is_cached):
            raise CheckpointError(
                f"is a link to {real}, outside the folder: replace it with the file itself", file=path
            )


class WrittenFiles(LocalFiles):
    """The files of a folder as its disk has them: large ranges are read past the page cache, where possible.

    That takes a tenth of the processor's time, which is left for what is done with the bytes.
    """

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range of a file; as `FileSet.read`."""
        end = offset + nbytes
        if nbytes >= CHUNK_BYTES and hasattr(os, "O_DIRECT"):
            file, buffer = DiskFile(self.where(name)), memoryview(own_memory(CHUNK_BYTES))
            with suppress(OSError):  # refused, or it fails: then the page cache says why
                while offset < end:
                    start = offset // PAGE * PAGE
                    count = file.read_direct(buffer[: pages_of(end - start)], start)
                    if not (piece := buffer[offset - start : min(count, end - start)]):
                        break  # the file ends here
                    yield piece
                    offset += len(piece)
        yield from super().read(name, offset, end - offset)


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells one state of a file from another."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _unreadable(error: OSError) -> None:
    with reading():
        raise error
