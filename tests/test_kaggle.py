"""Models of Kaggle as sources: attached to a notebook, or downloaded by Kaggle's own client."""

import json
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from threading import Thread

import pytest

from shardkit import Checkpoint, shard_checkpoint
from shardkit.errors import CheckpointError, MissingPackageError, SourceError
from shardkit.sources.resolve import known_sources

NAME = "kaggle://Google/gemma/pyTorch/2b"


@pytest.fixture(autouse=True)
def attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is attached to a notebook."""
    monkeypatch.setenv("KAGGLE_CACHE_MOUNT_FOLDER", str(tmp_path / "input"))
    return tmp_path / "input"


@pytest.mark.parametrize("layout", ["models/Google/gemma/pytorch/2b", "gemma/pytorch/2b"])
def test_model_that_is_attached_is_opened_where_it_lies(layout: str, demo: Path, attached: Path) -> None:
    for version in ("1", "9", "10"):
        copytree(demo, attached / layout / version)
    latest = Checkpoint.open(NAME)
    assert latest.source == latest.folder == str(attached / layout / "10")
    assert f"{NAME} is attached to this notebook" in str(latest)
    assert Checkpoint.open(f"{NAME}/9").source == str(attached / layout / "9")


@pytest.mark.parametrize("layout", ["models/a/b/pytorch/2b/1", "b/pytorch/2b/1", "datasets/me/b", "b"])
def test_what_is_attached_is_suggested(
    layout: str, demo: Path, attached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(demo, attached / layout)
    (attached / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [name for name in known_sources() if name.startswith("/")] == [str(attached / layout)]


@pytest.mark.parametrize("name", ["kaggle://google/gemma", f"{NAME}/latest", "kaggle://a/../b/c"])
def test_name_that_is_none_says_what_one_is_made_of(name: str) -> None:
    with pytest.raises(SourceError, match="is not kaggle://owner/model/framework/variation"):
        Checkpoint.open(name)


def test_version_is_a_part_of_the_name() -> None:
    with pytest.raises(CheckpointError, match=f"has versions, not revisions: {NAME}/3"):
        Checkpoint.open(NAME, revision="3")


def test_without_kaggles_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    monkeypatch.setattr("shardkit.base.extras.find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"needs kagglehub, .* \"shardkit\[kaggle\]\""):
        Checkpoint.open(NAME)


class _Kaggle(BaseHTTPRequestHandler):
    """What Kaggle's client asks of a model, answered with the files of a folder."""

    folder: Path
    refusal = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        call, kind, status = self.path.rpartition("/")[2], "application/json", self.refusal or 200
        if self.refusal:
            data = json.dumps({"code": status, "message": "no"}).encode()
        elif call == "GetModelInstance":
            data = json.dumps({"versionNumber": 3}).encode()
        elif call == "ListModelInstanceVersionFiles":
            data = json.dumps({"files": [{"name": path.name} for path in self.folder.iterdir()]}).encode()
        else:
            data, kind = (self.folder / asked["path"]).read_bytes(), "application/octet-stream"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def kaggle(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let Kaggle's client take a server here for Kaggle; what is returned lets it refuse with a status."""
    if not find_spec("kagglehub"):
        pytest.skip("kagglehub is not installed")
    from kagglesdk import kaggle_env

    class Handler(_Kaggle):
        folder = demo

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, address)
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield lambda status: setattr(Handler, "refusal", status)
        server.shutdown()


def test_model_is_downloaded_once_and_is_then_a_folder(
    kaggle: Callable[[int], None], demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Checkpoint.open(NAME)
    assert opened.source == str(tmp_path / "cache/models/Google/gemma/pyTorch/2b/3")
    assert opened.tensors == Checkpoint.open(demo).tensors
    assert capsys.readouterr().out == "", "or it would be in the way of JSON"
    kaggle(500)
    assert Checkpoint.open(f"{NAME}/3").source == opened.source
    assert shard_checkpoint(opened, tmp_path / "out").verification
    with pytest.raises(CheckpointError, match=f"still offers it as {NAME}/3; to free it, name this folder"):
        shard_checkpoint(f"{NAME}/3", tmp_path / "other", free_source=True)


@pytest.mark.parametrize(("status", "words"), [(404, "Resource not found"), (403, "permission to access")])
def test_refusal_of_kaggle_is_one_line(kaggle: Callable[[int], None], status: int, words: str) -> None:
    kaggle(status)
    with pytest.raises(CheckpointError, match=f"cannot be downloaded: .*{words}") as error:
        Checkpoint.open(NAME)
    assert "\n" not in str(error.value)
