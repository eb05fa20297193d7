"""A Hub on this machine: what the Hub's real client asks for, answered over HTTP, with faults on demand.

Two servers, as on the Hub: one for the API and small files, one (another origin) for large files, which
are fetched and sent by signed URLs that expire. `LoopbackHub` runs in threads of a test; for a process of
its own, which ends when its standard input does:

    python -m tests.loopback_hub FOLDER --model org/name=MODEL_FOLDER
"""

import argparse
import hashlib
import json
import os
import random
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Self
from unittest.mock import patch
from urllib.parse import parse_qs, unquote

from tests.hub_http import Fault, Handler, Request, Server, StorageHandler, random_fault
from tests.hub_store import Blob, Commit, Refused, Repo, Store, half_heads, upload_mode

TOKEN = "hf_loopbackTokenOfNobody"
USER = "me"

_ID = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", rf"/api/models/{_ID}", "info"),
        ("GET", rf"/api/models/{_ID}/refs", "refs"),
        ("GET", rf"/api/models/{_ID}/revision/{_REVISION}", "info"),
        ("GET", rf"/api/models/{_ID}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/models/{_ID}/paths-info/{_REVISION}", "paths_info"),
        ("POST", rf"/api/models/{_ID}/branch/(?P<branch>[^/]+)", "create_branch"),
        ("DELETE", rf"/api/models/{_ID}/branch/(?P<branch>[^/]+)", "delete_branch"),
        ("POST", rf"/api/models/{_ID}/preupload/{_REVISION}", "preupload"),
        ("POST", rf"/api/models/{_ID}/commit/{_REVISION}", "commit"),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{_ID}\.git/info/lfs/verify", "lfs_verify"),
        ("GET", rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    )
]


