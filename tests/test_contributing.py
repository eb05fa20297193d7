"""CONTRIBUTING.md shows how to add a strategy, a format, a source, a quantity and a host: here it is done."""

import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardkit import Checkpoint, load_model, plan_shards, shard_checkpoint, verify_checkpoint
from shardkit.checkpoint.hosts import HOSTS
from shardkit.checkpoint.scan import FORMATS
from shardkit.errors import CheckpointError, DestinationError
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.quantities import QUANTITIES, Quantity
from shardkit.plan.packing import STRATEGIES
from shardkit.shard.copy import read_chunks
from shardkit.shard.tasks import tensor_range
from shardkit.sources.resolve import SOURCES
from tests.fake_loads import fake_comparison

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(autouse=True)
def _added(request, monkeypatch, tmp_path):
    """Carry out the example of a section; whatever it registers is gone at the end."""
    if not hasattr(request, "param"):
        yield
        return
    registries = STRATEGIES, FORMATS, SOURCES, QUANTITIES, HOSTS
    before = [dict(registry) for registry in registries]
    monkeypatch.setattr(LoadMeasurement, "waiting_seconds", None, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    section = re.search(rf"^### {request.param}\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE)[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    exec(code, {})
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_examples_pass_the_checks_of_the_package(tmp_path):
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)):
        (tmp_path / f"example_{number}.py").write_text(f'"""An example."""\n\n{code}')
    checks = ["ruff", "check", "--config"], ["mypy", "--config-file"]
    for check in checks:
        command = [sys.executable, "-m", *check, ROOT / "pyproject.toml", tmp_path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    values = {name: np.arange(1000, dtype=np.float32) + ord(name) for name in "cabd"}
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "own"}')
    return folder


@pytest.mark.parametrize("_added", ["A strategy"], indirect=True)
def test_a_strategy(source, tmp_path):
    plan = plan_shards(source, max_shard_size=9000, strategy="name")
    assert [[t.source.name for t in shard.tensors] for shard in plan.shards] == [["a", "b"], ["c", "d"]]
    shard_checkpoint(source, tmp_path / "out", max_shard_size=9000, strategy="name")
    assert verify_checkpoint(source, tmp_path / "out").equal


@pytest.mark.parametrize("_added", ["A format"], indirect=True)
def test_a_format(tmp_path):
    values = np.arange(1000, dtype=np.float32)
    values.tofile(tmp_path / "wide.f32")
    opened = Checkpoint.open(tmp_path / "wide.f32")
    assert (opened.format, opened.tensors["wide"].shape) == ("raw", (1000,))
    shard_checkpoint(tmp_path / "wide.f32", tmp_path / "out", dtype="float16")
    (made,) = (tmp_path / "out").glob("*.safetensors")
    assert made.read_bytes().endswith(values.astype(np.float16).tobytes())


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's file server, with ranges."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if (asked := self.headers["Range"]) is None:
            super().do_GET()
            return
        first, last = map(int, re.findall(r"\d+", asked))
        self.send_response(206)
        self.end_headers()
        self.wfile.write(path.read_bytes()[first : last + 1])

    def log_message(self, *_):
        pass


@pytest.fixture
def address(source):
    handler = lambda *args: Ranges(*args, directory=source)  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("_added", ["A source"], indirect=True)
def test_a_source(address, source, tmp_path):
    opened = Checkpoint.open(address)
    assert opened.tensors == Checkpoint.open(source).tensors
    report = shard_checkpoint(address, tmp_path / "out", max_shard_size=9000)
    assert report.verification.received
    assert verify_checkpoint(source, tmp_path / "out").equal
    assert verify_checkpoint(address, tmp_path / "out").equal
    assert f"streamed from {address}" in str(report)
    assert Checkpoint.from_dict(json.loads(json.dumps(opened.to_dict()))).place == opened.place
    with pytest.raises(CheckpointError, match="not on this machine: shard it to a folder"):
        load_model(address)
    with pytest.raises(DestinationError, match="can only be read"):
        shard_checkpoint(source, f"{address}/copy")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*refused"):
        Checkpoint.open("http://127.0.0.1:9")


@pytest.mark.parametrize("_added", ["A source"], indirect=True)
def test_a_source_that_changes_meanwhile_or_leads_out_of_its_folder(address, source, tmp_path, monkeypatch):
    (source / "empty.txt").touch()

    def change(progress):
        if progress.done_bytes:
            os.utime(source / "config.json", (0, 0))

    with pytest.raises(CheckpointError, match="changed while being copied; nothing was published"):
        shard_checkpoint(address, tmp_path / "out", max_shard_size=9000, progress=change)
    assert not (tmp_path / "out").exists()
    shard_checkpoint(address, tmp_path / "out", max_shard_size=9000)
    assert (tmp_path / "out/empty.txt").read_bytes() == b""
    files = type(Checkpoint.open(address).place)
    listed = lambda _: ["model.safetensors", "../../evil.json"]  # noqa: E731
    monkeypatch.setattr(files, "names", listed)
    with pytest.raises(CheckpointError, match=r"has a file outside of it: '\.\./\.\./evil\.json'"):
        Checkpoint.open(address)


@pytest.mark.parametrize("_added", ["A source"], indirect=True)
def test_a_source_that_fails_or_sends_too_little_on_the_way(address, monkeypatch):
    opened = Checkpoint.open(address)
    files = type(opened.place)
    for broken, words in (
        (lambda *_: iter([memoryview(b"1234")]), "4 bytes came where 4000 bytes from byte"),
        (lambda *_: (_ for _ in ()).throw(OSError("gone")), "cannot be read: gone"),
    ):
        monkeypatch.setattr(files, "read", broken)
        with pytest.raises(CheckpointError, match=words):
            deque(read_chunks(tensor_range(opened.place, opened.tensors["a"], "F32")))


@pytest.mark.parametrize("_added", ["A quantity"], indirect=True)
def test_a_quantity():
    comparison = fake_comparison()
    assert "time spent waiting" in str(comparison)
    assert "waiting_seconds" in comparison.ratios
    with pytest.raises(ValueError, match="no axis for counts"):
        Quantity("minor_faults", "minor page faults", "count", plain="main")
    assert Quantity("minor_faults", "minor page faults", "count", plain="listed").format(69105) == "69,105"


@pytest.mark.parametrize("_added", ["A host"], indirect=True)
def test_a_host(source):
    estimate = Checkpoint.open(source).estimate()
    assert "Lightning" in [host.name for host in estimate.hosts]
    assert "Lightning" in str(estimate)
