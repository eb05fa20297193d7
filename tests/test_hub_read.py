"""A model on the Hub is read as a folder is: headers alone, any range, or all; or there is an error."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file

from shardkit import (
    Checkpoint,
    Progress,
    compare_loads,
    load_model,
    make_demo_checkpoint,
    measure_load,
    plan_shards,
    shard_checkpoint,
    verify_checkpoint,
)
from shardkit.checkpoint.belonging import needed_files
from shardkit.demo import demo_shape
from shardkit.errors import (
    Cancelled,
    CheckpointError,
    DestinationError,
    DownloadNeededError,
    ShardkitError,
    SpaceError,
    VerificationError,
)
from shardkit.sources import hub as remote
from shardkit.sources import hub_client as access
from shardkit.sources.hub_cache import must_stream, parse_id
from tests.hub_store import Blob
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.support import read_checkpoint, sparse_file
from tests.unasked import run

ID = "org/model"
COUNT = 8
RESOLVE, STORAGE = r"GET hub /org/model/resolve/.*safetensors$", "GET storage"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of earlier Hubs, and the first wait after a failure is short."""
    monkeypatch.setattr(remote, "_OPEN", {})
    monkeypatch.setattr(access, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of eight tensors of 500 kB in one file, with all that a repository has beside it."""
    made = tmp_path / "source"
    made.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(125_000, generator=generator) for i in range(COUNT)}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text('{"architectures": ["Tiny"], "dtype": "float32"}')
    (made / "tokenizer.json").write_text(json.dumps({"vocab": list(range(2000))}))
    (made / "LICENSE").write_text("licence")
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text("{}")
    return made


@pytest.fixture
def sha(hub: LoopbackHub, folder: Path) -> str:
    return hub.add_model(ID, folder)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def in_cache() -> set[str]:
    """Names of the files in the client's cache, by snapshot."""
    snapshots = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    return {str(path.relative_to(s)) for s in snapshots for path in s.rglob("*") if path.is_file()}


def reader(sha: str) -> remote.Repository:
    return remote.reopened(ID, sha)


class TestLooking:
    def test_model_is_opened_as_the_folder_it_was_made_from(
        self, hub: LoopbackHub, folder: Path, sha: str
    ) -> None:
        there, here = Checkpoint.open(ID), Checkpoint.open(folder)
        assert there.source == there.folder == f"hf://{ID}@{sha}"
        size = (hub.store.path(hub.files(ID)[".gitattributes"].sha256)).stat().st_size
        assert there.side_files == {**here.side_files, ".gitattributes": size}
        left = {"source": here.source, "place": here.place, "side_files": here.side_files}
        assert dataclasses.replace(there, **left) == here
        assert (
            plan_shards(there, max_shard_size="1MB").shards == plan_shards(here, max_shard_size="1MB").shards
        )
        assert hub.sent(STORAGE) < 300_000
        assert Checkpoint.from_dict(json.loads(json.dumps(there.to_dict()))) == there

    def test_model_of_7b_costs_two_seconds_and_two_megabytes_at_most(self, hub: LoopbackHub) -> None:
        add_7b(hub)
        start = time.perf_counter()
        opened = Checkpoint.open("mistralai/Mistral-7B-v0.1")
        plan = plan_shards(opened, max_shard_size="2GB")
        seconds = time.perf_counter() - start
        assert (len(opened.tensors), opened.parameters) == (291, 7_241_732_096)
        assert opened.total_bytes == plan.total_bytes == 14_483_464_192
        assert hub.sent() < 2_000_000
        assert seconds < 2

    def test_address_of_its_page_is_a_name_of_a_model(self, sha: str) -> None:
        for page in ("", "/", "/tree/main", f"/tree/{sha}", "/blob/main/model.safetensors", "?library=x#top"):
            for host in ("https://huggingface.co", "hf.co", "http://www.huggingface.co"):
                assert Checkpoint.open(f"{host}/{ID}{page}").source == f"hf://{ID}@{sha}"
        assert str(parse_id("https://huggingface.co/gpt2/tree/main")) == "hf://gpt2@main"
        assert str(parse_id("https://hf.co/gpt2")) == "hf://gpt2@main"
        for other in ("/discussions", "/tree", "/x/y/z"):
            with pytest.raises(CheckpointError, match="not a Hub id"):
                Checkpoint.open(f"https://huggingface.co/{ID}{other}")

    def test_folder_of_the_same_name_comes_first(
        self, hub: LoopbackHub, folder: Path, sha: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copytree(folder, tmp_path / ID)
        assert Checkpoint.open(ID).source == str(tmp_path / ID)
        assert not hub.requests
        assert Checkpoint.open(f"hf://{ID}").source == f"hf://{ID}@{sha}"

    @pytest.mark.parametrize("budget", [None, "2GB"])
    def test_model_is_loaded_from_the_revision_that_was_asked_for(
        self, hub: LoopbackHub, tmp_path: Path, budget: str | None
    ) -> None:
        commits = []
        for seed in (1, 2):
            made = make_demo_checkpoint(tmp_path / str(seed), size="5MB", shards=1, seed=seed)
            commits.append(hub.add_model("org/two", Path(made.folder)))
        loaded = [load_model("org/two", revision=commit, max_memory=budget) for commit in commits]
        for seed, model in enumerate(loaded, 1):
            wanted = load_model(tmp_path / str(seed)).lm_head.weight
            assert model.lm_head.weight.equal(wanted)
        assert not loaded[0].lm_head.weight.equal(loaded[1].lm_head.weight)

    def test_revision_is_pinned_to_the_commit_that_it_is_now(
        self, hub: LoopbackHub, folder: Path, sha: str
    ) -> None:
        before = Checkpoint.open(ID)
        save_file({"other": torch.zeros(3)}, folder / "model.safetensors")
        later = hub.add_model(ID, folder)
        hub.repo(ID).branches["old/branch"] = sha
        for opened in (
            Checkpoint.open(f"{ID}@{sha}"),
            Checkpoint.open(f"hf://{ID}@old/branch"),
            Checkpoint.open(ID, revision="old/branch"),
        ):
            assert opened == before
        assert set(Checkpoint.open(ID).tensors) == {"other"}
        assert Checkpoint.open(ID).source == f"hf://{ID}@{later}"
        assert reader(sha).read_bytes("model.safetensors", 0, 8) != reader(later).read_bytes(
            "model.safetensors", 0, 8
        )
        with pytest.raises(CheckpointError, match="give only one"):
            Checkpoint.open(f"{ID}@{sha}", revision=later)
        for revision in ("", ".", "..", "/etc", "a/../b", "../x", "a//b", "a/"):
            with pytest.raises(CheckpointError, match="is not a revision"):
                Checkpoint.open(ID, revision=revision)

    @pytest.mark.usefixtures("stranger")
    def test_refusal_says_how_to_get_access(
        self, hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add_model("org/gated", folder, gated=True)
        hub.add_model("org/private", folder, private=True)
        hub.add_model(ID, folder)
        login = "hf auth login.*HF_TOKEN"
        for source, said in {
            "org/gated": rf"org/gated@.*gated.*accept its license at {hub.url}/org/gated,.*{login}",
            "org/private": f"org/private@main.*private.*{login}",
            "org/missing": f"org/missing@main.*check the name.*{login}",
            f"{ID}@v9": f"{ID}@v9.*no such revision",
        }.items():
            for token in (None, TOKEN):
                with pytest.raises(CheckpointError, match=said):
                    Checkpoint.open(source, token=token)
        with pytest.raises(CheckpointError, match=f"rejected the token as invalid.*{login}"):
            Checkpoint.open(ID, token="hf_wrong")
        hub.repo("org/gated").granted.add("me")
        assert len(Checkpoint.open("org/gated", token=TOKEN).tensors) == COUNT
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert len(Checkpoint.open("org/gated").tensors) == COUNT

    def test_repository_without_weights_is_told(self, hub: LoopbackHub, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text("{}")
        hub.add_model(ID, tmp_path / "empty")
        with pytest.raises(CheckpointError, match=f"{ID}@.*contains no weights"):
            Checkpoint.open(ID)

    @pytest.mark.parametrize(
        ("raw", "problem"),
        [
            (b"\xff" * 7 + b"\x7f", "a header of"),
            ((10**6).to_bytes(8, "little") + b"{}", "extend to byte 1000008"),
            (b"version https://git-lfs", "Git LFS pointer"),
            ((2).to_bytes(8, "little") + b"{}" + b"x" * 5, "belong to no tensor"),
        ],
    )
    def test_hostile_header_is_refused_as_on_disk(
        self, hub: LoopbackHub, folder: Path, raw: bytes, problem: str
    ) -> None:
        (folder / "model.safetensors").write_bytes(raw)
        hub.add_model(ID, folder)
        with pytest.raises(CheckpointError, match=rf"hf://{ID}@\w+/model.safetensors:? .*{problem}"):
            Checkpoint.open(ID)
        with pytest.raises(CheckpointError, match=problem):
            Checkpoint.open(folder)

    def test_index_that_leaves_the_repository_is_refused(self, hub: LoopbackHub, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        for named in ("../../model.safetensors", "absent.safetensors"):
            index = {"weight_map": {"t0": named}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            hub.add_model(ID, folder)
            with pytest.raises(CheckpointError, match=r"outside the folder|does not exist"):
                Checkpoint.open(ID)

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("../config.json", "outside the repository"),
            ("/config.json", "outside the repository"),
            ("a\nb.txt", r"control character.*: 'a\\nb.txt'"),
            ("a\\b.txt", r"backslash.*: 'a\\\\b.txt'"),
            ("\u202e.safetensors", r"weights with .*: '\\u202e.safetensors'"),
        ],
    )
    def test_file_name_that_cannot_be_is_told(
        self, hub: LoopbackHub, sha: str, name: str, problem: str
    ) -> None:
        add_name(hub, sha, name)
        with pytest.raises(CheckpointError, match=problem):
            Checkpoint.open(ID)

    def test_odd_names_of_what_goes_with_weights_are_as_good_as_in_a_folder(
        self, hub: LoopbackHub, sha: str, tmp_path: Path
    ) -> None:
        odd = {"図\u30001.txt", "a\xa0b.txt", "\u202e.txt"}
        for name in {*odd, ".git", "1_Pooling/.git"}:
            add_name(hub, sha, name)
        for stream in (True, False):
            shard_checkpoint(ID, tmp_path / str(stream), stream=stream)
            assert odd | {"config.json"} <= set(os.listdir(tmp_path / str(stream)))
            assert not [*(tmp_path / str(stream)).rglob(".git")]

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_pickles_are_planned_and_streamed_from_ranged_reads(
        self, zipped: bool, hub: LoopbackHub, folder: Path, tmp_path: Path
    ) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "1_Pooling" / "model.safetensors").write_bytes(b"")
        weights = {f"t{i}": torch.full((30_000,), float(i)) for i in range(50)}
        weights |= {"transposed": torch.randn(700, 800).t(), "tied": weights["t0"]}
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        hub.add_model(ID, folder)
        checkpoint = Checkpoint.open(ID)
        assert checkpoint.aliases == {"tied": "t0"}
        assert plan_shards(checkpoint, max_shard_size=500_000).shards
        asked = [request for request in hub.requests if request.path.endswith("pytorch_model.bin")]
        assert len(asked) <= 4
        assert hub.sent(STORAGE) < 1_500_000
        shard_checkpoint(ID, tmp_path / "out", stream=True, max_shard_size=500_000)
        found = read_checkpoint(tmp_path / "out")
        assert {name: tensor.data for name, tensor in found.items()} == {
            name: tensor.contiguous().numpy().tobytes() for name, tensor in weights.items()
        }
        assert verify_checkpoint(ID, tmp_path / "out").equal

    def test_storage_that_is_not_where_torch_writes_it_is_noticed_before_anything_is_streamed(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path
    ) -> None:
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        torch.save({f"t{i}": torch.full((30_000,), float(i)) for i in range(5)}, path)
        shard_checkpoint(folder, tmp_path / "sound")
        with zipfile.ZipFile(path) as archive:
            header = archive.getinfo("pytorch_model/data/2").header_offset
        raw = bytearray(path.read_bytes())
        raw[header + 28] ^= 4  # the length of the field that shifts its bytes
        path.write_bytes(raw)
        hub.add_model(ID, folder)
        assert Checkpoint.open(ID).tensors
        with pytest.raises(CheckpointError, match="'t2' is not at byte"):
            shard_checkpoint(ID, tmp_path / "out", stream=True)
        with pytest.raises(CheckpointError, match="'t2' is not at byte"):
            verify_checkpoint(ID, tmp_path / "sound")
        assert not (tmp_path / "out").exists()

    def test_large_tensor_that_is_not_contiguous_is_downloaded_for_sharding(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "1_Pooling" / "model.safetensors").write_bytes(b"")
        weights = {"w": torch.ones(2000, 2500).t()}
        torch.save(weights, folder / "pytorch_model.bin")
        hub.add_model(ID, folder)
        assert Checkpoint.open(ID).tensors.keys() == weights.keys()
        with pytest.raises(DownloadNeededError, match=r"not contiguous.*20 MB.*download=True"):
            shard_checkpoint(ID, tmp_path / "out", stream=True)
        assert hub.sent(STORAGE) < 300_000
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**12, free=1000))
            with pytest.raises(SpaceError, match=r"move the cache \(HF_HOME\)$"):
                shard_checkpoint(ID, tmp_path / "out")
        shard_checkpoint(ID, tmp_path / "out")
        assert set(read_checkpoint(tmp_path / "out")) == set(weights)
        assert verify_checkpoint(folder, tmp_path / "out").equal


def add_name(hub: LoopbackHub, sha: str, name: str) -> None:
    """Put a file of any name into a commit."""
    commit = hub.repo(ID).commits[sha]
    tree = {**commit.tree, name: commit.tree["tokenizer.json"]}
    hub.repo(ID).commits[sha] = commit._replace(tree=tree)


def add_7b(hub: LoopbackHub) -> None:
    """A repository of Mistral-7B's shape; its files are holes behind their headers."""
    tensors = list(demo_shape("14.5GB").tensors())
    repo = hub.store.create("mistralai/Mistral-7B-v0.1")
    tree, weight_map = {}, {}
    for number, part in enumerate((tensors[:150], tensors[150:]), start=1):
        file, key = f"model-{number:05d}-of-00002.safetensors", f"{number:064d}"
        size = sparse_file(hub.store.path(key), dict(part))
        tree[file] = Blob("0" * 40, size, key, lfs=True)
        weight_map |= {name: file for name, _ in part}
    for file, document in {
        "config.json": {"architectures": ["MistralForCausalLM"], "torch_dtype": "bfloat16"},
        "model.safetensors.index.json": {"weight_map": weight_map},
    }.items():
        tree[file] = hub.store.blob(file, hub.store.put(json.dumps(document).encode()))
    sha = repo.branches["main"]
    repo.commits[sha] = repo.commits[sha]._replace(tree=tree)


class TestRanges:
    """Right bytes or an error, whatever happens on the way."""

    def test_any_range_is_that_of_the_file(self, sha: str, folder: Path) -> None:
        data, dice = (folder / "model.safetensors").read_bytes(), random.Random(0)
        for size in (1, 8, 100_000, remote.CHUNK_BYTES, remote.CHUNK_BYTES + 1, 3_000_000):
            offset = dice.randrange(len(data) - size)
            chunks = [bytes(c) for c in reader(sha).read("model.safetensors", offset, size)]
            assert b"".join(chunks) == data[offset : offset + size]
            assert all(len(chunk) == remote.CHUNK_BYTES for chunk in chunks[:-1])

    def test_read_goes_on_from_the_byte_at_which_it_was_cut(
        self, hub: LoopbackHub, sha: str, folder: Path
    ) -> None:
        for at in (3_000_000, 0, 500_000):
            hub.fail("drop", STORAGE, at=at)
        data = reader(sha).read_bytes("model.safetensors", 1000, 3_900_000)
        assert data == (folder / "model.safetensors").read_bytes()[1000:3_901_000]
        asked = [r.range for r in hub.requests if r.host == "storage" and r.range]
        begins = [int(said.removeprefix("bytes=").split("-")[0]) for said in asked]
        assert len(begins) == 4
        assert 1000 == begins[0] < begins[1] == begins[2] <= begins[3]

    def test_retry_after_is_honoured(self, hub: LoopbackHub, sha: str) -> None:
        hub.fail("status", RESOLVE, status=429, headers={"Retry-After": "1"})
        start = time.perf_counter()
        assert len(reader(sha).read_bytes("model.safetensors", 0, 10)) == 10
        assert 1 <= time.perf_counter() - start < 3
        hub.fail("status", RESOLVE, status=429, headers={"Retry-After": "86400"})
        remote._OPEN.clear()
        with pytest.raises(CheckpointError, match=r"429, asking to wait 86400 s"):
            reader(sha).read_bytes("model.safetensors", 0, 10)

    @pytest.mark.parametrize("where", [RESOLVE, STORAGE])
    def test_server_errors_are_borne_for_a_while(self, hub: LoopbackHub, sha: str, where: str) -> None:
        hub.fail("status", where, status=503, times=3)
        assert len(reader(sha).read_bytes("model.safetensors", 0, 10)) == 10
        remote._OPEN.clear()
        hub.fail("status", where, status=500, times=100)
        with pytest.raises(CheckpointError, match=r"model.safetensors: .*500; gave up after 7 attempts"):
            reader(sha).read_bytes("model.safetensors", 0, 10)

    @pytest.mark.parametrize(
        ("kind", "where", "problem"),
        [
            ("etag", RESOLVE, "changed"),
            ("etag", STORAGE, "changed while being read"),
            ("whole", STORAGE, "sent the complete file.*`hf download org/model --revision"),
        ],
    )
    def test_other_content_in_mid_read_is_an_error(
        self, hub: LoopbackHub, sha: str, kind: str, where: str, problem: str
    ) -> None:
        pieces = reader(sha).read("model.safetensors", 0, 3_000_000)
        if where == STORAGE:
            hub.fail("drop", STORAGE, at=1_500_000)
        hub.fail(kind, where)
        with pytest.raises(CheckpointError, match=problem):
            list(pieces)

    def test_file_of_another_size_is_an_error(self, sha: str) -> None:
        repository = reader(sha)
        listed = repository.listing["model.safetensors"]
        grown = dataclasses.replace(listed, size=listed.size + 8)
        other = remote.Repository(ID, sha, None, {"model.safetensors": grown})
        with pytest.raises(
            CheckpointError, match=f"has {listed.size} bytes, but the Hub listed {grown.size}"
        ):
            other.read_bytes("model.safetensors", 0, 100)

    def test_expired_url_is_asked_anew(self, hub: LoopbackHub, sha: str, folder: Path) -> None:
        hub.url_seconds = 0.3
        repository, data = reader(sha), b""
        for offset in range(0, 3_000_000, 1_000_000):
            data += repository.read_bytes("model.safetensors", offset, 1_000_000)
            time.sleep(0.4)
        assert data == (folder / "model.safetensors").read_bytes()[:3_000_000]
        assert [r.status for r in hub.requests if r.host == "storage"] == [206, 403, 206, 403, 206]

    def test_server_that_falls_silent_is_left(
        self, hub: LoopbackHub, sha: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repository = reader(sha)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        hub.fail("slow", STORAGE, seconds=1.0)
        start = time.perf_counter()
        assert len(repository.read_bytes("model.safetensors", 0, 1000)) == 1000
        assert time.perf_counter() - start < 0.9

    def test_hundred_reads_over_a_bad_connection_are_right_or_errors(
        self, hub: LoopbackHub, sha: str, folder: Path
    ) -> None:
        data, dice, refused = (folder / "model.safetensors").read_bytes(), random.Random(1), 0
        repository = reader(sha)
        hub.chaos(dice, 0.3)
        for _ in range(100):
            offset = dice.randrange(len(data) - 1)
            size = dice.randrange(1, len(data) - offset)
            try:
                assert repository.read_bytes("model.safetensors", offset, size) == data[offset:][:size]
            except CheckpointError:
                refused += 1
        assert refused < 100


class TestCache:
    def test_what_was_downloaded_is_used_and_its_weights_are_not_asked_for_again(
        self, hub: LoopbackHub, folder: Path, sha: str
    ) -> None:
        downloaded = Checkpoint.open(ID, download=True)
        assert "checked against its hash" in downloaded.notes[0]
        hub.requests.clear()
        opened = Checkpoint.open(ID)
        assert (opened.source, opened.folder) == (f"hf://{ID}@{sha}", downloaded.folder)
        assert not hub.sent("GET (storage|hub .*/resolve/)")
        assert verify_checkpoint(folder, opened).equal

    def test_offline_the_cache_is_all_there_is(
        self, hub: LoopbackHub, folder: Path, sha: str, offline: Callable[[], None]
    ) -> None:
        Checkpoint.open(ID, download=True)
        hub.add_model("org/partly", folder)
        Checkpoint.open("org/partly")
        offline()
        hub.requests.clear()
        for source in (ID, f"{ID}@{sha}"):
            opened = Checkpoint.open(source)
            assert (len(opened.tensors), opened.source) == (COUNT, f"hf://{ID}@{sha}")
            assert "HF_HUB_OFFLINE" in opened.notes[0]
        partly = hub.repo("org/partly").branches["main"]
        for source in ("org/absent", f"{ID}@v2", "org/partly", f"org/partly@{partly}"):
            with pytest.raises(CheckpointError, match="local cache, and HF_HUB_OFFLINE is set"):
                Checkpoint.open(source)
        assert not hub.requests

    def test_cache_is_used_when_the_hub_cannot_be_reached(
        self, sha: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Checkpoint.open(ID, download=True)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        opened = Checkpoint.open(ID)
        assert (len(opened.tensors), opened.source) == (COUNT, f"hf://{ID}@{sha}")
        assert "could not be reached" in opened.notes[0]
        with pytest.raises(CheckpointError, match=r"'org/absent' is not a local folder.*no connection"):
            Checkpoint.open("org/absent")

    def test_cache_that_cannot_note_a_revision_is_used(
        self, hub: LoopbackHub, sha: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.repo(ID).branches |= {"v1": sha, "v1/x": sha}
        folder = Checkpoint.open(f"{ID}@v1", download=True).folder
        assert Checkpoint.open(f"{ID}@v1/x", download=True).folder == folder
        monkeypatch.setattr(Path, "write_text", None)
        assert Checkpoint.open(f"{ID}@v1", download=True).folder == folder

    @pytest.mark.usefixtures("sha")
    def test_cache_of_an_earlier_commit_is_not_taken_for_the_latest(
        self, hub: LoopbackHub, folder: Path
    ) -> None:
        Checkpoint.open(ID, download=True)
        save_file({"other": torch.zeros(3)}, folder / "model.safetensors")
        hub.add_model(ID, folder)
        assert set(Checkpoint.open(ID).tensors) == {"other"}


class TestDownload:
    def test_only_one_format_and_what_goes_with_it_is_downloaded(
        self, hub: LoopbackHub, folder: Path
    ) -> None:
        belongs = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        (folder / "onnx").mkdir()
        others = ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "x.gguf")
        for name in (*others, "model.fp16.safetensors"):
            (folder / name).write_bytes(os.urandom(50_000))
        (folder / "weights [old]*.json").write_text("{}")
        hub.add_model(ID, folder)
        opened = Checkpoint.open(ID, download=True)
        assert in_cache() == belongs | {".gitattributes", "weights [old]*.json"}
        assert verify_checkpoint(folder, opened).equal
        weights = (folder / "model.safetensors").stat().st_size
        assert weights <= hub.sent(STORAGE) < weights + 150_000  # and its header, when it was looked at

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    @pytest.mark.usefixtures("sha")
    def test_content_that_is_not_what_the_hub_lists_is_refused_and_removed(
        self, hub: LoopbackHub, name: str, folder: Path, tmp_path: Path
    ) -> None:
        kept = hub.store.path(hub.files(ID)[name].sha256)
        right = kept.read_bytes()
        kept.unlink()  # a link to the source's file
        kept.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name}: the download does not match its hash on the Hub"):
            shard_checkpoint(ID, tmp_path / "out", stream=False)
        assert name not in in_cache()
        kept.write_bytes(right)
        assert shard_checkpoint(ID, tmp_path / "out", stream=False).notes[0].startswith("downloaded")
        assert verify_checkpoint(folder, tmp_path / "out").equal

    def test_nothing_unchecked_is_used_later(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard_checkpoint(folder, tmp_path / "shards", max_shard_size="1MB")
        commit = hub.add_model("org/shards", tmp_path / "shards")
        right = {}
        for name in Checkpoint.open(tmp_path / "shards").files:
            kept = hub.store.path(hub.files("org/shards")[name].sha256)
            right[kept] = kept.read_bytes()
            kept.unlink()  # a link to the source's file
            kept.write_bytes(right[kept][:-1] + bytes([right[kept][-1] ^ 1]))
        again = partial(Checkpoint.open, f"org/shards@{commit}", download=True)
        with monkeypatch.context() as patched:
            patched.setattr("shardkit.sources.hub_cache.snapshot_download", downloaded_then_stopped)
            with pytest.raises(KeyboardInterrupt):
                again()
        assert Checkpoint.open("org/shards").place.folder is None
        with monkeypatch.context() as patched:
            patched.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(CheckpointError, match="stopped before all files were checked"):
                again()
        for kept, data in right.items():
            kept.write_bytes(data)
        with pytest.raises(
            CheckpointError, match=f"@{commit}/model-00001.*, .*and 4 more: the download does not match"
        ):
            again()
        assert not any(name.endswith(".safetensors") for name in in_cache())
        assert "each checked" in again().notes[0]
        assert Checkpoint.open("org/shards").place.folder is not None
        assert verify_checkpoint(folder, again()).equal

    @pytest.mark.usefixtures("sha")
    def test_disk_that_is_too_small_is_told_before_the_download(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**12, free=1_000_000)
        )
        with pytest.raises(SpaceError, match=r"4,\d{3},\d{3} bytes .*1,000,000 .*stream=True"):
            Checkpoint.open(ID, download=True)
        assert "model.safetensors" not in in_cache()

    @pytest.mark.usefixtures("sha")
    def test_taken_destination_is_told_before_the_download(self, folder: Path) -> None:
        with pytest.raises(DestinationError, match="already exists"):
            shard_checkpoint(ID, folder, stream=False)
        assert "model.safetensors" not in in_cache()

    def test_load_of_an_id_is_measured_from_disk(self, hub: LoopbackHub, tmp_path: Path) -> None:
        make_demo_checkpoint(tmp_path / "demo", size="5MB")
        hub.add_model("org/demo", tmp_path / "demo")
        compared = compare_loads("org/demo", tmp_path / "demo", repeats=1, python="/bin/false")
        assert compared.variants[0].source.startswith("hf://org/demo@")
        assert {"config.json", *Checkpoint.open(tmp_path / "demo").files} <= in_cache()
        hub.requests.clear()
        measured = measure_load("org/demo", generate=0)
        assert measured.ok, measured.reason
        assert str(constants.HF_HUB_CACHE) in measured.source
        assert not hub.sent("GET (storage|hub .*/resolve/)")


class TestStreaming:
    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("strategy", ["size", "layer", "balanced"])
    def test_shards_equal_the_source_which_never_lies_here(
        self, hub: LoopbackHub, folder: Path, sha: str, tmp_path: Path, dtype: str | None, strategy: str
    ) -> None:
        out = tmp_path / "out"
        options = {"max_shard_size": "1.2MB", "dtype": dtype, "strategy": strategy}
        report = shard_checkpoint(ID, out, stream=True, **options)
        local = shard_checkpoint(folder, tmp_path / "local", **options)
        assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == {
            p.name: p.read_bytes() for p in (tmp_path / "local").glob("*.safetensors")
        }
        assert report.verification is not None
        assert local.verification is not None
        assert report.verification.received
        assert report.verification.digests == local.verification.digests
        assert (report.lost, report.files, report.source) == (local.lost, local.files, f"hf://{ID}@{sha}")
        assert "model.safetensors" not in in_cache()
        beside = {".gitattributes", "LICENSE", "tokenizer.json", "1_Pooling/config.json"}
        assert all((out / name).read_bytes() == hub.read(ID, name) for name in beside)
        weights = (folder / "model.safetensors").stat().st_size
        assert hub.sent(STORAGE) < weights + 200_000  # every byte once
        assert verify_checkpoint(ID, out).equal
        assert verify_checkpoint(folder, out).equal

    @pytest.mark.usefixtures("sha")
    def test_hub_that_holds_something_else_is_found_out_by_reading_it_again(self, tmp_path: Path) -> None:
        shard_checkpoint(ID, tmp_path / "out", max_shard_size="1.1MB", stream=True)
        shard = tmp_path / "out" / "model-00003-of-00004.safetensors"  # of t4 and t5
        flip(shard, shard.stat().st_size - 5)
        found = verify_checkpoint(ID, tmp_path / "out")
        assert [mismatch.tensor for mismatch in found.mismatches] == ["t5"]

    @pytest.mark.usefixtures("sha")
    def test_bytes_lost_on_the_way_to_the_disk_are_found(self, tmp_path: Path) -> None:
        staging = tmp_path / ".out.shardkit-staging"

        def damage(progress: Progress) -> None:
            if progress.stage == "verify" and not progress.done_bytes:
                flip(staging / "model-00002-of-00004.safetensors", 700_000)

        with pytest.raises(VerificationError, match=r"2 tensors differ .t2, t3"):
            shard_checkpoint(ID, tmp_path / "out", max_shard_size="1.1MB", stream=True, progress=damage)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("damage", [None, "byte", "journal"])
    @pytest.mark.usefixtures("sha")
    def test_killed_run_goes_on_and_trusts_only_what_was_received(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path, damage: str | None
    ) -> None:
        out, staging = tmp_path / "out", tmp_path / ".out.shardkit-staging"
        kill = "lambda p: os.kill(os.getpid(), 9) if p.done_bytes > 2_100_000 else None"
        code = (
            "import os, shardkit; from shardkit.shard import tasks; tasks.TASK_BYTES = 100_000;"
            f"shardkit.shard_checkpoint({ID!r}, {str(out)!r}, max_shard_size='600KB', "
            f"stream=True, workers=4, progress={kill})"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
        assert not out.exists()
        journal = staging.with_name(staging.name.replace("-staging", "-journal"))
        finished = [json.loads(line)["shard"] for line in journal.read_text().splitlines()[1:]]
        assert len(finished) >= 3  # of four that were received: one after the other
        if damage == "byte":
            flip(staging / finished[0], 300_000)
        if damage == "journal":  # a shard of which one part is not accounted for
            lines = [json.loads(line) for line in journal.read_text().splitlines()]
            lines[1]["received"] = []
            journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        again = partial(shard_checkpoint, ID, out, max_shard_size="600KB", stream=True)
        with pytest.raises(Cancelled, match="check"):
            again(progress=lambda progress: progress.stage != "check")
        before = hub.sent(STORAGE)
        report = again()
        assert sorted(report.reused) == sorted(finished if damage is None else finished[1:])
        anew = COUNT - len(report.reused)
        assert hub.sent(STORAGE) - before < anew * 500_000 + 200_000
        assert verify_checkpoint(folder, out).equal

    @pytest.mark.usefixtures("sha")
    def test_hub_that_fails_for_good_discards_nothing_of_what_was_received(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path
    ) -> None:
        options = {"max_shard_size": "600KB", "stream": True, "workers": 2}

        def fail(progress: Progress) -> None:
            if progress.done_bytes >= 0.75 * progress.total_bytes:
                hub.fail("status", ".*", status=503, times=1000)

        with pytest.raises(access.UnreachableError, match="status 503") as caught:
            shard_checkpoint(ID, tmp_path / "out", progress=fail, **options)
        assert "finished shards kept" in caught.value.__notes__[0]
        hub.heal()
        before = hub.sent(STORAGE)
        report = shard_checkpoint(ID, tmp_path / "out", **options)
        assert len(report.reused) >= COUNT * 3 // 4
        assert hub.sent(STORAGE) - before < (COUNT - len(report.reused)) * 500_000 + 200_000
        assert verify_checkpoint(folder, tmp_path / "out").equal

    @pytest.mark.usefixtures("sha")
    def test_disk_decides_where_nobody_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        free = {"bytes": 6_000_000}
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**12, free=free["bytes"])
        )
        shard_checkpoint(ID, tmp_path / "small")
        assert "model.safetensors" not in in_cache()
        free["bytes"] = 20_000_000
        shard_checkpoint(ID, tmp_path / "large")
        assert "model.safetensors" in in_cache()
        assert verify_checkpoint(tmp_path / "small", tmp_path / "large").equal

    @pytest.mark.usefixtures("sha")
    def test_disk_of_a_destination_in_the_home_folder_is_compared(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "home" / "disk").mkdir(parents=True)
        asked: list[str] = []
        real = os.stat

        def stat(path: Any, **options: Any) -> os.stat_result:
            asked.append(str(path))
            return real(path, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", stat)
            must_stream(Checkpoint.open(ID).place, needed_files, 1000, "~/disk/out")
        assert str(tmp_path / "home" / "disk") in asked

    @pytest.mark.usefixtures("sha")
    def test_twenty_runs_over_a_bad_connection_are_equal_or_errors(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path
    ) -> None:
        hub.chaos(random.Random(2), 0.15)
        done = 0
        for _ in range(20):
            out = tmp_path / "out"
            try:
                shard_checkpoint(ID, out, max_shard_size="1MB", stream=True)
            except ShardkitError:
                assert not out.exists()
                continue
            done += 1
            assert verify_checkpoint(folder, out).equal
            shutil.rmtree(out)
        assert done >= 5

    def test_processes_that_know_nothing_of_the_repository_can_stream_it(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path
    ) -> None:
        hub.add_model("me/private", folder, private=True)
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawned) as executor:
            shard_checkpoint("me/private", tmp_path / "out", stream=True, executor=executor)
        assert verify_checkpoint(folder, tmp_path / "out").equal

    def test_memory_does_not_grow_with_the_model(self, hub: LoopbackHub, tmp_path: Path) -> None:
        source = tmp_path / "large"
        source.mkdir()
        save_file({"one": torch.zeros(100_000_000, dtype=torch.bfloat16)}, source / "model.safetensors")
        hub.add_model("org/large", source)
        code = (
            "import resource, shardkit, sys; from shardkit import Checkpoint;"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "Checkpoint.open('org/large'); before = peak();"
            "shardkit.shard_checkpoint('org/large', sys.argv[1], stream=True, dtype='float16');"
            "print(peak() - before)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")], check=True, capture_output=True, text=True
        )
        assert int(ran.stdout) < 100_000  # of 200,000 KiB that the model has
        assert verify_checkpoint(source, tmp_path / "out").equal