class LoopbackHub:
    """The two servers over a folder; gone, with their threads, when the block ends.

    Attributes
    ----------
    url, storage_url
        Where they listen.
    users
        Tokens, and whose they are; a user may write what is below the user's name.
    requests
        All that was asked, in order.
    broken
        Tracebacks of faults that were not asked for.
    url_seconds
        How long a signed URL is good for.
    bytes_a_second
        How fast files are sent, all together; None for as fast as can be.
    """

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "objects")
        self.users = {TOKEN: USER}
        self.requests: list[Request] = []
        self.broken: list[str] = []
        self.url_seconds = 3600.0
        self.bytes_a_second: float | None = None
        self.line = Lock()
        self._faults: list[Fault] = []
        self._chaos: tuple[random.Random, float, str] | None = None
        self._lock, self._secret = Lock(), secrets.token_hex(8)
        self._servers = [Server(handler, self) for handler in (_HubHandler, StorageHandler)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What a process needs to take this for the Hub; the client's cache and store lie in `home`."""
        given = {"HF_TOKEN": token} if token else {}
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), **given}

    @contextmanager
    def believed(self, home: Path) -> Iterator[None]:
        """Let the client in this process, and those of processes it starts, take this for the Hub."""
        from huggingface_hub import constants, hf_api

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        told = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
        told |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
        with (
            patch.multiple(constants, **told),
            patch.object(hf_api.api, "endpoint", self.url),
            patch.dict(os.environ, self.environment(home)),
        ):
            yield

    def add_model(self, repo_id: str, folder: Path, **options: bool) -> str:
        """Make a repository, or a commit, with the files of a folder; return the commit's sha."""
        return self.store.add_folder(repo_id, folder, **options)

    def repo(self, repo_id: str) -> Repo:
        return self.store.repos[repo_id]

    def read(self, repo_id: str, name: str, revision: str = "main") -> bytes:
        commit = self.repo(repo_id).find(revision)
        assert commit is not None, revision
        return self.store.path(commit.tree[name].sha256).read_bytes()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Blob]:
        commit = self.repo(repo_id).find(revision)
        assert commit is not None, revision
        return dict(commit.tree)

    def half_heads(self, repo_id: str) -> list[str]:
        """What was ever wrong with what visitors saw: an index naming absent files, stale weights, ..."""
        return half_heads(self.repo(repo_id), self.store)

    def fail(self, kind: Any, where: str, **options: Any) -> None:
        """Plan a fault: ``fail("drop", "GET storage", at=1000)``."""
        with self._lock:
            self._faults.append(Fault(kind, where, **options))

    def heal(self) -> None:
        """Forget the faults that were planned."""
        with self._lock:
            self._faults.clear()

    def chaos(self, dice: random.Random, rate: float, where: str = ".*") -> None:
        """Let a share of all requests fail in ways that a network and a busy Hub do."""
        self._chaos = (dice, rate, where) if rate else None

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and re.match(fault.where, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
            if self._chaos and re.match(self._chaos[2], request) and self._chaos[0].random() < self._chaos[1]:
                return random_fault(self._chaos[0])
        return None

    def sent(self, where: str = ".*") -> int:
        """Bytes of all answers to the requests that match."""
        return sum(r.sent for r in self.requests if re.match(where, f"{r.method} {r.host} {r.path}"))

    def received(self, where: str = ".*") -> int:
        """Bytes of the bodies of all requests that match."""
        return sum(r.received for r in self.requests if re.match(where, f"{r.method} {r.host} {r.path}"))

    def signed(self, path: str) -> str:
        expires = time.time() + self.url_seconds
        return f"{self.storage_url}{path}?Expires={expires}&Signature={self._signature(path, expires)}"

    def is_valid(self, path: str, query: str) -> bool:
        said = {key: values[0] for key, values in parse_qs(query).items()}
        expires = float(said.get("Expires", 0))
        return time.time() < expires and said.get("Signature") == self._signature(path, expires)

    def _signature(self, path: str, expires: float) -> str:
        return hashlib.sha256(f"{self._secret}{path}{expires}".encode()).hexdigest()


class _HubHandler(Handler):
    """The API, and files as `resolve` gives them."""

    host = "hub"

    def work(self) -> None:
        self.body = b"".join(self.chunks())
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in _ROUTES:
            if method == wanted and (match := pattern.fullmatch(self.route)):
                given = {key: unquote(value) for key, value in match.groupdict().items() if value}
                return getattr(self, name)(**given)
        raise Refused(404, "", f"no such endpoint: {self.command} {self.route}")

    def _user(self) -> str | None:
        _, _, token = self.headers.get("Authorization", "").partition(" ")
        if token and token not in self.hub.users:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _repo(self, repo_id: str, *, content: bool = False, write: bool = False) -> Repo:
        """Find a repository that the user may see, and have the files of, and change."""
        user = self._user()
        repo = self.hub.store.repos.get(repo_id)
        is_owner = user is not None and repo_id.startswith(f"{user}/")
        if repo is None or (repo.private and not is_owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and not is_owner and user not in repo.granted:
            message = f"Access to model {repo_id} is restricted and you are not in the authorized list."
            raise Refused(403 if user else 401, "GatedRepo", message)
        if write and not is_owner:
            raise Refused(403 if user else 401, "", "You don't have the rights to write here")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        if found := repo.find(revision):
            return found
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def whoami(self) -> None:
        if not (user := self._user()):
            raise Refused(401, "", "Invalid username or password.")
        self.reply({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self._user()
        if not owner or owner != self._user():
            raise Refused(
                403 if owner else 401, "", f"You don't have the rights to create a model under {owner}"
            )
        repo_id = f"{owner}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        url = {"url": f"{self.hub.url}/{repo_id}"}
        try:
            self.hub.store.create(repo_id, private=bool(private))
        except Refused as refused:
            return self.reply({"error": str(refused), **url}, refused.status)
        return self.reply(url)

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        commit = self._commit(found, revision)
        self.reply(
            {
                "_id": repo, "id": repo, "modelId": repo, "sha": commit.sha, "private": found.private,
                "gated": "auto" if found.gated else False, "disabled": False, "tags": [], "downloads": 0,
                "likes": 0, "siblings": [{"rfilename": name} for name in commit.tree],
            }
        )  # fmt: skip

    def refs(self, repo: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self._repo(repo).branches.items()
        ]
        self.reply({"branches": branches, "tags": [], "converts": []})

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        commit = self._commit(self._repo(repo), revision)
        prefix = f"{path.rstrip('/')}/" if path else ""
        inside = {name: blob for name, blob in commit.tree.items() if name.startswith(prefix)}
        if path and not inside:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        deep = parse_qs(self.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {name[: name.index("/", len(prefix))] for name in inside if "/" in name[len(prefix) :]}
        listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        files = [_entry(n, blob) for n, blob in inside.items() if deep or "/" not in n[len(prefix) :]]
        self.reply(listed + files)

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self._commit(self._repo(repo), revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
        self.reply([_entry(name, commit.tree[name]) for name in asked if name in commit.tree])

    def create_branch(self, repo: str, branch: str) -> None:
        found = self._repo(repo, write=True)
        if branch in found.branches:
            raise Refused(409, "", f"Reference already exists: refs/heads/{branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[branch] = self._commit(found, start).sha
        self.reply({})

    def delete_branch(self, repo: str, branch: str) -> None:
        found = self._repo(repo, write=True)
        if branch == "main":
            raise Refused(403, "", "main cannot be deleted")
        if found.branches.pop(branch, None) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        self.reply({})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self._commit(self._repo(repo, write=True), revision)
        asked, ignore = json.loads(self.body), commit.tree.get(".gitignore")
        here = self.hub.store.path(ignore.sha256).read_text() if ignore else ""
        ignored = asked.get("gitIgnore", here).splitlines()
        files = [
            {
                "path": file["path"], "uploadMode": upload_mode(file["path"], file["size"]),
                "shouldIgnore": any(fnmatch(file["path"], pattern) for pattern in ignored),
                "oid": commit.tree[file["path"]].etag if file["path"] in commit.tree else None,
            }
            for file in asked["files"]
        ]  # fmt: skip
        self.reply({"files": files})

    def lfs_batch(self, repo: str) -> None:
        held = self._repo(repo, write=True).held
        objects: list[dict[str, Any]] = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in held:
                upload = {"href": self.hub.signed(f"/upload/{repo}/{entry['oid']}")}
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        if asked["oid"] not in self._repo(repo, write=True).held:
            raise Refused(404, "", "no such object")
        self.reply({})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        header, *operations = map(json.loads, self.body.splitlines())
        title, parent = header["value"]["summary"], header["value"].get("parentCommit")
        sha = self.hub.store.commit(found, revision, operations, parent, title)
        self.reply({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo, content=True)
        commit = self._commit(found, revision)
        if path not in commit.tree:
            headers = {"X-Repo-Commit": commit.sha, "X-Error-Code": "EntryNotFound"}
            return self.reply({"error": "Entry not found"}, 404, headers)
        blob = commit.tree[path]
        etag = "changed" if self.fault and self.fault.kind == "etag" else blob.etag
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{etag}"'}
        if not blob.lfs:
            return self.send_file(self.hub.store.path(blob.sha256), headers)
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{etag}"'}
        return self.begin(
            302, {**headers, **linked, "Location": self.hub.signed(f"/objects/{blob.sha256}")}, 0
        )


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 135}} if blob.lfs else {}
    return {"type": "file", "path": name, "oid": blob.oid, "size": blob.size, **lfs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to keep what is uploaded")
    parser.add_argument("--model", action="append", default=[], metavar="ID=FOLDER")
    parser.add_argument("--bytes-a-second", type=float, help="how fast files are sent")
    options = parser.parse_args()
    with LoopbackHub(options.folder) as hub:
        hub.bytes_a_second = options.bytes_a_second
        for model in options.model:
            name, _, path = model.partition("=")
            hub.add_model(name, Path(path))
        print(json.dumps(hub.environment(options.folder / "home")), flush=True)
        with suppress(KeyboardInterrupt):  # which a notebook's kernel passes on when it ends
            sys.stdin.read()


if __name__ == "__main__":
    main()
