"""What a Hub keeps: repositories with branches and atomic commits, over files named by what they hold.

Nothing here calls shardkit or the Hub's client: it is the other side of both.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

CHUNK_BYTES = 1 << 20
_LFS_BYTES = 10_000_000  # larger files are kept as LFS objects whatever they are called, as on the Hub
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".msgpack", ".gguf", ".zip")


class Blob(NamedTuple):
    """A file of a tree: its git object id, its size, its SHA-256, and whether it is an LFS object."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


class Commit(NamedTuple):
    """A state of a repository, and the one it came from."""

    sha: str
    parent: str | None
    title: str
    tree: Mapping[str, Blob]


@dataclass
class Repo:
    """A repository; `granted` are the users for whom a gate is open, `held` its uploaded LFS objects."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> Iterator[Commit]:
        """All commits that a branch has ever shown, newest first."""
        sha: str | None = self.branches.get(branch)
        while sha:
            yield self.commits[sha]
            sha = self.commits[sha].parent


class Refused(Exception):  # noqa: N818  an answer, not a failure
    """What a Hub answers instead of what was asked for."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Store:
    """Repositories, and in a folder every file that they hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.lock = RLock()

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def put(self, data: bytes) -> str:
        """Keep a small file."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.path(sha256).exists():  # which may be a link to somebody's file: never written again
            part = self.folder / f"{secrets.token_hex(8)}.part"
            part.write_bytes(data)
            part.rename(self.path(sha256))
        return sha256

    def blob(self, name: str, sha256: str, lfs: bool | None = None) -> Blob:
        """Describe a file that is kept, under a name that decides how."""
        size = self.path(sha256).stat().st_size
        if lfs is None:
            lfs = size > 0 and upload_mode(name, size) == "lfs"
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        content = pointer if lfs else self.path(sha256).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Blob(oid, size, sha256, lfs)

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        """Make a repository with its first commit."""
        with self.lock:
            if repo_id in self.repos:
                raise Refused(409, "", "You already created this model repo")
            repo = self.repos[repo_id] = Repo(repo_id, private, gated)
            attributes = "".join(
                f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES
            )
            blob = self.blob(".gitattributes", self.put(attributes.encode()))
            repo.branches["main"] = self._add(repo, None, "initial commit", {".gitattributes": blob})
            return repo

    def add_folder(self, repo_id: str, folder: Path, **options: bool) -> str:
        """Make a repository, or a commit, with the files of a folder, linked; return the commit's sha."""
        repo = self.repos.get(repo_id) or self.create(repo_id, **options)
        tree = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as handle:
                sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
            if not self.path(sha256).exists():
                try:
                    os.link(path, self.path(sha256))
                except OSError:
                    shutil.copyfile(path, self.path(sha256))
            name = path.relative_to(folder).as_posix()
            tree[name] = self.blob(name, sha256)
            repo.held |= {sha256} if tree[name].lfs else set()
        with self.lock:
            old = repo.commits[repo.branches["main"]]
            repo.branches["main"] = self._add(repo, old, f"add {folder.name}", {**old.tree, **tree})
            return repo.branches["main"]

    def commit(
        self, repo: Repo, branch: str, operations: Sequence[dict[str, Any]], parent: str | None, title: str
    ) -> str:
        """Carry out the operations of one commit, all or none."""
        with self.lock:
            if branch not in repo.branches:
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            old = repo.commits[repo.branches[branch]]
            if parent and not old.sha.startswith(parent):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            tree = dict(old.tree)
            for operation in operations:
                self._apply(repo, tree, operation["key"], operation["value"])
            repo.branches[branch] = self._add(repo, old, title, tree)
            return repo.branches[branch]

    def _apply(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        name = value["path"]
        if key == "file":
            tree[name] = self.blob(name, self.put(base64.b64decode(value["content"])), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in repo.held:
                raise Refused(400, "", f"LFS pointer pointed to a file that does not exist: {name}")
            tree[name] = self.blob(name, value["oid"], lfs=True)
        elif key == "deletedFile":
            if name not in tree:
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {name}")
            del tree[name]
        else:
            raise Refused(400, "", f"no such operation: {key}")

    def _add(self, repo: Repo, old: Commit | None, title: str, tree: Mapping[str, Blob]) -> str:
        parent = old.sha if old else None
        listing = repr((len(repo.commits), parent, title, sorted(tree.items())))
        sha = hashlib.sha1(listing.encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, tree)
        return sha


def upload_mode(name: str, size: int) -> str:
    """How a file of this name and size is to be uploaded."""
    return "lfs" if name.endswith(_LFS_SUFFIXES) or size > _LFS_BYTES else "regular"


def half_heads(repo: Repo, store: Store, branch: str = "main") -> list[str]:
    """Say of every commit that a branch ever showed what was wrong with it as a model; nothing is right."""
    wrong = []
    for commit in repo.history(branch):
        weights = {name for name in commit.tree if name.endswith(".safetensors")}
        index = commit.tree.get("model.safetensors.index.json")
        named = set()
        if index:
            named = set(json.loads(store.path(index.sha256).read_text())["weight_map"].values())
        if absent := named - weights:
            wrong.append(f"{commit.title}: the index names {sorted(absent)}, which are absent")
        if index and (stale := weights - named):
            wrong.append(f"{commit.title}: {sorted(stale)} lie beside an index that does not name them")
        if not index and any(re.search(r"-\d{5}-of-\d{5}", name) for name in weights):
            wrong.append(f"{commit.title}: shards without an index")
        if weights and "config.json" not in commit.tree:
            wrong.append(f"{commit.title}: weights without a config")
    return wrong
