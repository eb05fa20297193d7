"""Models of the Hub as sources: which commit an id means, where its files are, and how to get them here."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from shardkit.base.errors import CheckpointError, SourceError, SpaceError
from shardkit.base.machine import free_bytes
from shardkit.base.record import plural
from shardkit.base.sizes import format_size
from shardkit.formats.names import is_weights
from shardkit.sources.fileset import FileSet, Found, Needed
from shardkit.sources.hub import Repository, remember
from shardkit.sources.hub_client import TRIES, UnreachableError, ask, find_token
from shardkit.sources.local import LocalFiles

_NAME = r"\w[\w.-]*"
_ID = re.compile(rf"(?:hf://)?({_NAME}/{_NAME}|(?<=hf://){_NAME})(?:@(.+))?", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{40}")
# The address of a model's page, or of a folder or file in it, as people copy it from a browser.
_PAGE = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/({_NAME}/{_NAME}|{_NAME})"
    r"(?:/(?:tree|blob|resolve|commit)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?",
    re.ASCII,
)


class HubId(NamedTuple):
    """A model on the Hub, at a branch, a tag or a commit; of several GGUF files, the one that is meant."""

    repo_id: str
    revision: str
    gguf: str = ""

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.revision}"


def parse_id(text: str, revision: str | None = None) -> HubId:
    """Return what an id means: ``org/name``, ``org/name@revision``, ``hf://org/name``, a page's address."""
    found = _ID.fullmatch(text) or _PAGE.fullmatch(text)
    repo_id, named, *file = found.groups() if found else ("", None)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise SourceError(
            f"{text[:200]!r} is not a local folder or file, and not a Hub id (org/name, org/name@revision) "
            "or the URL of a model there"
        ) from None
    if revision and named and revision != named:
        raise CheckpointError(f"{text!r} names another revision than {revision!r}: give only one")
    wanted = (named or constants.DEFAULT_REVISION) if revision is None else revision
    if {"", ".", ".."} & set(wanted.split("/")):  # it is a path in the client's cache
        raise CheckpointError(f"{wanted[:200]!r} is not a revision: use a branch, a tag or a commit")
    return HubId(repo_id, wanted, next((name for name in file if name and name.endswith(".gguf")), ""))


def find_model(
    text: str,
    needed_files: Needed,
    *,
    revision: str | None = None,
    token: str | None = None,
    download: bool = False,
) -> Found:
    """Return the files of a model: in the client's cache where all are there, otherwise on the Hub."""
    wanted = parse_id(text, revision)
    cached = _cached_commit(wanted)
    if constants.is_offline_mode():
        return _from_cache(wanted, cached, "HF_HUB_OFFLINE is set", needed_files)
    try:
        repository = _open(wanted, find_token(token), tries=1 if cached else TRIES)
    except UnreachableError as error:
        if cached:
            return _from_cache(wanted, cached, "the Hub could not be reached", needed_files)
        reason = error.message.partition("; gave up")[0].replace("no connection", "there is no connection")
        raise UnreachableError(
            f"{text!r} is not a local folder or file, and {reason}: try again once the Hub can be reached"
        ) from None
    if wanted.gguf:  # of which headers are read, and no more
        return Found(repository, f"{repository.name}/{wanted.gguf}", chosen=wanted.gguf)
    snapshot, needed = _snapshot(wanted.repo_id, repository.sha), needed_files(repository)
    is_whole = all(map(snapshot.is_file, needed)) and not _doubt(wanted.repo_id, repository.sha).exists()
    if not is_whole and not download:
        return Found(repository, repository.name)
    notes = () if is_whole else _download(repository, snapshot, needed)
    if download:
        _note_commit(wanted, repository.sha)
    return Found(snapshot, repository.name, notes)


def must_stream(
    repository: FileSet, needed_files: Needed, written_bytes: int, destination: str | os.PathLike[str]
) -> bool:
    """Whether disks have no room for a model of the Hub, downloaded, and what will be written of it."""
    if not isinstance(repository, Repository):
        return False
    snapshot = _snapshot(repository.repo_id, repository.sha)
    missing = [name for name in needed_files(repository) if not snapshot.is_file(name)]
    cache, target = _existing(snapshot.name), _existing(os.path.abspath(os.path.expanduser(destination)))
    beside = written_bytes if os.stat(cache).st_dev == os.stat(target).st_dev else 0
    return sum(map(repository.size, missing)) + beside > free_bytes(cache)


