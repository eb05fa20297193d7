"""A Hub repository that is written to: what it holds, uploads into it, one commit at the end.

An upload puts content into the repository's storage, where nobody sees it; only a commit changes what
visitors see, and a commit is all or nothing. So whatever fails before it leaves the head as it was.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from shardkit.base.errors import DestinationError, VerificationError
from shardkit.base.record import listed
from shardkit.sources import hub_client as access
from shardkit.sources.fileset import CHUNK_BYTES
from shardkit.sources.hub import RemoteFile, Repository
from shardkit.sources.resolve import hub_name

ResultT = TypeVar("ResultT")

MAIN: str = constants.DEFAULT_REVISION
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
GIT_BYTES = 10_000_000  # no larger file is in git itself: the Hub refuses it
_NONE_IGNORED = "# none\n"  # or a .gitignore would have the client drop files from a commit, and say nothing
# The client wraps what befell an upload in a RuntimeError, and answers what is not taken with a ValueError.
_FAILURES: tuple[type[Exception], ...] = (
    RuntimeError, ValueError, ConnectionError, TimeoutError, *access.CLIENT_ERRORS
)  # fmt: skip
# Weights that a load would find beside ours or before them. Variants (model.fp16.safetensors) are asked for
# by name, and stay.
_SHADOWS = re.compile(
    r"((pytorch_|diffusion_pytorch_|adapter_)?model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)


def described(content: Path | bytes, seen: Callable[[int], object] = lambda _: None) -> RemoteFile:
    """Describe a file as the Hub would list it; `seen` is told of bytes as they are read."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            sha256.update(block)
            if size <= GIT_BYTES:
                git.update(block)
            seen(len(block))
    return RemoteFile(size, git.hexdigest(), sha256.hexdigest())


def is_same(listed: RemoteFile | None, ours: RemoteFile) -> bool:
    """Whether the Hub lists just the content that `ours` describes."""
    if listed is None or listed.size != ours.size:
        return False
    return listed.sha256 == ours.sha256 if listed.sha256 else listed.blob_id == ours.blob_id


def _holds(commit: Repository, wanted: Mapping[str, RemoteFile | None]) -> bool:
    has = commit.listing
    return all(is_same(has.get(name), ours) if ours else name not in has for name, ours in wanted.items())


