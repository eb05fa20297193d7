"""Checkpoints in buckets: a loopback S3 (moto) behind the client that all use, and fsspec's own memory."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest

import shardkit
from shardkit import Checkpoint, load_model, plan_shards, shard_checkpoint, shard_on_hub, verify_checkpoint
from shardkit.base import extras
from shardkit.cli import main
from shardkit.errors import CheckpointError, DestinationError, MissingPackageError, VerificationError
from shardkit.shard import bucket_store
from tests.loopback_hub import LoopbackHub
from tests.test_contributing import Ranges

LIMIT = "5MB"

# Dies by SIGKILL once two thirds of its bytes are done, so that some of its shards are finished.
KILLED = """
import os, signal, sys, shardkit
def progress(now):
    if now.stage in ("copy", "stream") and now.done_bytes > now.total_bytes * 2 / 3:
        os.kill(os.getpid(), signal.SIGKILL)
source, destination = sys.argv[1:]
shard = shardkit.shard_on_hub if destination.startswith("me/") else shardkit.shard_checkpoint
shard(source, destination, max_shard_size="5MB", workers=1, progress=progress)
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A loopback S3 with an empty bucket, which every client in this process and those it starts finds."""
    if find_spec("moto") is None and not os.environ.get("CI"):
        pytest.skip("needs moto (in requirements.txt)")
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # What an earlier server of this process has held is still there, where others' tests came in between.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "loopback")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system = S3FileSystem()
        system.mkdir("bucket")
        yield system
        S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def in_s3(s3: Any, demo: Path) -> str:
    """The demo model in a bucket, as others would have put it there."""
    s3.put(f"{demo}/", "bucket/demo/", recursive=True)
    return "s3://bucket/demo"


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address that has nothing yet; the current folder is one of its own."""
    request.getfixturevalue("s3")
    monkeypatch.chdir(tmp_path)
    return f"s3://bucket/{abs(hash(request.node.name))}/out"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Fsspec's own memory, empty."""
    monkeypatch.chdir(tmp_path)
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


class QuietFiles(SimpleHTTPRequestHandler):
    """Python's file server, which knows no ranges."""

    def log_message(self, *_: Any) -> None:
        pass


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def stored(system: Any, address: str) -> dict[str, bytes]:
    """Every file below an address and beside it, by its name from there."""
    parent = system._strip_protocol(address).rpartition("/")[0]
    return {path.removeprefix(f"{parent}/"): system.cat_file(path) for path in system.find(parent)}


