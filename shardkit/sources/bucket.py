"""Files in a bucket, or wherever else fsspec reaches: ``s3://``, ``gs://``, ``http://``, ``memory://``.

Credentials and endpoints are fsspec's own: environment variables such as AWS_ENDPOINT_URL, its configuration
files, ``fsspec.config.conf``. None is in a name, so none travels with a task: each process finds its own.

One listing answers for names, sizes and states, and a range costs a request for each `BLOCK_BYTES`. That a
file has changed is noticed by listing again (`now`) when all is read, before anything is published.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from shardkit.base.errors import CheckpointError, MissingPackageError, ShardkitError
from shardkit.base.extras import require
from shardkit.formats.names import is_index, is_weights
from shardkit.sources.fileset import CHUNK_BYTES, FileSet, Found, State, is_inside

BLOCK_BYTES = 8 << 20  # of a request: its round trip is short beside it, and each reader holds no more
_PACKAGES = {"s3": ("s3fs",), "s3a": ("s3fs",), "http": ("aiohttp",), "https": ("aiohttp",)}
# What tells one content of a file from another, by the names that file systems have for it; the best first.
_MARKS = ("ETag", "etag", "generation", "md5Hash", "Last-Modified", "LastModified", "mtime", "created")
_SIGN_IN = "for s3://, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Say in a line what a file system, or the client behind it, makes of an address."""
    try:
        yield
    except ShardkitError:
        raise
    except ImportError as error:
        raise MissingPackageError(f"{address}: {error}") from error
    except Exception as error:  # each client has classes of its own
        said = " ".join(str(error).split()) or type(error).__name__
        advice = f": {_SIGN_IN}" if "credential" in said.lower() else ""
        raise CheckpointError(f"cannot be reached: {said}{advice}", file=address) from error


class BucketFiles(FileSet):
    """The files below an address, as one listing has them."""

    def __init__(self, name: str, listing: dict[str, State] | None = None) -> None:
        self.name, self.folder = name.rstrip("/"), None
        self.protocol = self.name.partition("://")[0].lower()
        self.listing = self._listed() if listing is None else listing

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.listing)

    @property
    def system(self) -> Any:
        """The file system, of which fsspec keeps one for each thread."""
        require("cluster", f"reaching {self.name}", "fsspec", *_PACKAGES.get(self.protocol, ()))
        from fsspec.core import url_to_fs  # which takes a fifth of a second to import

        return url_to_fs(self.name)[0]

    def now(self) -> BucketFiles:
        """Return the files that are there now."""
        return type(self)(self.name)

    def _listed(self) -> dict[str, State]:
        with reaching(self.name):
            system = self.system
            system.invalidate_cache()
            root = system._strip_protocol(self.name)
            found = system.find(root, detail=True)
            names = {path: path[len(root) :].lstrip("/") for path in found}
            listing = {n: self._state(path, found[path]) for path, n in names.items() if n}
        if wrong := next((name for name in listing if not is_inside(name)), None):
            raise CheckpointError(f"has a file with an unsafe name: {wrong[:200]!a}", file=self.name)
        return listing

    def _state(self, path: str, said: dict[str, Any]) -> State:
        """Return size and mark of a file; a list of links has neither."""
        if said.get("size") is None:
            said = self.system.info(path)
        if said.get("size") is None:
            raise CheckpointError("has no size: the server does not report it", file=path)
        mark = next((said[mark] for mark in _MARKS if said.get(mark)), "")
        return int(said["size"]), str(mark.timestamp() if isinstance(mark, datetime) else mark)

    def names(self) -> Iterable[str]:
        """Return the names of all files."""
        return self.listing.keys()

    def state(self, name: str) -> State:
        """Return size, and ETag or time of change."""
        if name not in self.listing:
            raise CheckpointError("does not exist", file=self.where(name))
        return self.listing[name]

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range of a file, `BLOCK_BYTES` for each request; as `FileSet.read`."""
        end = offset + nbytes
        for start in range(offset, end, BLOCK_BYTES):
            with reaching(self.where(name)):
                block = memoryview(self._block(name, start, min(start + BLOCK_BYTES, end)))
            yield from (block[i : i + CHUNK_BYTES] for i in range(0, len(block), CHUNK_BYTES))

    def _block(self, name: str, start: int, end: int) -> bytes:
        """Ask for a range once; of a web server by what refuses one that knows none, and sends all."""
        where = self.where(name)
        if self.protocol not in ("http", "https"):
            return bytes(self.system.cat_file(where, start=start, end=end))
        how = {"block_size": BLOCK_BYTES, "cache_type": "none", "size": self.size(name)}
        with self.system.open(where, "rb", **how) as file:
            file.seek(start)
            return bytes(file.read(end - start))

    def content(self, name: str) -> bytes:
        """Return all of a small file."""
        return self.read_bytes(name)

    @cached_property
    def _copies(self) -> str:
        folder = mkdtemp(prefix="shardkit-")
        finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def fetched(self, name: str) -> Path:
        """Return the path of a copy of a file, which is gone with these files."""
        path = Path(self._copies, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            with part.open("wb") as copy:
                for piece in self.pieces(name, 0, self.size(name)):
                    copy.write(piece)
            os.replace(part, path)
        return path


def find_in_bucket(text: str, *_needed: object, revision: str | None = None, **_how: object) -> Found:
    """Return the files of an address, or of the folder that a file lies in."""
    if revision is not None:
        raise CheckpointError("has no revisions: leave out revision", file=text)
    name = text.rstrip("/")
    parent, _, last = name.rpartition("/")
    if is_weights(last) or is_index(last):
        return Found(BucketFiles(parent), name, chosen=last)
    files = BucketFiles(name)
    if not files.listing:
        raise CheckpointError("contains no files: check bucket and name", file=name)
    return Found(files, name)