class Target:
    """A model repository that is written to with the token given, or found.

    `repo_id` is its name, `folder` the same as ``hf://org/name``. Whatever is refused, or fails again and
    again, is a `DestinationError`.
    """

    def __init__(self, repo_id: str, token: str | None = None) -> None:
        self.folder = hub_name(repo_id)
        self.repo_id = repo_id.removeprefix(hub_name(""))
        if not _REPO_ID.fullmatch(self.repo_id):
            raise DestinationError(f"{repo_id[:200]!r} is not a repository id: use owner/name")
        if constants.is_offline_mode():
            raise DestinationError(f"{self.folder}: HF_HUB_OFFLINE is set: unset it to write to the Hub")
        self._token = access.find_token(token)
        if not self._token:
            raise DestinationError(
                f"{self.folder}: writing to the Hub needs a token with write access: {access.LOG_IN}"
            )
        self._api = HfApi(token=self._token, library_name="shardkit")

    def create(self, private: bool) -> None:
        """Make sure that the repository is there; refuse a public one where a private one is wanted."""
        self._persist(lambda: self._api.create_repo(self.repo_id, private=private, exist_ok=True))
        if private and not self._persist(lambda: self._api.model_info(self.repo_id).private):
            raise DestinationError(
                f"{self.folder} already exists and is public: confirm with private=False, or choose "
                "another name"
            )

    def head(self, branch: str = MAIN) -> Repository:
        """Return the commit that a branch shows."""
        sha = self._persist(lambda: str(self._api.model_info(self.repo_id, revision=branch).sha))
        return self._at(sha)

    def branch_off(self, branch: str) -> Repository:
        """Make a branch, from what the head shows, unless it is there; return the commit that it shows."""
        self._persist(lambda: self._api.create_branch(self.repo_id, branch=branch, exist_ok=True))
        return self.head(branch)

    def drop(self, branch: str) -> None:
        """Delete a branch."""
        self._persist(lambda: self._api.delete_branch(self.repo_id, branch=branch))

    def branches(self) -> list[str]:
        """Return the names of all branches."""
        return self._persist(lambda: [ref.name for ref in self._api.list_repo_refs(self.repo_id).branches])

    def upload(self, file: str, path: Path, content: RemoteFile, branch: str = MAIN) -> CommitOperationAdd:
        """Send a file's content, unless the repository has it; return what a commit needs to show it."""
        added = CommitOperationAdd(file, str(path))
        if content.sha256:
            added.upload_info.sha256 = bytes.fromhex(content.sha256)  # or the client would hash it again
        self._preupload([added], branch)
        return added

    def _preupload(self, additions: list[CommitOperationAdd], branch: str) -> None:
        self._persist(
            lambda: self._api.preupload_lfs_files(
                self.repo_id,
                additions,
                revision=branch,
                num_threads=1,
                free_memory=False,
                gitignore_content=_NONE_IGNORED,
            )
        )
        if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
            raise DestinationError(
                f"{self.folder}: its .gitignore excludes {listed(ignored)}: remove these lines"
            )

    def publish(
        self,
        head: Repository,
        contents: Mapping[str, RemoteFile],
        operations: Mapping[str, Any],
        message: str,
    ) -> str:
        """Make the head show `contents` and no weights that could be taken for them; return its commit.

        `head` is what is shown now; `operations` has, by name, what puts a file there. Where all are there
        already, there is no commit.
        """
        is_adapter = any(name.startswith("adapter_model") for name in contents)
        shadows = [
            name
            for name in head.listing.keys() - contents.keys()
            if _SHADOWS.fullmatch(name) and name.startswith("adapter_model") == is_adapter
        ]
        wanted: dict[str, RemoteFile | None] = dict.fromkeys(sorted(shadows))
        wanted |= {n: ours for n, ours in contents.items() if not is_same(head.listing.get(n), ours)}
        if not wanted:
            return head.sha
        todo = [operations[n] if ours else CommitOperationDelete(n) for n, ours in wanted.items()]
        sha = self.commit(todo, wanted, message, head.sha)
        if not _holds(self._at(sha), {**contents, **wanted}):
            raise VerificationError(
                f"{self.folder}: commit {sha} does not contain what was sent: check it on the Hub"
            )
        return sha

    def commit(
        self,
        operations: list[Any],
        wanted: Mapping[str, RemoteFile | None],
        message: str,
        parent: str,
        branch: str = MAIN,
    ) -> str:
        """Make one commit on top of `parent`, and return its sha.

        The commit may be made and its answer lost: then the branch is found to hold what is `wanted` (by
        file, None where a file is to go), and all is well.
        """
        self._preupload([one for one in operations if isinstance(one, CommitOperationAdd)], branch)

        def attempt() -> str:
            try:
                made = self._api.create_commit(
                    self.repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
                )
                return str(made.oid)
            except _FAILURES as error:
                failure = error
            if (head := self.head(branch)).sha == parent:
                raise failure
            if _holds(head, wanted):
                return head.sha
            raise DestinationError(
                f"{self.folder}: somebody else changed it in the meantime, so nothing was published. Run "
                "again: uploaded files are not sent again"
            )

        return self._persist(attempt)

    def _at(self, sha: str) -> Repository:
        return Repository.at(self.repo_id, sha, self._token)

    def _persist(self, call: Callable[[], ResultT]) -> ResultT:
        patience = access.Patience(self.folder)
        while True:
            try:
                return call()
            except _FAILURES as error:
                cause = access.root(error)
            if not access.may_pass(cause):
                raise DestinationError(f"{self.folder}: {_explained(cause)}")
            try:
                patience.wait(*access.happened(cause))
            except access.UnreachableError as gave_up:
                raise DestinationError(str(gave_up)) from None


def _explained(error: BaseException) -> str:
    if not isinstance(error, HfHubHTTPError):
        return " ".join(str(error).split())
    needed = "use one that does (`hf auth login`, HF_TOKEN), or choose another name"
    return access.refused(error, f"the token has no write access to it: {needed}")
