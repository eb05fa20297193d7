"""Bytes of one commit of a Hub repository: any range of any file, over a connection that may fail.

Whatever happens on the way, a range is read whole and from the commit it was asked of, or there is an error:
size and ETag are held against those that the repository listed, and a read that was cut off goes on from the
byte it had reached. Ranges are asked of the `resolve` URL, which leads to a CDN for large files, so they work
whatever storage lies behind it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import category

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from shardkit.base.errors import CheckpointError
from shardkit.base.jobs import run_all
from shardkit.base.record import listed
from shardkit.formats.names import is_weights
from shardkit.sources import hub_client as access
from shardkit.sources.fileset import CHUNK_BYTES, FileSet, is_inside


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the Hub lists of a file: its size in bytes, and a hash of its content.

    `sha256` is that of a large file (LFS); small ones have git's own `blob_id` only.
    """

    size: int
    blob_id: str
    sha256: str | None = None

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this content, by size and hash."""
        if path.stat().st_size != self.size:
            return False
        git = partial(hashlib.sha1, b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256" if self.sha256 else git)
        return digest.hexdigest() == (self.sha256 or self.blob_id)


class Repository(FileSet):
    """One commit of a model repository, called ``hf://org/name@commit``; its token is in no text of it."""

    is_fixed = True

    def __init__(self, repo_id: str, sha: str, token: str | None, files: Mapping[str, RemoteFile]) -> None:
        self.repo_id, self.sha, self.token, self.listing = repo_id, sha, token, files
        self.name, self.folder = f"hf://{repo_id}@{sha}", None
        self._locations: dict[str, tuple[Any, str]] = {}  # by file, where it is and its ETag there

    @classmethod
    def at(cls, repo_id: str, sha: str, token: str | None, tries: int = access.TRIES) -> Repository:
        """Return a commit, all its files listed."""
        api, what = HfApi(token=token or False), f"hf://{repo_id}@{sha}"
        tree = access.ask(
            lambda: list(api.list_repo_tree(repo_id, revision=sha, recursive=True)), what, tries
        )
        files = {}
        for entry in tree:
            if isinstance(entry, RepoFile):
                if problem := name_problem(entry.path):
                    raise CheckpointError(f"has a file {problem}: {entry.path[:200]!a}", file=what)
                sha256 = entry.lfs.sha256 if entry.lfs else None
                files[entry.path] = RemoteFile(entry.size, entry.blob_id, sha256)
        return cls(repo_id, sha, token, files)

    def __reduce__(self) -> tuple[Any, ...]:
        return reopened, (self.repo_id, self.sha)  # its token stays in this process

    def state(self, name: str) -> tuple[int | str, ...]:
        """Return size and hash."""
        listed = self.listing[name]
        return listed.size, listed.sha256 or listed.blob_id

    def names(self) -> Iterable[str]:
        """Return the names of all files."""
        return self.listing.keys()

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range of a file, `CHUNK_BYTES` at a time (the last may be less), in a buffer used again."""
        held = bytearray()
        for piece in self._pieces(name, offset, nbytes):
            held += piece
            while len(held) >= CHUNK_BYTES:
                yield memoryview(held)[:CHUNK_BYTES]
                held = held[CHUNK_BYTES:]
        if held:
            yield memoryview(held)

    def fetched(self, name: str) -> Path:
        """Return a small file's path in the client's cache, downloaded if need be, with its hash checked."""
        token, where = self.token or False, self.where(name)
        path = access.ask(lambda: hf_hub_download(self.repo_id, name, revision=self.sha, token=token), where)
        self.check_hashes({name: Path(path)})
        return Path(path)

    def check_hashes(self, downloaded: Mapping[str, Path]) -> None:
        """Hold files of the client's cache against the Hub's hashes of them; remove those that are others."""
        with run_all(self._is_as_listed, downloaded.items()) as results:
            wrong = sorted(file for (file, _), is_right in results if not is_right)
        if wrong:
            raise CheckpointError(
                "the download does not match its hash on the Hub and was deleted: run again to download it "
                "again",
                file=self.where(listed(wrong)),
            )

    def _is_as_listed(self, downloaded: tuple[str, Path]) -> bool:
        file, path = downloaded
        with suppress(FileNotFoundError):  # the same content was removed under another name
            if self.listing[file].matches(path):
                return True
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return False

    def _pieces(self, file: str, offset: int, nbytes: int) -> Iterator[bytes]:
        """Yield a range in pieces of any length, going on from the byte reached when a connection is lost."""
        where = self.where(file)
        patience, done = access.Patience(where), 0
        while done < nbytes:
            before = done
            failure: tuple[str, float | None] = ("the Hub sent no data", None)
            try:
                for piece in self._request(file, offset + done, nbytes - done):
                    done += len(piece)
                    patience.progressed()
                    yield piece
            except access.CLIENT_ERRORS as error:
                if not access.may_pass(error):
                    raise access.explained(error, where) from None
                failure = access.happened(error)
            if done == before:
                self._locations.pop(file, None)  # asked anew at the Hub, which knows where it is now
                patience.wait(*failure)

    def _request(self, file: str, offset: int, nbytes: int) -> Iterator[bytes]:
        """Ask for a range once; yield what comes of it."""
        at_hub = hf_hub_url(self.repo_id, file, revision=self.sha, endpoint=constants.ENDPOINT)
        url, etag = self._locations.get(file, (at_hub, ""))
        headers = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        if access.is_of_hub(url):  # the token is the Hub's alone: a redirect takes it to no other host
            headers = build_hf_headers(token=self.token or False, library_name="shardkit") | headers
        request = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
        with get_session().stream("GET", url, follow_redirects=True, **request) as response:
            self._check_response(response, file, offset, nbytes)
            found = _etag(response, "ETag")
            if etag and etag != found:
                raise self._wrong(file, f"changed while being read: its ETag was {etag}, now {found}")
            self._locations[file] = response.url, found
            received = 0
            for piece in response.iter_raw():
                received += len(piece)
                if received > nbytes:
                    raise self._wrong(file, f"the Hub sent more than the {nbytes} bytes requested")
                yield piece

    def _check_response(self, response: Any, file: str, offset: int, nbytes: int) -> None:
        """Refuse anything but this range of this file, as it was listed."""
        if response.status_code == 200:
            raise self._wrong(
                file,
                "the server ignored the Range header (a proxy?) and sent the complete file: "
                f"run `hf download {self.repo_id} --revision {self.sha}`, then try again",
            )
        hf_raise_for_status(response)
        said, listed = response.headers.get("Content-Range", ""), self.listing[file]
        total = said.rpartition("/")[2][:80]
        if total != str(listed.size):
            raise self._wrong(file, f"has {total} bytes, but the Hub listed {listed.size}: it changed")
        coding = response.headers.get("Content-Encoding", "identity")
        if not said.startswith(f"bytes {offset}-") or coding != "identity":
            raise self._wrong(
                file,
                f"unexpected answer: status {response.status_code}, Content-Range {said[:80]!r}, encoding "
                f"{coding[:80]!r}; requested {nbytes} bytes from offset {offset}",
            )
        for redirect in response.history:
            linked = _etag(redirect, "X-Linked-Etag")
            if linked and linked != (listed.sha256 or linked):
                raise self._wrong(
                    file, f"has the ETag {linked}, but the Hub listed {listed.sha256}: it changed"
                )

    def _wrong(self, file: str, problem: str) -> CheckpointError:
        return CheckpointError(problem, file=self.where(file))


def _etag(response: Any, header: str) -> str:
    return str(response.headers.get(header, "")).removeprefix("W/").strip('"')[:80]


def name_problem(name: str) -> str | None:
    """Say what is wrong with a file name; weights may have fewer names than what goes with them."""
    if os.path.isabs(name) or ".." in name.split("/"):
        return "outside the repository"
    if any(char == "\\" or category(char) in ("Cc", "Cs") for char in name):
        return "with a control character or a backslash in its name (its owner must rename it)"
    if is_weights(name) and not is_inside(name):
        return "of weights with unprintable characters in its name (its owner must rename it)"
    return None


_OPEN: dict[tuple[str, str], Repository] = {}


def remember(repository: Repository) -> Repository:
    """Keep a repository for tasks that come from another process; one opened with a token stays."""
    key = repository.repo_id, repository.sha
    if repository.token or key not in _OPEN:
        _OPEN[key] = repository
    return _OPEN[key]


def reopened(repo_id: str, sha: str) -> Repository:
    """Return a commit by its names; a process that has not opened it lists it, with the token found there."""
    return _OPEN.get((repo_id, sha)) or remember(Repository.at(repo_id, sha, access.find_token()))