@pytest.fixture(scope="module")
def expected(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What a folder has after the same job, by limit."""
    base = tmp_path_factory.mktemp("expected")

    def made(limit: str) -> dict[str, bytes]:
        if not (base / limit).exists():
            shard_checkpoint(demo, base / limit, max_shard_size=limit)
        return files_of(base / limit)

    return made


@pytest.mark.parametrize("limit", [LIMIT, "1GB"])
def test_a_bucket_gets_what_a_folder_gets_and_gives_it_back(
    s3: Any, demo: Path, place: str, limit: str, expected: Any, tmp_path: Path
) -> None:
    report = shard_checkpoint(demo, place, max_shard_size=limit)
    assert report.verification.equal
    assert stored(s3, place) == {f"out/{name}": data for name, data in expected(limit).items()}
    assert list(tmp_path.iterdir()) == []
    assert verify_checkpoint(demo, place).equal
    assert Checkpoint.open(place).tensors.keys() == Checkpoint.open(demo).tensors.keys()
    back = shard_checkpoint(plan_shards(place, max_shard_size=LIMIT), "back")
    assert back.verification.received
    assert verify_checkpoint(demo, "back").equal
    assert (
        verify_checkpoint(f"{place}/{min(report.files)}", f"back/{min(back.files)}").missing == ()
        or limit == LIMIT
    )


@pytest.mark.parametrize("kind", ["folder to s3", "s3 to folder", "s3 to the Hub"])
def test_a_run_that_is_killed_resumes(
    kind: str, in_s3: str, demo: Path, place: str, hub: LoopbackHub, s3: Any, expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = str(demo) if kind == "folder to s3" else in_s3
    destination = {"folder to s3": place, "s3 to folder": "out", "s3 to the Hub": "me/out"}[kind]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, source, destination], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if kind == "folder to s3":
        with pytest.raises(CheckpointError):  # absent, as far as a load can tell
            Checkpoint.open(place)
        assert "out/model.safetensors.index.json" not in stored(s3, place)
    sent = []
    send = bucket_store._Place.send
    monkeypatch.setattr(bucket_store._Place, "send", lambda *all_: (sent.append(all_[2]), send(*all_)))
    again = shard_on_hub if kind == "s3 to the Hub" else shard_checkpoint
    report = again(source, destination, max_shard_size=LIMIT)
    assert report.reused
    assert not set(report.reused) & set(sent)
    assert report.verification.equal
    names = expected(LIMIT)
    if kind == "folder to s3":
        assert stored(s3, place) == {f"out/{name}": data for name, data in names.items()}
    elif kind == "s3 to folder":
        assert files_of(Path("out")) == names
        assert verify_checkpoint(demo, "out").equal
    else:
        assert hub.half_heads("me/out") == []
        assert verify_checkpoint(demo, "me/out").equal
        assert "s3://" not in str([commit.title for commit in hub.repo("me/out").history()])


def test_a_model_of_the_hub_is_streamed_into_a_bucket(demo: Path, place: str, hub: LoopbackHub) -> None:
    hub.add_model("org/demo", demo)
    report = shard_checkpoint("org/demo", place, max_shard_size=LIMIT)
    assert report.verification.received
    assert verify_checkpoint(demo, place).equal
    assert not any(Path("hub-home").rglob("*.safetensors"))


def test_processes_read_from_a_bucket(in_s3: str, demo: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        shard_checkpoint(in_s3, tmp_path / "out", max_shard_size=LIMIT, executor=executor)
    assert verify_checkpoint(demo, tmp_path / "out").equal


def test_a_source_that_changes_while_it_is_read_is_refused(s3: Any, in_s3: str, place: str) -> None:
    source = place.replace("/out", "/in")
    s3.copy(in_s3, source, recursive=True)
    victim = sorted(s3.find(source))[-2]
    tampered = bytes(s3.cat_file(victim))[:-1] + b"x"

    def replaced(_: Any) -> None:
        s3.pipe_file(victim, tampered)

    with pytest.raises(CheckpointError, match="changed while being copied; nothing was published"):
        shard_checkpoint(source, place, max_shard_size=LIMIT, progress=replaced)
    assert "out/model.safetensors.index.json" not in stored(s3, place)


def free(source: Any, destination: str) -> None:
    shard_checkpoint(source, destination, free_source=True)


@pytest.mark.usefixtures("in_s3")
@pytest.mark.parametrize(
    ("words", "act"),
    [
        (r"s3://none/m cannot be reached: The specified bucket", lambda _: Checkpoint.open("s3://none/m")),
        (r"s3://bucket/none contains no files", lambda _: Checkpoint.open("s3://bucket/none")),
        (r"model\.safetensors does not exist", lambda _: Checkpoint.open("s3://bucket/x/model.safetensors")),
        (r"has no revisions", lambda _: Checkpoint.open("s3://bucket/demo", revision="v1")),
        (r"foo://x cannot be reached: Protocol not known: foo", lambda _: Checkpoint.open("foo://x")),
        (r"not on this machine: shard it to a folder, and load that", lambda _: load_model("s3://bucket/demo")),
        (r"s3://none/m cannot be reached: The specified bucket", lambda demo: shard_checkpoint(demo, "s3://none/m")),
        (r"s3://bucket is a bucket: choose a folder in it", lambda demo: shard_checkpoint(demo, "s3://bucket/")),
        (r"s3://bucket/demo already has 9 files \(README", lambda demo: shard_checkpoint(demo, "s3://bucket/demo")),
        (r"is the source, or inside it", lambda _: shard_checkpoint("s3://bucket/demo", "s3://bucket/demo/in")),
        (r"http://x/y can only be read", lambda demo: shard_checkpoint(demo, "http://x/y")),
        (r"s3://x/y is not a folder on this machine: leave out", lambda demo: free(demo, "s3://x/y")),
        (r"s3://bucket/demo is not on this machine: stream it", lambda _: free("s3://bucket/demo", "out")),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_line(
    words: str, act: Callable[[Path], Any], demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, DestinationError), match=words) as caught:
        act(demo)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "cannot be reached: Could not connect to the endpoint"),
        ("AWS_ACCESS_KEY_ID", "", "cannot be reached: Unable to locate credentials: for s3://, set AWS_ACC"),
    ],
)
def test_a_server_or_credentials_that_are_missing_are_named(
    name: str, value: str, words: str, in_s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(in_s3)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    with pytest.raises(MissingPackageError, match=r'needs s3fs, .* pip install "shardkit\[cluster\]"'):
        Checkpoint.open("s3://bucket/m")


def test_a_terminal_takes_addresses(
    in_s3: str, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["inspect", in_s3], ["plan", in_s3], ["shard", in_s3, place], ["verify", in_s3, place]):
        monkeypatch.setattr(sys, "argv", ["shardkit", *words, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("handler", [Ranges, QuietFiles], ids=["ranges", "no ranges"])
def test_a_web_server_is_read_if_it_knows_ranges(handler: Any, demo: Path, tmp_path: Path) -> None:
    if find_spec("aiohttp") is None and not os.environ.get("CI"):
        pytest.skip("needs aiohttp (in requirements.txt)")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=demo)) as server:
        Thread(target=server.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            if handler is Ranges:
                assert shard_checkpoint(address, tmp_path / "out", max_shard_size=LIMIT).verification.received
                assert verify_checkpoint(demo, tmp_path / "out").equal
            else:
                with pytest.raises(CheckpointError, match="doesn't appear to support range requests"):
                    shard_checkpoint(address, tmp_path / "out")
        finally:
            server.shutdown()


class TestRuns:
    """What runs leave, find and refuse, in memory."""

    def stopped(self, demo: Path, **options: Any) -> None:
        def stop(now: Any) -> bool:
            return now.stage != "stream" or now.done_bytes < now.total_bytes / 2

        with pytest.raises(shardkit.errors.Cancelled) as caught:
            shard_checkpoint(
                demo, "memory://b/out", max_shard_size=LIMIT, progress=stop, workers=1, **options
            )
        assert "kept in memory://b/out: run again to resume" in caught.value.__notes__[0]

    def test_shards_of_another_plan_are_removed(self, memory: Any, demo: Path) -> None:
        self.stopped(demo)
        report = shard_checkpoint(demo, "memory://b/out", max_shard_size="8MB")
        assert report.reused == ()
        assert any("starting over" in note for note in report.notes)
        assert len(memory.find("/b")) == len(report.files) + len(report.side_files) + 1  # the index
        assert verify_checkpoint(demo, "memory://b/out").equal

    def test_clean_removes_what_a_run_has_left_and_nothing_else(self, memory: Any, demo: Path) -> None:
        self.stopped(demo)
        memory.pipe_file("/b/other", b"mine")
        assert bucket_store.discard_in_bucket("memory://b/out")
        assert memory.find("/b") == ["/b/other"]
        shard_checkpoint(demo, "memory://b/out")
        before = memory.find("/b")
        assert bucket_store.discard_in_bucket("memory://b/out") == []
        assert memory.find("/b") == before

    @pytest.mark.parametrize("limit", [LIMIT, "1GB"])
    def test_what_follows_a_run_that_was_killed_after_its_end_leaves_all_or_nothing(
        self, memory: Any, demo: Path, limit: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = bucket_store._Place
        drop = place.drop

        def is_kept(self: Any, names: Any) -> list[str]:
            return [] if "journal" in self.name else drop(self, names)

        def fail(*_: Any) -> None:
            raise DestinationError("no connection")

        with monkeypatch.context() as patch:
            patch.setattr(place, "drop", is_kept)
            shard_checkpoint(demo, "memory://b/out", max_shard_size=limit)
        with monkeypatch.context() as patch:
            patch.setattr(place, "send", fail)
            with pytest.raises(DestinationError):
                shard_checkpoint(demo, "memory://b/out", max_shard_size=limit)
        found = {"/b/out/model.safetensors", "/b/out/model.safetensors.index.json"} & {*memory.find("/b")}
        assert not found  # by which transformers would find it
        assert shard_checkpoint(demo, "memory://b/out", max_shard_size=limit).reused
        assert verify_checkpoint(demo, "memory://b/out").equal

    def test_files_of_others_are_left_alone(self, memory: Any, demo: Path) -> None:
        self.stopped(demo)
        memory.pipe_file("/b/out/notes.txt", b"mine")
        with pytest.raises(DestinationError, match=r"already has 1 file \(notes.txt\)"):
            shard_checkpoint(demo, "memory://b/out", max_shard_size=LIMIT)
        assert memory.cat_file("/b/out/notes.txt") == b"mine"

    def test_a_shard_that_changed_since_is_sent_again(self, memory: Any, demo: Path) -> None:
        self.stopped(demo)
        changed, *_ = memory.find("/b/out")
        memory.pipe_file(changed, memory.cat_file(changed)[:-1] + b"x")
        report = shard_checkpoint(demo, "memory://b/out", max_shard_size=LIMIT)
        assert Path(changed).name not in report.reused
        assert verify_checkpoint(demo, "memory://b/out").equal

    @pytest.mark.parametrize("limit", [LIMIT, "1GB"])
    def test_an_upload_that_is_not_what_was_sent_is_deleted(
        self, memory: Any, demo: Path, limit: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put = type(memory).put_file

        def flipped(self: Any, path: str, where: str, **options: Any) -> None:
            put(self, path, where, **options)
            if where.endswith(".safetensors"):
                data = bytearray(memory.cat_file(where))
                data[-1] ^= 1
                memory.pipe_file(where, bytes(data))

        monkeypatch.setattr(type(memory), "put_file", flipped)  # each thread has an instance
        with pytest.raises(VerificationError, match="differed from what was sent, and was deleted"):
            shard_checkpoint(demo, "memory://b/out", max_shard_size=limit)
        assert not any(name.endswith(".safetensors") for name in memory.find("/b"))

    def test_a_destination_that_another_writes_to_meanwhile_is_not_published(
        self, memory: Any, demo: Path
    ) -> None:
        def meddling(now: Any) -> None:
            if now.stage == "stream" and now.done_bytes == now.total_bytes:
                victim = next(name for name in memory.find("/b/out") if name.endswith(".safetensors"))
                memory.pipe_file(victim, b"")

        with pytest.raises(DestinationError, match="changed after it was sent; nothing was published"):
            shard_checkpoint(demo, "memory://b/out", max_shard_size=LIMIT, progress=meddling)
        assert "/b/out/model.safetensors.index.json" not in memory.find("/b")
