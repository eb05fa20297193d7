"""A destination is absent or whole; what is in it is what every reader finds in the source."""

import errno
import io
import itertools
import json
import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardkit import Checkpoint, Progress, plan_shards, shard_checkpoint, verify_checkpoint
from shardkit.base import jobs as run
from shardkit.base import machine, pages
from shardkit.base.sizes import format_size
from shardkit.demo import make_demo_checkpoint
from shardkit.errors import (
    Cancelled,
    CastError,
    CheckpointError,
    DestinationError,
    ShardkitError,
    SpaceError,
    VerificationError,
)
from shardkit.shard import copy as transfer
from shardkit.shard import destination, digests, folder_store, opening, side_files, tasks, verify
from shardkit.shard import engine as write
from shardkit.shard.report import ShardReport
from shardkit.shard.tasks import Outcome, Task
from shardkit.sources import local
from shardkit.sources.hub_client import UnreachableError
from tests.support import (
    FreshFolder,
    Tensor,
    Tensors,
    bits,
    checkpoints,
    data_offsets,
    limits,
    read_checkpoint,
    read_file,
    sparse_file,
    union,
    weight_files,
    write_checkpoint,
)
from tests.torture.bench import Skip, mounted

LIMIT = 2000
COUNT = 6


def source_of(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of `COUNT` tensors, each of which fills a shard of `LIMIT` bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    elements = 1600 // dtype.itemsize
    tensors = {f"t{i}": torch.randn(elements, generator=generator).to(dtype) for i in range(COUNT)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["Tiny"], "dtype": "float32"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def shard(source: Path, out: Path, **options: object) -> ShardReport:
    return shard_checkpoint(source, out, **{"max_shard_size": LIMIT, "workers": 1} | options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(folder: Path) -> set[str]:
    """What lies beside the source and the destination: locks, staging folders."""
    return {path.name for path in folder.parent.iterdir()} - {"source", "out"}


@settings(max_examples=70)
@given(files=checkpoints(), data=st.data(), strategy=st.sampled_from(["size", "layer", "balanced"]))
def test_union_of_the_shards_is_the_source_for_every_reader(
    files: list[Tensors], data: st.DataObject, strategy: str, fresh_folder: FreshFolder
) -> None:
    made = union(files)
    limit = data.draw(limits(made))
    with fresh_folder() as folder:
        source = write_checkpoint(folder / "source", files)
        report = shard(source, folder / "out", max_shard_size=limit, strategy=strategy, workers=2)
        assert read_checkpoint(folder / "out") == made
        weights = weight_files(folder / "out")
        assert {path.name: path.stat().st_size for path in weights} == report.files
        for path in weights:
            offsets = data_offsets(path)
            assert path.stat().st_size <= limit or len(offsets) == 1
            assert all(offset % max(1, bits(made[name].dtype) // 8) == 0 for name, offset in offsets.items())
        assert {path.name for path in folder.iterdir()} == {"source", "out"}
        index = {"model.safetensors.index.json"} if len(weights) > 1 else set()
        assert {path.name for path in (folder / "out").iterdir()} == {*report.files, *index}
        assert read_checkpoint_of_source(source, files) == made  # as it was


def read_checkpoint_of_source(source: Path, files: list[Tensors]) -> Tensors:
    shards = [path for path in sorted(source.iterdir()) if path.suffix == ".safetensors"]
    assert len(shards) == len(files)
    return union([read_file(path) for path in shards])


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]),
    limit=st.integers(500, 3000),
)
def test_merged_shards_are_the_file_that_safetensors_itself_writes(
    sizes: list[int], dtype: torch.dtype, limit: int, fresh_folder: FreshFolder
) -> None:
    tensors = {f"layers.{i}.größe": torch.arange(size).to(dtype) for i, size in enumerate(sizes)}
    with fresh_folder() as folder:
        (folder / "source").mkdir()
        save_file(tensors, folder / "source" / "model.safetensors", metadata={"format": "pt"})
        shard(folder / "source", folder / "sharded", max_shard_size=limit)
        shard(folder / "sharded", folder / "merged", max_shard_size="1GB")
        assert list(contents(folder / "merged")) == ["model.safetensors"]
        assert contents(folder / "merged") == contents(folder / "source")


def test_metadata_of_the_source_is_kept_in_every_file(source: Path, out: Path) -> None:
    metadata = {"format": "pt", "trained_on": 'größe "quoted"'}
    save_file({"a": torch.ones(400), "b": torch.ones(400)}, source / "model.safetensors", metadata=metadata)
    report = shard(source, out)
    assert len(report.files) == 2
    for file, size in report.files.items():
        with safetensors.safe_open(out / file, framework="pt") as reader:
            assert reader.metadata() == metadata
        assert (out / file).stat().st_size == size <= LIMIT


def test_plan_knew_how_much_disk_the_destination_takes(source: Path, out: Path) -> None:
    plan = plan_shards(Checkpoint.open(source), max_shard_size=LIMIT)
    shard(source, out)
    assert plan.disk_bytes == sum(len(content) for content in contents(out).values())


def test_all_that_is_not_weights_comes_along_unchanged(source: Path, out: Path) -> None:
    (source / "README.md").write_text("card")
    (source / "tf_model.h5").write_bytes(b"other")
    report = shard(source, out)
    assert (out / "README.md").read_text() == "card"
    assert (out / "1_Pooling" / "config.json").read_text() == "{}"
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (out / "tf_model.h5").exists()
    assert set(report.side_files) == {"README.md", "config.json", os.path.join("1_Pooling", "config.json")}
    assert report.left_out == {"tf_model.h5": "weights for other runtimes"}
    assert "tf_model.h5" in str(report)


def test_cast_is_followed_by_every_dtype_of_the_config(source: Path, out: Path) -> None:
    config = {"architectures": ["T"], "dtype": "float32", "vision_config": {"torch_dtype": "float32", "n": 1}}
    (source / "config.json").write_text(json.dumps(config))
    shard(source, out, dtype="bfloat16")
    expected = {
        "architectures": ["T"],
        "dtype": "bfloat16",
        "vision_config": {"torch_dtype": "bfloat16", "n": 1},
    }
    assert json.loads((out / "config.json").read_text()) == expected


def test_cast_adds_a_dtype_to_the_config_of_a_model_that_names_none(source: Path, out: Path) -> None:
    (source / "config.json").write_text('{"architectures": ["Größe"]}')
    shard(source, out, dtype="float16")
    assert json.loads((out / "config.json").read_text()) == {"architectures": ["Größe"], "dtype": "float16"}


def test_name_of_a_weights_file_leaves_the_config_with_the_file(source: Path, out: Path) -> None:
    (source / "model.safetensors").rename(source / "special.safetensors")
    (source / "config.json").write_text('{"transformers_weights": "special.safetensors", "n": 1}')
    shard(source, out)
    assert json.loads((out / "config.json").read_text()) == {"n": 1}


def test_config_of_an_adapter_stays_its_own_beside_a_model_config(source: Path, out: Path) -> None:
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    shard(source, out, dtype="float16")
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


def test_destination_has_the_rights_that_the_umask_gives(source: Path, out: Path) -> None:
    old = os.umask(0o027)
    try:
        shard(source, out)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


def test_paths_with_spaces_and_umlauts_are_as_good_as_any(tmp_path: Path) -> None:
    source = source_of(tmp_path / "мо дель" / "größe 'n' \"more\"")
    shard(source, tmp_path / "ein neues" / "ziel 層")
    assert verify_checkpoint(source, tmp_path / "ein neues" / "ziel 層").equal


def test_relative_destination_is_as_good_as_an_absolute_one(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    assert shard(Path("source"), Path("out")).destination == str(out)
    assert verify_checkpoint(source, out).equal


def test_empty_folder_is_a_destination(source: Path, out: Path) -> None:
    out.mkdir()
    shard(source, out)
    assert verify_checkpoint(source, out).equal


def test_link_to_an_empty_folder_is_a_destination(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to("elsewhere")
    shard(source, out)
    assert out.is_symlink()
    assert verify_checkpoint(source, tmp_path / "elsewhere").equal


# Moving bytes ------------------------------------------------------------------------------------------


def fails_with(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def limited(name: str, calls: int, error: int) -> Callable[..., int]:
    """A system call that copies 100 bytes at a time, and after so many calls says that it cannot."""
    real, left = getattr(os, name), iter(range(calls))
    place = 2 if name == "copy_file_range" else 3  # of the argument that says how many bytes

    def copy(*args: int) -> int:
        if next(left, None) is None:
            raise OSError(error, os.strerror(error))
        return real(*args[:place], min(args[place], 100), *args[place + 1 :])

    return copy


WAYS: dict[str, dict[str, Callable[..., int] | None]] = {
    "another device": {"copy_file_range": fails_with(errno.EXDEV)},
    "not in this kernel": {"copy_file_range": fails_with(errno.ENOSYS)},
    "not on this system": {"copy_file_range": None},
    "copies nothing": {"copy_file_range": lambda *_: 0},
    "no sendfile either": {"copy_file_range": fails_with(errno.EXDEV), "sendfile": fails_with(errno.EINVAL)},
    "neither on this system": {"copy_file_range": None, "sendfile": None},
    "short copies": {"copy_file_range": limited("copy_file_range", 10**6, 0)},
    "gives up half way": {"copy_file_range": limited("copy_file_range", 7, errno.EXDEV)},
    "both give up half way": {
        "copy_file_range": limited("copy_file_range", 7, errno.EOPNOTSUPP),
        "sendfile": limited("sendfile", 9, errno.ENOSYS),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_copy_gives_the_same_bytes(
    way: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(source, out)
    system = vars(os) | WAYS[way]
    system = {name: value for name, value in system.items() if value is not None or name not in WAYS[way]}
    monkeypatch.setattr(transfer, "os", types.SimpleNamespace(**system))
    shard(source, out.with_name("other"), workers=2)
    assert contents(out.with_name("other")) == contents(out)


def test_where_both_files_begin_blocks_copies_begin_there(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.copy_file_range, list[tuple[int, int, int]]()

    def copy(source: int, target: int, nbytes: int, begin: int, at: int) -> int:
        calls.append((begin, at, nbytes))
        return real(source, target, nbytes, begin, at)

    save_file(
        {f"t{n}": torch.full((5000,), n) for n in range(4)}, source / "model.safetensors", {"format": "pt"}
    )
    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(tasks, "TASK_BYTES", 50_000)
    shard(source, out, files=1, workers=1, max_shard_size="2GB")
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    of_tensors = [call for call in calls if call[0]]
    assert sum(nbytes for _, _, nbytes in of_tensors) == 160_000
    assert all(begin == at for begin, at, _ in of_tensors)
    assert all(begin % 4096 == 0 or (begin + nbytes) % 4096 == 0 for begin, _, nbytes in of_tensors)


def test_shard_that_equals_a_file_of_the_source_takes_no_room_where_blocks_are_shared(tmp_path: Path) -> None:
    if not shutil.which("mkfs.btrfs") and not os.environ.get("CI"):
        pytest.skip("no filesystem that shares blocks can be made here")
    kinds = Path("/proc/filesystems")
    if not (kinds.exists() and "btrfs" in kinds.read_text() and Path("/dev/loop-control").exists()):
        pytest.skip("no filesystem that shares blocks can be mounted here")
    with (tmp_path / "image").open("wb") as image:
        image.truncate(512 << 20)
    subprocess.run(["mkfs.btrfs", image.name], check=True, capture_output=True)

    def free() -> int:
        os.sync()
        return shutil.disk_usage(disk).free

    try:
        with mounted(tmp_path / "disk", "-t", "btrfs", "-o", "loop", image.name) as disk:
            make_demo_checkpoint(disk / "model", size="30MB", shards=2)
            before = free()
            assert shard_checkpoint(disk / "model", disk / "out", files=2).verification
            assert before - free() < 1_000_000
            assert contents(disk / "out").keys() == contents(disk / "model").keys()
    except Skip as reason:
        pytest.skip(str(reason))


@settings(max_examples=20)
@given(
    files=checkpoints(max_size=12), chunk=st.integers(33, 99), task=st.integers(55, 300), kernel=st.booleans()
)
def test_cuts_between_chunks_and_tasks_lose_nothing(
    files: list[Tensors], chunk: int, task: int, kernel: bool, fresh_folder: FreshFolder
) -> None:
    with fresh_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "CHUNK_BYTES", chunk)
        patch.setattr(tasks, "TASK_BYTES", task)
        if not kernel:
            patch.setattr(os, "copy_file_range", fails_with(errno.ENOSYS))
            patch.setattr(os, "sendfile", fails_with(errno.ENOSYS))
        shard(write_checkpoint(folder / "source", files), folder / "out", workers=2)
        assert read_checkpoint(folder / "out") == union(files)


def test_side_file_that_links_out_of_the_folder_is_refused(source: Path, out: Path) -> None:
    # A clone of a stranger's repository may hold such a link, and what comes along may be pushed again.
    (source.parent / "old").write_text("key")
    (source / "README.md").symlink_to(source.parent / "old")
    with pytest.raises(CheckpointError, match=r"README\.md.*outside the folder"):
        shard(source, out)
    assert not out.exists()


def test_processes_can_do_the_work(source: Path, out: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        report = shard(source, out, executor=executor, dtype="float16")
        assert executor.submit(os.getpid).result() != os.getpid()  # the pool is the caller's, and still open
    if sys.platform == "linux":  # Python alone takes some 10 MB, in each of the two
        assert report.peak_bytes > shard(source, out.with_name("threads")).peak_bytes + 10**7
    assert report.verification is not None
    assert verify_checkpoint(source, out).cast == COUNT


class Cluster(Executor):
    """An executor of 64 workers elsewhere; each waits with its first task until `expected` are under way."""

    def __init__(self, expected: int, **known: object) -> None:
        self._pool, self._expected, self._lock = ThreadPoolExecutor(64), expected, threading.Lock()
        self._reached, self._running, self.most = threading.Event(), 0, 0
        vars(self).update(known)

    def submit(self, function: Callable[..., object], /, *args: object) -> Future[object]:  # type: ignore[override]
        return self._pool.submit(self._run, function, *args)

    def _run(self, function: Callable[..., object], *args: object) -> object:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        if self._running >= self._expected:
            self._reached.set()
        self._reached.wait(2)
        result = function(*args)
        with self._lock:
            self._running -= 1
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


WIDTHS: dict[str, dict[str, object]] = {
    "pool": {"_max_workers": 64},
    "mpi": {"num_workers": 64},
    "dask": {"_client": types.SimpleNamespace(ncores=lambda: {"tcp://a": 32, "tcp://b": 32})},
    "dask without workers yet": {"_client": types.SimpleNamespace(ncores=dict)},
    "unknown": {},
}


@pytest.mark.parametrize("known", WIDTHS.values(), ids=WIDTHS)
def test_executor_is_used_to_its_full_width(
    known: dict[str, object], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(digests, "_BATCH_TENSORS", 1)
    many = {f"t{i}": Tensor("U8", (100,), bytes([i] * 100)) for i in range(70)}
    source = write_checkpoint(tmp_path / "source", [many])
    with Cluster(64, **known) as copying:
        shard(source, out, executor=copying, workers=None, max_shard_size=250, verify=False)
    assert copying.most == 64
    with Cluster(64, **known) as checking:
        assert verify_checkpoint(source, out, executor=checking).equal
    assert checking.most == 64


def test_workers_bound_how_many_tasks_an_executor_gets(source: Path, out: Path) -> None:
    with Cluster(1, _max_workers=64) as executor:
        shard(source, out, executor=executor, workers=1)
    assert executor.most <= 2  # one is under way, one is waiting for it


def test_failure_in_a_process_is_the_same_clear_error(out: Path, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source")

    def cut(progress: Progress) -> None:
        if not progress.done_bytes:
            os.truncate(source / "model.safetensors", 3000)

    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor,
        pytest.raises(CheckpointError, match="truncated while") as caught,
    ):
        shard(source, out, executor=executor, progress=cut)
    assert caught.value.file == str(source / "model.safetensors")


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_progress_rises_to_its_total_in_every_stage(dtype: str | None, source: Path, out: Path) -> None:
    seen: list[Progress] = []
    shard(source, out, dtype=dtype, progress=seen.append, workers=3)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert stages == ["copy", "verify", "model"]
    for stage in stages:
        done = [progress.done_bytes for progress in seen if progress.stage == stage]
        (total,) = {progress.total_bytes for progress in seen if progress.stage == stage}
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] == total
        assert (total > 0) is (stage != "model")


# What must not be touched ----------------------------------------------------------------------------


def test_existing_folder_is_refused(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationError, match="already exists and is not empty") as caught:
        shard(source, out)
    assert str(out) in str(caught.value)
    assert contents(out) == {"thesis.txt": b"mine"}


def test_overwrite_replaces_nothing_but_checkpoints(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationError, match="is not a checkpoint"):
        shard(source, out, overwrite=True)
    assert contents(out) == {"thesis.txt": b"mine"}


def test_file_in_place_of_the_destination_is_refused(source: Path, out: Path) -> None:
    out.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match="is a file"):
            shard(source, out, overwrite=overwrite)
    assert out.read_text() == "mine"


def test_overwrite_replaces_a_checkpoint_in_one_step(source: Path, out: Path) -> None:
    shard(source_of(out.with_name("old"), seed=1), out, max_shard_size="1GB")
    shard(source, out, overwrite=True)
    assert verify_checkpoint(source, out).equal
    assert not (out / "model.safetensors").exists()  # it would shadow the index
    assert beside(out) == {"old"}


def test_overwrite_works_where_folders_cannot_be_swapped(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(source_of(out.with_name("old"), seed=1), out)
    monkeypatch.setattr(destination.ctypes, "CDLL", lambda *_, **__: object())
    shard(source, out, overwrite=True)
    assert verify_checkpoint(source, out).equal
    assert beside(out) == {"old"}


def test_exchange_cut_short_by_a_kill_is_undone_by_the_next_run(source: Path, out: Path) -> None:
    old = source_of(out.with_name("old"), seed=1)
    shard(old, out)
    out.rename(out.with_name(".out.shardkit-old"))  # where folders cannot be swapped, a kill may leave this
    with pytest.raises(DestinationError, match="already exists"):
        shard(source, out)
    assert verify_checkpoint(old, out).equal
    out.rename(out.with_name(".out.shardkit-old"))
    shard(source, out, overwrite=True)
    assert verify_checkpoint(source, out).equal
    assert beside(out) == {"old"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_destination_meanwhile_is_not_touched(
    overwrite: bool, source: Path, out: Path
) -> None:
    def appear(progress: Progress) -> None:
        if progress.stage == "verify" and not progress.done_bytes:
            out.mkdir()
            (out / "thesis.txt").write_text("mine")

    with pytest.raises(DestinationError) as caught:
        shard(source, out, overwrite=overwrite, progress=appear)
    assert str(out) in str(caught.value)
    assert contents(out) == {"thesis.txt": b"mine"}


def test_refused_call_leaves_what_an_interrupted_run_has_done(source: Path, out: Path) -> None:
    finished = interrupt(source, out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationError):
        shard(source, out)
    shutil.rmtree(out)
    assert sorted(copied(source, out)[0].reused) == finished


OVERLAPS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "same": lambda home: (home / "source", home / "source"),
    "same, written otherwise": lambda home: (home / "source", home / "x" / ".." / "source"),
    "inside the source": lambda home: (home / "source", home / "source" / "out"),
    "source inside": lambda home: (home / "source", home),
    "linked": lambda home: (home / "source", home / "link"),
    "linked source": lambda home: (home / "link", home / "source"),
    "inside through a link": lambda home: (home / "source", home / "link" / "out"),
    "folder of the file": lambda home: (home / "source" / "model.safetensors", home / "source"),
    "the file": lambda home: (home / "source" / "model.safetensors", home / "source" / "model.safetensors"),
    "inside the folder of the file": lambda home: (
        home / "source" / "model.safetensors",
        home / "source" / "out",
    ),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", OVERLAPS)
def test_destination_that_overlaps_the_source_is_refused(
    case: str, overwrite: bool, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "model.safetensors").write_bytes(b"a checkpoint, as far as overwrite can see")
    before = contents(source)
    with pytest.raises(DestinationError) as caught:
        shard(*OVERLAPS[case](tmp_path), overwrite=overwrite)
    assert str(tmp_path) in str(caught.value)
    assert contents(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "link", "model.safetensors"}


def test_destination_that_holds_the_blobs_of_a_linked_source_is_refused(tmp_path: Path) -> None:
    source_of(tmp_path / "out" / "inner")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").symlink_to("../out/inner/model.safetensors")
    with pytest.raises(DestinationError, match="contains the source file"):
        shard(tmp_path / "source", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "inner" / "model.safetensors").exists()


@pytest.mark.parametrize("there", ["hf://me/x", "HF://me/x", Path("hf://me/x")])
def test_destination_on_the_hub_is_made_no_folder_here(
    there: str | Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DestinationError, match="shard_on_hub"):
        shard_checkpoint(source, there)
    assert not destination.leftovers(there)
    assert not Path("hf:").exists()


@pytest.mark.parametrize(
    "name", ["file/out", "x" * 300, "x" * 250], ids=["under a file", "long", "longer staged"]
)
def test_destination_that_cannot_be_made_is_one_clear_error(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError) as caught:
        shard(source, tmp_path / name)
    assert name.split("/")[0] in str(caught.value)


def test_source_is_known_by_another_mount_of_its_folder(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    try:
        with mounted(tmp_path / "again", "-o", "bind", str(source)) as again:
            (tmp_path / "outer").mkdir()
            for target in (again, again / "out"):
                with pytest.raises(DestinationError, match=r"same|inside the source"):
                    shard(source, target, overwrite=True)
    except Skip as reason:
        pytest.skip(str(reason))
    assert contents(source) == before


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_working_folder_and_what_holds_it_are_not_replaced(
    target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")
    with pytest.raises(DestinationError, match="current directory"):
        shard(source, target)
    assert Path.cwd() == tmp_path / "a" / "b" / "c"


def test_old_checkpoint_that_cannot_be_removed_is_a_note_and_no_obstacle(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(source_of(out.with_name("old"), seed=1), out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        report = shard(source, out, overwrite=True)
        assert verify_checkpoint(source, out).equal
        assert "could not be removed" in str(report)
        shutil.move(out, out.with_name("first"))
        shard(source, out)
        with pytest.raises(DestinationError, match=r"\.out\.shardkit-trash"):
            destination.remove_leftovers(out)
    assert destination.remove_leftovers(out) == [out.with_name(".out.shardkit-trash")]
    assert beside(out) == {"old", "first"}
    shard(source_of(out.with_name("new"), seed=2), out, overwrite=True)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_in_place_of_the_staging_folder_is_removed_and_not_followed(
    kind: str, source: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("mine")
    if kind == "file":
        destination.beside(out, "staging").write_text("")
    else:
        destination.beside(out, "staging").symlink_to("victim")
    shard(source, out)
    assert contents(tmp_path / "victim") == {"thesis.txt": b"mine"}
    assert beside(out) == {"victim"}


@pytest.mark.parametrize("workers", [0, -1])
def test_less_than_one_worker_is_refused(workers: int, source: Path, out: Path) -> None:
    with pytest.raises(ShardkitError, match=f"workers is {workers}, but must be at least 1"):
        shard(source, out, workers=workers)
    assert beside(out) == set()


# Failures --------------------------------------------------------------------------------------------

CALLS = ["copy_file_range", "fsync", "truncate", "unlink", "mkdir", "open", "pwrite"]


def run_until_it_works(
    fail: Callable[[pytest.MonkeyPatch, int], None], run: Callable[[], object], check: Callable[[], None]
) -> int:
    """Fail at the first chance, then at the second, and so on; check each time, count the failures."""
    for chance in range(200):
        with pytest.MonkeyPatch.context() as patch:
            fail(patch, chance)
            try:
                run()
            except ShardkitError:
                failed = True
            else:
                failed = False
        check()
        if not failed:
            return chance
    raise AssertionError("it never worked")


def failing_call(name: str, inside: Path) -> Callable[[pytest.MonkeyPatch, int], None]:
    """Let the nth call of a system call fail with EIO, counted from 0 where a path lies in `inside`."""
    real = getattr(os, name)

    def install(patch: pytest.MonkeyPatch, chance: int) -> None:
        left = [chance]
        lock = threading.Lock()

        def call(*args: object, **kwargs: object) -> object:
            paths = [os.fspath(a) for a in args if isinstance(a, (str, os.PathLike))]
            if not paths or any(".shardkit-" in str(path) for path in paths):
                with lock:
                    left[0] -= 1
                    if left[0] == -1:
                        raise OSError(errno.EIO, os.strerror(errno.EIO), str(inside))
            return real(*args, **kwargs)

        patch.setattr(os, name, call)

    return install


@pytest.mark.parametrize(
    ("name", "overwrite"),
    [*itertools.product(CALLS, [False, True]), ("rename", False)],  # a swap is no os.rename
)
def test_destination_is_absent_or_whole_whichever_system_call_fails(
    name: str, overwrite: bool, source: Path, out: Path
) -> None:
    old = source_of(out.with_name("old"), seed=1)
    before = contents(source)
    if overwrite:
        shard(old, out)

    def check() -> None:
        assert contents(source) == before
        if overwrite or out.exists():
            assert verify_checkpoint(source, out).equal or verify_checkpoint(old, out).equal

    def run() -> None:
        if not overwrite and out.exists():  # the failure came after publishing: it is whole, start again
            shutil.rmtree(out)
        shard(source, out, overwrite=overwrite, dtype="float16" if name == "pwrite" else None, resume=False)

    assert run_until_it_works(failing_call(name, out), run, check) > 0
    assert verify_checkpoint(source, out).equal
    destination.remove_leftovers(out)  # of a failure to remove them
    assert beside(out) == {"old"}


STAGES = {
    "reading what an earlier run left": (folder_store, "altered"),
    "copying": (write, "run_task"),
    "syncing": (folder_store, "sync"),
    "writing config and index": (write, "write_side_files"),
    "copying a side file": (side_files, "cut"),
    "verifying": (verify, "compare_tensors"),
    "publishing": (folder_store.FolderStore, "publish"),
}
FAILURES = [
    OSError(errno.EIO, "Input/output error"),
    CheckpointError("damaged"),
    MemoryError(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_destination_is_absent_after_a_failure_at_any_stage(
    stage: str, failure: BaseException, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    before = contents(source)
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        expected = DestinationError if isinstance(failure, OSError) else type(failure)
        with pytest.raises(expected):
            shard(source, out)
    assert not out.exists()
    assert contents(source) == before
    shard(source, out)
    assert verify_checkpoint(source, out).equal
    assert beside(out) == set()


def test_old_destination_survives_when_the_new_one_cannot_take_its_place(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = source_of(out.with_name("old"), seed=1)
    shard(old, out)
    real = os.rename

    def rename(a: os.PathLike[str], b: os.PathLike[str]) -> None:
        if "shardkit-staging" in os.fspath(a) and Path(b) == out:
            raise OSError(errno.EIO, "Input/output error", os.fspath(b))
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(destination.ctypes, "CDLL", lambda *_, **__: object())  # no way to swap in one step
        patch.setattr(os, "rename", rename)
        with pytest.raises(DestinationError):
            shard(source, out, overwrite=True)
    assert verify_checkpoint(old, out).equal


def test_copy_that_does_not_verify_is_not_published(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def rot(from_fd: int, to_fd: int, count: int, from_offset: int, to_offset: int) -> int:
        done = real(from_fd, to_fd, count, from_offset, to_offset)
        if from_offset == data_offsets(source / "model.safetensors")["t3"]:
            os.pwrite(to_fd, bytes([os.pread(from_fd, 1, from_offset)[0] ^ 1]), to_offset)
        return done

    monkeypatch.setattr(os, "copy_file_range", rot)
    with pytest.raises(VerificationError, match=r"1 tensor .*\(t3\)") as caught:
        shard(source, out)
    assert str(out) in str(caught.value)
    assert not out.exists()
    monkeypatch.undo()
    report, nbytes = copied(source, out)
    assert report.reused == tuple(file for file in report.files if "00004" not in file)  # the one with t3
    assert nbytes == 1600


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_source_that_shrinks_meanwhile_is_an_error_not_a_hang(
    dtype: str | None, source: Path, out: Path
) -> None:
    size = (source / "model.safetensors").stat().st_size

    def cut(progress: Progress) -> None:
        if not progress.done_bytes:
            os.truncate(source / "model.safetensors", size - 100)

    with pytest.raises(CheckpointError, match="truncated while") as caught:
        shard(source, out, dtype=dtype, progress=cut)
    assert f"ends at byte {size - 100}, but its data extends to byte {size}" in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_source_that_is_removed_meanwhile_is_named(file: str, source: Path, out: Path) -> None:
    def unlink(progress: Progress) -> None:
        if not progress.done_bytes:
            (source / file).unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match="cannot be read: No such file") as caught:
        shard(source, out, progress=unlink)
    assert caught.value.file == str(source / file)
    assert not out.exists()


STOPS = {
    "cancelled": ("progress=lambda _: False", "Cancelled: stopped after"),
    "interrupted": ("progress=stop", "Interrupted: stopped; nothing was finished, so nothing is kept"),
}


@pytest.mark.parametrize("how", STOPS)
def test_stop_is_one_line_in_a_notebook(how: str, source: Path, out: Path) -> None:
    option, said = STOPS[how]
    code = f"""
from shardkit import shard_checkpoint
def stop(progress):
    raise KeyboardInterrupt
shard_checkpoint({str(source)!r}, {str(out)!r}, {option})
"""
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, "IPYTHONDIR": str(out.parent / "ip")},
    )  # fmt: skip
    assert said in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_source_that_changes_meanwhile_is_not_published(file: str, source: Path, out: Path) -> None:
    def touch(progress: Progress) -> None:
        if progress.stage == "verify" and not progress.done_bytes:
            os.utime(source / file, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while being copied"):
        shard(source, out, progress=touch)
    assert not out.exists()


def staged(out: Path, file: str) -> Path:
    return destination.beside(out, "staging") / file


def flip_unseen(path: Path) -> None:
    """Flip a bit, and put the time of the last change back."""
    before = path.stat()
    time.sleep(0.02)  # so that the time of change of the file's record is another
    flip(path, -1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


LATE: dict[str, Callable[[Path], object]] = {
    "model-00002-of-00006.safetensors": flip_unseen,
    "model.safetensors.index.json": lambda path: os.truncate(path, 100),
    "config.json": lambda path: path.unlink(),
    "1_Pooling/config.json": flip_unseen,
}


@pytest.mark.parametrize("file", LATE)
def test_change_after_the_proof_is_not_published(file: str, source: Path, out: Path) -> None:
    def change(progress: Progress) -> None:
        if progress.stage == "verify" and progress.done_bytes == progress.total_bytes:
            LATE[file](staged(out, file))

    with pytest.raises(CheckpointError, match=rf"{re.escape(file)} changed on disk after it was written"):
        shard(source, out, progress=change)
    assert not out.exists()


def test_file_that_is_not_copied_as_it_is_is_not_published(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = side_files.run_task

    def run(task: Task) -> Outcome:
        outcome = real(task)
        if task.path.endswith(os.path.join("1_Pooling", "config.json")):
            flip(Path(task.path), -1)
        return outcome

    monkeypatch.setattr(side_files, "run_task", run)
    with pytest.raises(VerificationError, match=r"not published: 1_Pooling/config.json not as in the source"):
        shard(source, out)
    assert not out.exists()


def test_shard_that_changes_while_it_waits_for_the_disk_is_not_published(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folder_store.sync

    def late(path: Path) -> None:
        if path.name == "model-00002-of-00006.safetensors":
            time.sleep(0.02)
            flip(path, -1)
        real(path)

    monkeypatch.setattr(folder_store, "sync", late)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00006\.safetensors.*changed on disk"):
        shard(source, out, verify=False)
    assert not out.exists()


def test_source_replaced_after_its_header_was_read_is_not_published(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*args: object, **options: object) -> object:
        made = plan_shards(*args, **options)  # type: ignore[arg-type]
        rewrite_source(source)
        return made

    monkeypatch.setattr(opening, "plan_shards", plan)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while being copied"):
        shard(source, out)
    assert not out.exists()


def test_every_file_is_synced_before_the_folder_is_renamed(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module's file may have the name of a shard.
    (source / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense/"}]')
    (source / "2_Dense").mkdir()
    save_file({"dense": torch.ones(4)}, source / "2_Dense" / "model.safetensors")
    synced: set[Path] = set()
    real = folder_store.sync

    def sync(path: Path) -> None:
        synced.add(path)
        real(path)

    monkeypatch.setattr(folder_store, "sync", sync)
    shard(source, out, max_shard_size="1GB")
    assert (out / "2_Dense" / "model.safetensors").exists()
    assert {path.relative_to(destination.beside(out, "staging")) for path in synced} == {
        path.relative_to(out) for path in (out, *out.rglob("*"))
    }


# What the disk holds ---------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A disk of its own, and the image that it really is."""
    image = tmp_path / "image"
    image.write_bytes(bytes(24 << 20))
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        with mounted(tmp_path / "disk", "-o", "loop", str(image)) as folder:
            (folder / "work").mkdir()  # beside what the disk has for itself
            yield folder / "work", image
    except (OSError, Skip) as reason:
        pytest.skip(str(reason))


def garble(image: Path, data: bytes) -> None:
    """Let a disk hold something else than it was given: the kernel is not told."""
    place = image.read_bytes().find(data)
    assert place > 0
    with image.open("r+b") as file:
        file.seek(place)
        file.write(bytes([data[0] ^ 1]))
        os.fsync(file)


def data_of(source: Path, name: str) -> bytes:
    return read_file(source / "model.safetensors")[name].data


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_disk_that_garbles_what_it_is_given_is_found_out(
    dtype: str | None, source: Path, disk: tuple[Path, Path]
) -> None:
    folder, image = disk
    worn: list[str] = []

    def wear_out(_: Progress) -> None:
        if staged(folder / "out", "1_Pooling/config.json").exists() and not worn:  # all shards are synced
            garble(image, data_of(source, "t3"))
            worn.append("t3")

    with pytest.raises(VerificationError, match=r"1 tensor .*\(t3\)"):
        shard(source, folder / "out", progress=wear_out, dtype=dtype)
    report, _ = copied(source, folder / "out", dtype=dtype)
    assert len(report.reused) == COUNT - 1
    assert report.verification is not None
    assert report.verification.is_from_disk
    assert "read back from the disk" in str(report)


def test_resume_trusts_the_disk_alone(source: Path, disk: tuple[Path, Path]) -> None:
    folder, image = disk
    interrupt(source, folder / "out")
    for path in destination.beside(folder / "out", "staging").iterdir():
        destination.sync(path)
    garble(image, data_of(source, "t1"))
    report, nbytes = copied(source, folder / "out", verify=False)
    assert (len(report.reused), nbytes) == (2, 4 * 1600)


def test_what_stays_in_memory_was_not_proven_and_the_report_says_so(source: Path, tmp_path: Path) -> None:
    try:
        with mounted(tmp_path / "memory", "-t", "tmpfs", "-o", "size=4m", "none") as memory:
            interrupt(source, memory / "out")
            report = shard(source, memory / "out")
    except Skip as reason:
        pytest.skip(str(reason))
    assert report.verification is not None
    assert (report.verification.files, report.verification.files_in_memory) == (COUNT, COUNT)
    assert f"{COUNT} of {COUNT} files in memory: contents on disk not proven" in str(report)
    assert "3 of 3 files in memory: contents on disk not proven" in str(report)  # when they were reused
    assert "from the disk" not in str(report)


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ((os, "posix_fadvise"), f"{COUNT} of {COUNT} files in memory"),
        ((os, "geteuid"), "this system does not show whether files were in memory"),
    ],
)
def test_system_that_cannot_drop_or_show_pages_is_no_obstacle(
    lacking: tuple[object, str], said: str, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(*lacking)
    report = shard(source, out)
    assert said in str(report)
    assert not report.verification.is_from_disk  # type: ignore[union-attr]
    assert ShardReport.from_dict(report.to_dict()) == report


def touch_memory(nbytes: int) -> None:
    """Have memory resident for a moment, so that it is in the kernel's peak of this process."""
    with mmap.mmap(-1, nbytes) as held:
        for page in range(0, len(held), 4096):
            held[page] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_report_has_the_peak_of_its_own_job_alone(source: Path, out: Path) -> None:
    touch_memory(400_000_000)
    report = shard(source, out)
    assert 0 < report.before_bytes <= report.peak_bytes < report.before_bytes + 50_000_000
    peak, before = map(format_size, (report.peak_bytes, report.before_bytes))
    assert re.search(f"memory .* {peak} at most, {before} of it before", str(report))
    assert ShardReport.from_dict(report.to_dict()) == report


def test_peak_that_the_system_does_not_report_is_said_to_be_unknown(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_kernel_counts", {}.get)
    report = shard(source, out)
    assert report.peak_bytes is None
    assert "peak not reported by this system" in str(report)
    # Where a peak of earlier cannot be forgotten, a lower one is not known, and a higher one is.
    counts = {"VmHWM": 900_000_000, "VmRSS": 100_000_000}
    monkeypatch.setattr(machine, "_kernel_counts", counts.get)
    watch = machine.Watch()
    assert watch.peak_bytes is None
    counts["VmHWM"] = 950_000_000
    assert watch.peak_bytes == 950_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_of_jobs_that_run_side_by_side_are_their_own() -> None:
    first = machine.Watch()
    touch_memory(200_000_000)
    second = machine.Watch()
    assert first.peak_bytes > first.before_bytes + 190_000_000
    assert second.before_bytes <= second.peak_bytes < second.before_bytes + 50_000_000


def test_peak_is_no_less_than_what_was_resident_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"VmHWM": 982_646_784, "VmRSS": 982_646_784}
    monkeypatch.setattr(machine, "_kernel_counts", counts.get)
    watch = machine.Watch()
    counts["VmHWM"] -= 4096  # the kernel counts pages in batches
    assert watch.peak_bytes == watch.before_bytes == 982_646_784


def test_kernel_that_calls_all_pages_resident_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    def all_resident(_: object, __: object, flags: Any) -> int:
        flags[:] = [1] * len(flags)
        return 0

    out.write_bytes(bytes(100))
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda *_, **__: types.SimpleNamespace(mincore=all_resident))
    pages._mincore.cache_clear()
    try:
        assert pages.drop([out]) is None
    finally:
        pages._mincore.cache_clear()


def test_verification_alone_leaves_the_cache_as_it_is_and_says_what_was_in_it(
    source: Path, disk: tuple[Path, Path]
) -> None:
    out = disk[0] / "out"
    shard(source, out, max_shard_size="1GB")
    files = [source / "model.safetensors", out / "model.safetensors"]
    for file in files:
        file.read_bytes()
    found = verify_checkpoint(source, out)
    assert (found.files, found.files_in_memory) == (2, 2)
    assert "2 of 2 files in memory: contents on disk not proven" in str(found)
    assert pages.mostly_resident(files) == 2


# Resume ----------------------------------------------------------------------------------------------


def journal(out: Path) -> Path:
    return destination.beside(out, "journal")


def journaled(out: Path) -> list[str]:
    """The shards of an unfinished run that are safely on the disk, in order of their names."""
    whole_line = re.compile(r'^{"shard": "([^"]+)".*}$', re.MULTILINE)
    return sorted(whole_line.findall(journal(out).read_text(encoding="utf-8")))


def interrupt(source: Path, out: Path, shards: int = 3, **options: object) -> list[str]:
    """Stop a run after so many shards, once the disk has them; return what the journal holds."""
    before = len(journaled(out)) if destination.beside(out, "staging").exists() else 0

    def stop(progress: Progress) -> bool:
        if progress.stage != "copy" or progress.done_bytes < shards * 1600:
            return True
        deadline = time.monotonic() + 10
        while len(journaled(out)) < before + shards and time.monotonic() < deadline:
            time.sleep(0.001)
        return False

    with pytest.raises(Cancelled, match="stopped after"):
        shard(source, out, progress=stop, **options)
    assert not out.exists()
    return journaled(out)


def copied(source: Path, out: Path, **options: object) -> tuple[ShardReport, int]:
    """Shard, and say how many source bytes were copied on the way."""
    seen: list[Progress] = []
    report = shard(source, out, progress=seen.append, **options)
    assert verify_checkpoint(source, out).equal
    assert beside(out) <= {"other"}
    return report, max(progress.total_bytes for progress in seen if progress.stage == "copy")


def test_resume_reuses_the_finished_shards_and_says_so(source: Path, out: Path) -> None:
    finished = interrupt(source, out)
    assert len(finished) == 3
    report, nbytes = copied(source, out)
    assert sorted(report.reused) == finished
    assert nbytes == 3 * 1600
    assert "reused" in str(report)
    assert re.search(rf"written +\S+ KB in {COUNT - 3} files", str(report)), str(report)
    assert all(file in str(report) for file in finished)


def test_resume_can_be_interrupted_in_its_turn(source: Path, out: Path) -> None:
    interrupt(source, out, 2)
    interrupt(source, out, 2)
    report, nbytes = copied(source, out)
    assert (len(report.reused), nbytes) == (4, 2 * 1600)


def test_cancel_while_verifying_copies_nothing_again(source: Path, out: Path) -> None:
    with pytest.raises(Cancelled, match="verify"):
        shard(source, out, progress=lambda progress: progress.stage != "verify")
    report, nbytes = copied(source, out)
    assert (len(report.reused), nbytes) == (COUNT, 0)


def test_cancel_before_the_first_byte_leaves_nothing_behind(source: Path, out: Path) -> None:
    with pytest.raises(Cancelled):
        shard(source, out, progress=lambda _: False)
    assert beside(out) == set()
    assert copied(source, out)[0].reused == ()


def test_run_without_resume_starts_anew(source: Path, out: Path) -> None:
    interrupt(source, out)
    report, nbytes = copied(source, out, resume=False)
    assert (report.reused, nbytes) == ((), COUNT * 1600)


def test_values_lost_before_the_interruption_are_still_reported(source: Path, out: Path) -> None:
    save_file({f"t{i}": torch.full((400,), 1e-30) for i in range(COUNT)}, source / "model.safetensors")
    interrupt(source, out, dtype="float16", max_shard_size=1000)
    report = shard(source, out, dtype="float16", max_shard_size=1000)
    assert len(report.reused) == 3
    assert [(loss.tensor, loss.flushed) for loss in report.lost] == [(f"t{i}", 400) for i in range(COUNT)]


def rewrite_source(source: Path) -> None:
    other = source_of(source.with_name("other"), seed=2)
    (other / "model.safetensors").rename(source / "model.safetensors")


def test_changed_weights_start_anew_and_say_so(source: Path, out: Path) -> None:
    interrupt(source, out)
    rewrite_source(source)
    report, _ = copied(source, out)
    assert report.reused == ()
    assert "starting over" in str(report)


def test_changed_config_is_copied_beside_the_shards_that_are_finished(source: Path, out: Path) -> None:
    finished = interrupt(source, out)
    (source / "config.json").write_text('{"architectures": ["Other"]}')
    report, _ = copied(source, out)
    assert sorted(report.reused) == finished
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_nothing_is_said_of_beginning_anew_where_nothing_was_left(source: Path, out: Path) -> None:
    assert "anew" not in str(shard(source, out))


def test_cancel_is_heard_while_a_resume_checks_what_is_there(source: Path, out: Path) -> None:
    finished = interrupt(source, out)
    with pytest.raises(Cancelled, match="check"):
        shard(source, out, progress=lambda progress: progress.stage != "check")
    assert sorted(copied(source, out)[0].reused) == finished


def test_finished_work_survives_a_failure_to_put_it_in_place(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def rename(a: os.PathLike[str], b: os.PathLike[str]) -> None:
        if Path(b) == out:
            raise OSError(errno.EIO, "Input/output error", os.fspath(b))
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(DestinationError, match="Input/output error"):
            shard(source, out)
    report, nbytes = copied(source, out)
    assert (len(report.reused), nbytes) == (COUNT, 0)


ERRORS: list[BaseException] = [
    CheckpointError("damaged"),
    UnreachableError("gave up after 6 tries"),
    CastError("turns finite values infinite"),
    VerificationError("not as in the source"),
    SpaceError("the disk is full"),
    DestinationError("cannot be written"),
    Cancelled("stopped"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ENOSPC, "No space left on device"),
    BrokenProcessPool("a process ended abruptly"),
    KeyboardInterrupt(),
    MemoryError(),
    ZeroDivisionError("a bug"),
]
NAMED = {"ids": lambda error: " ".join(map(str, (type(error).__name__, *error.args[:1])))}


def assert_reused(source: Path, out: Path, shards: int) -> None:
    """The second run finds so many shards, and `shardkit clean` would have found what the first has left."""
    assert not out.exists()
    assert len(destination.leftovers(out)) == 2
    report, nbytes = copied(source, out)
    assert (len(report.reused), nbytes) == (shards, (COUNT - shards) * 1600)


@pytest.mark.parametrize("error", ERRORS, **NAMED)
def test_no_error_of_a_task_discards_what_is_finished(
    error: BaseException, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(task: Task) -> Outcome:
        if Path(task.path).name > "model-00004":
            raise error
        return transfer.run_task(task)

    with monkeypatch.context() as patch:
        patch.setattr(write, "run_task", run)
        with pytest.raises(BaseException) as caught:  # noqa: PT011  which it is, other tests say
            shard(source, out)
    if not isinstance(error, KeyboardInterrupt):
        assert f"3 finished shards kept in {destination.beside(out, 'staging')}" in caught.value.__notes__[-1]
    assert_reused(source, out, 3)


@pytest.mark.parametrize("error", ERRORS, **NAMED)
@pytest.mark.parametrize("stage", ["copy", "verify"])
def test_no_error_of_a_callback_discards_what_is_finished(
    stage: str, error: BaseException, source: Path, out: Path
) -> None:
    def fail(progress: Progress) -> None:
        if progress.stage == stage and progress.done_bytes >= 3 * 1600:
            raise error

    with pytest.raises(BaseException):  # noqa: B017, PT011
        shard(source, out, progress=fail)
    assert_reused(source, out, 3 if stage == "copy" else COUNT)


@pytest.mark.parametrize("error", ERRORS, **NAMED)
@pytest.mark.parametrize("place", [*STAGES, "check"])
def test_no_error_at_any_stage_discards_what_is_finished(
    place: str, error: BaseException, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    interrupt(source, out)
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES.get(place, (verify, "digest_pairs")), fail)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            shard(source, out)
    report, _ = copied(source, out)
    assert len(report.reused) >= 3


def test_stale_source_during_a_cast_discards_nothing(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stale(io.FileIO):
        def readinto(self, _: object) -> int:
            raise OSError(errno.ESTALE, "Stale file handle")

    opened = iter(range(1 + 4))  # for the header, and for tensors

    def on_a_network_disk(path: str, mode: str) -> io.RawIOBase | io.BufferedIOBase:
        return Stale(path) if next(opened, None) is None else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(local, "open", on_a_network_disk, raising=False)
        with pytest.raises(CheckpointError, match="cannot be read: Stale file handle") as caught:
            shard(source, out, dtype="float16", max_shard_size=1000)
    assert caught.value.file == str(source / "model.safetensors")
    report, nbytes = copied(source, out, dtype="float16", max_shard_size=1000)
    assert (len(report.reused), nbytes) == (4, 2 * 1600)


def test_cast_refused_for_an_overflow_is_reused_once_that_is_allowed(source: Path, out: Path) -> None:
    save_file({f"t{i}": torch.full((400,), 1e30) for i in range(COUNT)}, source / "model.safetensors")
    with pytest.raises(CastError):
        shard(source, out, dtype="float16", max_shard_size=1000)
    report, nbytes = copied(source, out, dtype="float16", max_shard_size=1000, allow_overflow=True)
    assert (len(report.reused), nbytes) == (COUNT, 0)


def test_executor_that_breaks_loses_nothing_that_is_finished(source: Path, out: Path) -> None:
    class Breaking(Cluster):
        left = iter(range(4))

        def submit(self, function: Callable[..., object], /, *args: object) -> Future[object]:  # type: ignore[override]
            if next(self.left, None) is None:
                raise BrokenProcessPool("a process ended abruptly")
            return super().submit(function, *args)

    with Breaking(1) as executor, pytest.raises(BrokenProcessPool):
        shard(source, out, executor=executor, workers=1)
    report, _ = copied(source, out)
    assert len(report.reused) == 4  # all that it was given


def test_disk_that_is_full_for_the_next_shard_loses_none_that_is_under_way(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.truncate

    def full(path: Path, size: int) -> None:
        if "00004-of" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", full)
        with pytest.raises(SpaceError):
            shard(source, out)
    assert_reused(source, out, 3)


def test_what_ends_along_with_a_failure_is_not_lost() -> None:
    class AtOnce(Cluster):
        """Carries a task out before it returns: all that were given are done at the same time."""

        def submit(self, function: Callable[..., object], /, *args: object) -> Future[object]:  # type: ignore[override]
            future = super().submit(function, *args)
            future.exception()
            return future

    seen: list[int] = []
    with (
        AtOnce(1) as pool,
        pytest.raises(ZeroDivisionError),
        run.run_all(lambda task: 1 // task, [0, 1, 2], 2, pool) as results,
    ):
        seen.extend(task for task, _ in results)
    assert sorted(seen) == [1, 2]


def test_journal_that_cannot_be_read_forgets_nothing(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = interrupt(source, out)
    real = Path.read_text

    def read(path: Path, *args: Any, **options: Any) -> str:
        if path == journal(out):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read)
        with pytest.raises(DestinationError, match="Input/output error"):
            shard(source, out)
    assert sorted(copied(source, out)[0].reused) == finished


@pytest.mark.parametrize("garbled", [b"\xff\xfe\x00", b"\n", b"}", b'"}\n{"'])
def test_garbled_line_of_the_journal_loses_its_own_shard_alone(
    garbled: bytes, source: Path, out: Path
) -> None:
    interrupt(source, out)
    lines = journal(out).read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:12] + garbled + lines[2][12 + len(garbled) :]
    journal(out).write_bytes(b"".join(lines))
    assert len(copied(source, out)[0].reused) == 2


def test_nothing_but_finished_shards_is_taken_over(source: Path, out: Path) -> None:
    # What a kill leaves between the exchange of two folders and the removal of the old one.
    interrupt(source, out)
    (destination.beside(out, "staging") / "tokenizer.json").write_text("of an older model")
    (destination.beside(out, "staging") / "model.safetensors").write_text("of an older model")
    copied(source, out)
    assert not {"tokenizer.json", "model.safetensors"} & contents(out).keys()


def test_side_file_may_have_any_name(source: Path, out: Path) -> None:
    (source / ".journal.jsonl").write_text("mine")
    interrupt(source, out)
    copied(source, out)
    assert (out / ".journal.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "options", [{"max_shard_size": 4000}, {"max_shard_size": "1GB"}, {"dtype": "float16"}], ids=str
)
def test_changed_plan_starts_anew(options: dict[str, object], source: Path, out: Path) -> None:
    interrupt(source, out)
    assert copied(source, out, **options)[0].reused == ()


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the data": lambda path: flip(path, -1),
    "a bit of the header": lambda path: flip(path, 20),
    "cut short": lambda path: os.truncate(path, 1000),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_staged_shard_is_written_again(damage: str, source: Path, out: Path) -> None:
    damaged, *others = interrupt(source, out)
    DAMAGE[damage](destination.beside(out, "staging") / damaged)
    report, nbytes = copied(source, out)
    assert sorted(report.reused) == others
    assert nbytes == 4 * 1600


def test_damaged_staged_shard_is_written_again_after_a_second_interruption(source: Path, out: Path) -> None:
    damaged, *others = interrupt(source, out)
    DAMAGE["a bit of the data"](destination.beside(out, "staging") / damaged)
    with pytest.raises(Cancelled):
        shard(source, out, progress=lambda _: False)
    report, _ = copied(source, out)
    assert sorted(report.reused) == others


def test_journal_torn_by_a_kill_loses_its_last_line_alone(source: Path, out: Path) -> None:
    interrupt(source, out)
    raw = journal(out).read_bytes()
    journal(out).write_bytes(raw[:-12])
    interrupt(source, out, 1)
    report, _ = copied(source, out)
    assert len(report.reused) == 3  # two from the first run, one from the second


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0",
        b"[]",
        b'{"fingerprint": "of another job"}\n',
        b"\xff\xfe",
        b"{}\n{}\n",
        pytest.param(None, id="absent"),
    ],
)
def test_unreadable_journal_starts_anew(raw: bytes | None, source: Path, out: Path) -> None:
    interrupt(source, out)
    if raw is None:
        journal(out).unlink()
    else:
        journal(out).write_bytes(raw)
    assert copied(source, out)[0].reused == ()


@pytest.mark.parametrize(
    "line",
    [
        '{"shard": "model-00009-of-00009.safetensors", "lost": []}',
        '{"shard": "../source/model.safetensors", "lost": []}',
        '{"shard": "model-00001-of-00006.safetensors"}',
        "{}",
        "3",
    ],
)
def test_journal_line_that_makes_no_sense_is_not_believed(line: str, source: Path, out: Path) -> None:
    interrupt(source, out)
    with journal(out).open("a") as file:
        file.write(line + "\n")
    copied(source, out)


# Space -----------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_found_before_the_first_byte(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(p.stat().st_size for p in [source / "model.safetensors"])
    real = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=needed // 2))
    monkeypatch.setattr(write, "run_task", lambda _: pytest.fail("a byte was copied"))
    with pytest.raises(SpaceError) as caught:
        shard(source, out)
    assert all(word in str(caught.value) for word in (str(out), f"{needed // 2:,}", "free another"))
    assert not out.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_bytes_short_and_resumes_after_space_is_made(
    number: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range
    calls = iter(range(3))

    def copy(*args: int) -> int:
        if next(calls, None) is None:
            raise OSError(number, os.strerror(number))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", copy)
        with pytest.raises(SpaceError, match=r"the disk is full: free another [\d,]+ bytes") as caught:
            shard(source, out)
    assert "run again to resume" in str(caught.value)
    assert not out.exists()
    report, nbytes = copied(source, out)
    assert len(report.reused) <= 3  # those that the disk had when it filled up
    assert nbytes == (COUNT - len(report.reused)) * 1600


def test_making_just_the_bytes_free_that_were_named_is_enough(source: Path, tmp_path: Path) -> None:
    for number in range(40):
        (source / f"{number}.txt").write_text("x")  # a block of the disk each
    try:
        with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "none") as disk:
            filler = (disk / "filler").open("wb")
            os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(disk).free - 100_000)
            with filler, pytest.raises(SpaceError, match="free another") as caught:
                shard(source, disk / "out")
            short = int(re.search(r"free another ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - short)
            shard(source, disk / "out")
    except Skip as reason:
        pytest.skip(str(reason))


# Two runs at once -----------------------------------------------------------------------------------


def test_second_run_on_a_destination_is_refused_while_the_first_goes_on(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(destination, "_LOCK_SECONDS", 0.1)
    started, finish = threading.Event(), threading.Event()
    reports: list[ShardReport] = []

    def wait(_: Progress) -> None:
        started.set()
        assert finish.wait(60)

    first = threading.Thread(target=lambda: reports.append(shard(source, out, progress=wait)))
    first.start()
    try:
        assert started.wait(60)
        with pytest.raises(
            DestinationError, match=f"is being written by another run.*{os.getpid()}"
        ) as caught:
            shard(source, out)
        assert str(out) in str(caught.value)
    finally:
        finish.set()
        first.join()
    assert len(reports) == 1
    assert verify_checkpoint(source, out).equal
    assert beside(out) == set()


NO_FLOCK = """
import errno, fcntl
def missing(*_):
    raise OSError(errno.ENOSYS, "not here")
fcntl.flock = missing
"""


@pytest.mark.parametrize("system", ["", NO_FLOCK], ids=["flock", "no flock"])
def test_lock_of_a_dead_process_is_no_obstacle(system: str, source: Path, out: Path) -> None:
    code = """
import os, sys
from shardkit import shard_checkpoint
journal = os.path.join(os.path.dirname(sys.argv[2]), ".out.shardkit-journal")
def die(progress):
    if progress.done_bytes >= 3200:
        while open(journal).read().count("shard") < 2:
            pass
        os.kill(os.getpid(), 9)
shard_checkpoint(sys.argv[1], sys.argv[2], max_shard_size=2000, workers=1, progress=die)
"""
    killed = subprocess.run([sys.executable, "-c", system + code, source, out], check=False)
    assert killed.returncode == -9
    assert not out.exists()
    assert beside(out) == {".out.shardkit-lock", ".out.shardkit-journal", ".out.shardkit-staging"}
    again = system + code.replace("os.kill(", "print(").replace(
        "shard_checkpoint(sys", "r = shard_checkpoint(sys"
    )
    done = subprocess.run(
        [sys.executable, "-c", again + "print(len(r.reused))", source, out],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == "2"
    assert done.stderr == ""
    assert verify_checkpoint(source, out).equal
    assert beside(out) == set()


def test_interrupt_just_after_the_end_leaves_nothing_for_long(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(new: Path, target: Path, overwrite: bool) -> None:
        destination.put_in_place(new, target, overwrite)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_store, "put_in_place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shard(source, out)
    assert verify_checkpoint(source, out).equal
    assert beside(out) == {".out.shardkit-journal"}
    with pytest.raises(DestinationError, match="already exists"):
        shard(source, out)
    assert verify_checkpoint(source, out).equal
    assert beside(out) == set()


# What it costs --------------------------------------------------------------------------------------

PEAK = """
import sys
from shardkit import shard_checkpoint
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
shard_checkpoint(sys.argv[1], sys.argv[2], max_shard_size="200MB", dtype=sys.argv[3] or None)
print(peak(), *(name for name in ("torch", "numpy", "transformers") if name in sys.modules))
"""


def sparse_source(folder: Path, nbytes: int, tensors: int = 8) -> Path:
    """A bfloat16 checkpoint of zeros that takes no space."""
    folder.mkdir()
    sparse_file(folder / "model.safetensors", {f"t{i}": (nbytes // tensors // 2,) for i in range(tensors)})
    return folder


def peak_of_sharding(source: Path, out: Path, dtype: str = "") -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, source, out, dtype], check=True, capture_output=True, text=True
    )
    peak, *modules = done.stdout.split()
    return int(peak), modules


@pytest.mark.slow
def test_sharding_two_gigabytes_takes_less_than_64_mb_and_neither_torch_nor_numpy(
    tmp_path: Path,
) -> None:
    peak, modules = peak_of_sharding(sparse_source(tmp_path / "source", 2_000_000_000), tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert modules == []
    assert peak < 64_000_000


@pytest.mark.slow
def test_cast_takes_less_than_200_mb_and_no_torch(tmp_path: Path) -> None:
    source = sparse_source(tmp_path / "source", 800_000_000)
    peak, modules = peak_of_sharding(source, tmp_path / "out", "float16")
    shutil.rmtree(tmp_path / "out")
    assert modules == ["numpy"]
    assert peak < 200_000_000


def test_import_brings_in_nothing_heavy() -> None:
    code = "import sys, shardkit; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "transformers", "matplotlib", "ipywidgets", "numpy", "IPython", "pandas"}