def downloaded_then_stopped(*arguments: Any, **options: Any) -> None:
    snapshot_download(*arguments, **options)
    raise KeyboardInterrupt


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


class TestTokens:
    @pytest.fixture
    def kaggle(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
        """A Kaggle notebook with a secret."""
        secrets = types.SimpleNamespace(value="hf_kaggle")

        class UserSecretsClient:
            def get_secret(self, name: str) -> str:
                if name != "HF_TOKEN" or secrets.value is None:
                    raise RuntimeError("No user secrets exist for kernel id 1 and label HF_TOKEN.")
                return secrets.value

        module = types.ModuleType("kaggle_secrets")
        module.UserSecretsClient = UserSecretsClient  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
        return secrets

    @pytest.mark.usefixtures("stranger")
    def test_token_is_found_where_its_owner_has_put_it(
        self, kaggle: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert access.find_token() == "hf_kaggle"
        store = Path(constants.HF_TOKEN_PATH)
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text("hf_store\n")
        assert access.find_token() == "hf_store"
        monkeypatch.setenv("HF_TOKEN", "hf_environment")
        assert access.find_token() == "hf_environment"
        assert access.find_token("hf_argument") == "hf_argument"
        monkeypatch.delenv("HF_TOKEN")
        store.unlink()
        kaggle.value = None
        assert access.find_token() is None
        kaggle.value = "hf_kaggle"
        monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
        assert access.find_token() is None

    @pytest.mark.parametrize("bad", ["hf_planted\nHere", "hf_planted Here", "hf_plantedHére"])
    @pytest.mark.usefixtures("sha")
    def test_token_that_cannot_be_sent_is_not_quoted(self, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", bad.replace("\n", " "))
        for given in (bad, None):
            with pytest.raises(CheckpointError, match="copy it again") as caught:
                Checkpoint.open(ID, token=given)
            assert "planted" not in "".join(traceback.format_exception(caught.value))
        assert len(Checkpoint.open(ID, token=f" {TOKEN}\n").tensors) == COUNT

    @pytest.mark.usefixtures("sha")
    def test_token_goes_to_the_hub_and_to_nobody_else(self, hub: LoopbackHub, tmp_path: Path) -> None:
        shard_checkpoint(ID, tmp_path / "out", stream=True)
        assert {r.token for r in hub.requests if r.host == "storage"} == {None}
        assert TOKEN in {r.token for r in hub.requests if r.host == "hub"}
        assert TOKEN not in f"{remote._OPEN!r} {remote._OPEN}"

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.usefixtures("sha")
    def test_refusal_by_the_storage_shows_no_signed_url(
        self, hub: LoopbackHub, tmp_path: Path, stream: bool
    ) -> None:
        Checkpoint.open(ID)
        hub.fail("status", STORAGE, status=400, times=100, skip=1)  # after the header
        with pytest.raises(CheckpointError, match="status 400") as caught:
            shard_checkpoint(ID, tmp_path / "out", stream=stream)
        assert "Signature=" not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("place", ["environment", "store", "argument"])
    @pytest.mark.usefixtures("stranger")
    def test_token_is_written_nowhere(
        self, hub: LoopbackHub, folder: Path, tmp_path: Path, place: str
    ) -> None:
        token, home = "hf_plantedHereToBeFoundNowhere", tmp_path / "hub-home"
        hub.users[token] = "org"
        hub.add_model("org/own", folder, private=True)
        hub.add_model("other/gated", folder, gated=True)
        environment = os.environ | ({"HF_TOKEN": token} if place == "environment" else {})
        if place == "store":
            home.mkdir(exist_ok=True)
            (home / "token").write_text(token)
        given = "token=sys.stdin.readline().strip() or None"
        code = f"""
import json, os, sys, traceback, shardkit
from shardkit.sources import hub as remote
given = dict({given})
opened = shardkit.Checkpoint.open("org/own", **given)
print(opened, repr(opened), json.dumps(opened.to_dict()), vars(opened), remote._OPEN)
work = sys.argv[1]
def watch(progress):
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            print(open(f"/proc/{{name}}/cmdline").read())
        except OSError:
            pass
    return progress.done_bytes < 3_000_000 or progress.stage != "copy"
for source in "org/own", "org/own", "org/download", "org/wrong", "other/gated", "org/missing":
    out, more = work + "/whole", {{}}
    if not os.path.exists(work + "/.cut.shardkit-staging"):
        out, more = work + "/cut", {{"progress": watch}}
    try:
        report = shardkit.shard_checkpoint(
            source, out, overwrite=True, max_shard_size="1MB", workers=1, stream=source != "org/download",
            verify={place == "argument"},
            **given, **more)
        print(report, repr(report), json.dumps(report.to_dict()))
    except shardkit.errors.ShardkitError:
        traceback.print_exc()
"""
        for number, name in enumerate(("org/wrong", "org/download")):
            save_file({"other": torch.full((1000,), float(number))}, folder / "model.safetensors")
            hub.add_model(name, folder, private=True)
        wrong, download = (
            f"GET storage /objects/{hub.files(name)['model.safetensors'].sha256}"
            for name in ("org/wrong", "org/download")
        )
        hub.fail("whole", wrong, times=100)
        hub.fail("drop", download, at=10, skip=1)  # the client logs that it tries again, and where
        hub.fail("drop", STORAGE, at=200_000, times=2, skip=2)
        work = tmp_path / "work"
        work.mkdir()
        ran = subprocess.run(
            [sys.executable, "-c", code, str(work)],
            input=f"{token if place == 'argument' else ''}\n",
            env=environment, cwd=work, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert token in {request.token for request in hub.requests}
        assert "downloaded 5 files" in ran.stdout
        assert "streamed from the Hub" in ran.stdout
        assert all(
            word in ran.stderr
            for word in ("stopped after", "sent the complete file", "gated", "check the name")
        )
        assert (work / ".cut.shardkit-journal").exists()
        said = ran.stdout + ran.stderr
        assert token not in said
        assert "&Signature=" not in said  # of a signed address
        written = [p for folder in (work, home) for p in folder.rglob("*") if p.is_file()]
        found = [p for p in written if token.encode() in p.read_bytes()]
        assert found == ([home / "token"] if place == "store" else [])


@pytest.mark.usefixtures("hub")
def test_command_line_takes_an_id_for_a_source(sha: str, tmp_path: Path) -> None:
    inspected = run("inspect", ID, "--json")
    assert json.loads(inspected.stdout)["source"] == f"hf://{ID}@{sha}"
    assert run("plan", f"{ID}@main", "--max-shard-size", "1MB").returncode == 0
    streamed = run("shard", ID, tmp_path / "out", "--max-shard-size", "1MB", "--stream", "--json")
    assert (streamed.returncode, streamed.stderr) == (0, "")
    assert "model.safetensors" not in in_cache()
    assert run("verify", ID, tmp_path / "out").returncode == 0
    assert json.loads(run("shard", ID, "HF://me/out", "--json").stdout)["destination"].startswith("hf://me/")
    downloaded = run("shard", ID, tmp_path / "other", "--max-shard-size", "1MB", "--download", "--json")
    assert (downloaded.returncode, downloaded.stderr) == (0, "")
    assert json.loads(downloaded.stdout)["notes"][0].startswith("downloaded")
    missing = run("inspect", "org/missing")
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (1, "", 1)