def _open(wanted: HubId, token: str | None, tries: int) -> Repository:
    """Pin a revision to the commit that it is now, and list its files."""
    sha, what = wanted.revision, str(wanted)
    if not _SHA.fullmatch(sha):
        api, timeout = HfApi(token=token or False), constants.HF_HUB_ETAG_TIMEOUT
        sha = ask(lambda: api.model_info(wanted.repo_id, revision=sha, timeout=timeout).sha, what, tries)
    return remember(Repository.at(wanted.repo_id, sha, token, tries))


def _storage(repo_id: str) -> Path:
    """Return where the client's cache has a model: `refs`, `blobs`, and `snapshots` that link to them."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))


def _snapshot(repo_id: str, sha: str) -> LocalFiles:
    return LocalFiles(_storage(repo_id) / "snapshots" / sha)


def _doubt(repo_id: str, sha: str) -> Path:
    """Return the file that is there until all that was downloaded of a commit is checked."""
    return _storage(repo_id) / f".shardkit-unchecked-{sha}"


def _cached_commit(wanted: HubId) -> str | None:
    """Return the commit that a revision was when the cache last heard of it, if any of it is there."""
    storage, sha = _storage(wanted.repo_id), wanted.revision
    if not _SHA.fullmatch(sha):
        try:
            sha = (storage / "refs" / sha).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    return sha if _SHA.fullmatch(sha) and (storage / "snapshots" / sha).is_dir() else None


def cached_models() -> list[str]:
    """Return ids of models that the client's cache has weights of."""
    files = Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/*")
    names = (path.parts[-4].split("--") for path in files if is_weights(path.name))
    return sorted({"/".join(parts[1:]) for parts in names if len(parts) == 3})


def _note_commit(wanted: HubId, sha: str) -> None:
    """Tell the cache what a branch or tag is, so that it is found under that name when offline."""
    if not _SHA.fullmatch(wanted.revision) and _cached_commit(wanted) != sha:
        path = _storage(wanted.repo_id) / "refs" / wanted.revision
        with suppress(OSError):  # a cache that cannot be written, or has "v1" where this is "v1/x"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(sha, encoding="utf-8")


def _from_cache(wanted: HubId, sha: str | None, why: str, needed_files: Needed) -> Found:
    if sha is None:
        raise CheckpointError(
            f"is not in the local cache, and {why}: download it while online", file=str(wanted)
        )
    snapshot = _snapshot(wanted.repo_id, sha)
    try:
        needed_files(snapshot)
        if _doubt(wanted.repo_id, sha).exists():
            raise CheckpointError("its download stopped before all files were checked")
    except CheckpointError as error:
        raise CheckpointError(
            f"is incomplete in the local cache, and {why}: {error}", file=str(wanted)
        ) from None
    return Found(snapshot, f"hf://{wanted.repo_id}@{sha}", (f"{why}: using the local cache",))


def _download(repository: Repository, snapshot: LocalFiles, needed: Sequence[str]) -> tuple[str, ...]:
    """Download what is missing, and check all, whoever has downloaded it."""
    missing = [name for name in needed if not snapshot.is_file(name)]
    nbytes = sum(map(repository.size, missing))
    _check_space(repository, snapshot.name, nbytes, needed)
    doubt = _doubt(repository.repo_id, repository.sha)
    with suppress(OSError):  # a cache that cannot be written: nothing is downloaded into it, either
        doubt.parent.mkdir(parents=True, exist_ok=True)
        doubt.touch()

    def fetch() -> None:
        # By name: a repository may hold the same weights in three formats.
        names = [glob.escape(name) for name in needed]
        repo_id, token = repository.repo_id, repository.token
        snapshot_download(repo_id, revision=repository.sha, allow_patterns=names, token=token or False)

    try:
        ask(fetch, repository.name, bars=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SpaceError(f"{repository.name}: the disk of {snapshot.name} is full") from error
    repository.check_hashes({name: Path(snapshot.name, name) for name in needed})
    with suppress(OSError):
        doubt.unlink()
    what = f"{plural(len(missing), 'file')}, {format_size(nbytes)}"
    return (f"downloaded {what}, each checked against its hash on the Hub",) * bool(missing)


def _check_space(repository: Repository, folder: str, nbytes: int, needed: Sequence[str]) -> None:
    free = free_bytes(_existing(folder))
    if nbytes > free:
        can_stream = ".safetensors" in needed[0]  # the weights, or their index
        instead = ", or shard without downloading (stream=True)" if can_stream else ""
        raise SpaceError(
            f"{repository.name}: the download needs {nbytes:,} bytes ({format_size(nbytes)}), but "
            f"the disk of {folder} has {free:,} ({format_size(free)}) free: move the cache (HF_HOME){instead}"
        )


def _existing(path: str) -> str:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path
