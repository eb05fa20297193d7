"""Loading a model in this process."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit import load_model, make_demo_checkpoint, measure_load
from shardkit.base import machine
from shardkit.base.disk import DiskFile
from shardkit.errors import CheckpointError, PlanError
from shardkit.load import load_model as loading
from shardkit.load.load_model import loader_names
from tests.slow_mount import SlowMount, slow_mount, why_no_fuse
from tests.support import weight_files


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "model"
    make_demo_checkpoint(folder, size="5MB", shards=1)
    return folder


@pytest.mark.parametrize("load", [load_model, measure_load])
def test_file_that_transformers_would_not_load_is_refused(one_file, tmp_path, load):
    folder = tmp_path / "model"
    shutil.copytree(one_file, folder)
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: transformers loads model\.safetensors"):
        load(folder / "other.safetensors")


@pytest.mark.parametrize("load", [load_model, measure_load])
def test_file_without_a_config_is_refused(one_file, tmp_path, load):
    shutil.copyfile(one_file / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_folder_and_the_file_that_is_loaded_give_the_same_model(one_file, source):
    model = load_model(one_file / source)
    assert type(model).__name__ == "MistralForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"


def test_text_that_is_no_dtype_is_refused_before_anything_is_read(demo):
    with pytest.raises(PlanError, match=r"'float17' is not .*; did you mean float16"):
        load_model(demo, dtype="float17")


OWN = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Base", "AutoModelForCausalLM": "own.Head"}


@pytest.mark.parametrize(
    ("config", "trusted", "names"),
    [
        ({"architectures": ["MistralForCausalLM"]}, False, ["AutoModelForCausalLM"]),
        ({"architectures": ["GPT2LMHeadModel"]}, True, ["GPT2LMHeadModel", "AutoModel"]),
        ({"architectures": ["Base"], "auto_map": OWN}, True, ["AutoModel", "AutoModelForCausalLM"]),
        ({"architectures": ["Head"], "auto_map": OWN}, True, ["AutoModelForCausalLM", "AutoModel"]),
        ({"architectures": ["Other"], "auto_map": OWN}, True, ["AutoModelForCausalLM", "AutoModel"]),
        ({"architectures": ["Head"], "auto_map": OWN}, False, ["Head", "AutoModel"]),
        ({"architectures": None, "auto_map": None}, True, ["", "AutoModel"]),
        (None, False, ["", "AutoModel"]),
    ],
)
def test_loader_is_the_checkpoints_own_where_it_is_trusted(config, trusted, names):
    found = loader_names(config, trusted)
    assert list(dict.fromkeys(found))[: len(names)] == names


@pytest.mark.parametrize("kind", ["fuse", "fuse.sshfs", "fuse.drive", "nfs4", "9p", "cifs", "smb3"])
def test_network_and_fuse_mounts_are_slow_to_map(monkeypatch, kind):
    monkeypatch.setattr(machine, "filesystem", lambda _: kind)
    assert machine.is_slow_to_map("anywhere")


@pytest.mark.parametrize("kind", ["ext4", "overlay", "tmpfs", "fuseblk", "fuse.fuse-overlayfs", None])
def test_disks_are_not_slow_to_map(monkeypatch, kind):
    monkeypatch.setattr(machine, "filesystem", lambda _: kind)
    assert not machine.is_slow_to_map("anywhere")


def mapped(folder: Path) -> set[str]:
    """The weight files of a folder that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {str(path) for path in weight_files(folder) if any(line.endswith(f"{path}") for line in lines)}


def assert_same(found, expected) -> None:
    """Two models have the same weights in the same dtypes, and give the same logits."""
    import torch

    first, second = found.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    assert all(value.dtype == second[name].dtype for name, value in first.items())
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    ids = torch.arange(1, 9)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.fixture
def slow_here(monkeypatch) -> None:
    """This disk is taken for a slow mount, with nothing in the page cache."""
    monkeypatch.setattr(loading, "is_slow_to_map", lambda _: True)
    monkeypatch.setattr(loading, "resident_bytes", lambda _: 0)


def test_on_a_disk_files_are_mapped_as_ever(demo):
    model = load_model(demo)
    assert mapped(demo) == set(map(str, weight_files(demo)))
    del model


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.usefixtures("slow_here")
def test_weights_read_into_memory_are_those_of_a_plain_load(demo, tmp_path, dtype):
    import transformers

    shutil.copytree(demo, tmp_path / "model")
    expected = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=dtype)
    opens = transformers.modeling_utils.safe_open
    model = load_model(tmp_path / "model", dtype=dtype)
    assert transformers.modeling_utils.safe_open is opens
    assert mapped(tmp_path / "model") == set()
    assert_same(model, expected)


@pytest.mark.usefixtures("slow_here")
def test_what_cannot_stay_where_it_is_read_is_not_read_ahead(demo, monkeypatch):
    read = []
    monkeypatch.setattr(loading, "WeightsInMemory", lambda *_, is_ahead: read.append(is_ahead) or 1 / 0)
    for options in ({}, {"dtype": "float16"}, {"device_map": "auto"}):
        with pytest.raises(ZeroDivisionError):
            load_model(demo, **options)
    assert read == [True, False, False]


@pytest.mark.usefixtures("slow_here")
def test_tensors_that_lie_at_odd_bytes_are_read_as_ever(tiny_model, tmp_path):
    import transformers

    tiny_model("gpt2").save_pretrained(tmp_path / "even")
    shutil.copytree(tmp_path / "even", tmp_path / "odd")
    raw = (tmp_path / "even" / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    longer = (end - 7).to_bytes(8, "little") + raw[8:end] + b" " + raw[end:]
    (tmp_path / "odd" / "model.safetensors").write_bytes(longer)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    assert_same(load_model(tmp_path / "odd"), expected)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.usefixtures("slow_here")
def test_read_that_fails_names_file_and_tensor(demo, monkeypatch, dtype):
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(DiskFile, "read", fail)
    with pytest.raises(CheckpointError, match=r"safetensors, tensor '.*' cannot be read: Input/output error"):
        load_model(demo, dtype=dtype)


@pytest.fixture(scope="module")
def far(tmp_path_factory) -> Iterator[tuple[Path, SlowMount]]:
    """A model of 100 MB, and the same on a FUSE mount."""
    why = why_no_fuse()
    if why and (not os.environ.get("CI") or "/dev/fuse" in why):
        pytest.skip(why)
    scratch = tmp_path_factory.mktemp("far")
    make_demo_checkpoint(scratch / "model", size="100MB")
    with slow_mount(scratch / "model", scratch) as mount:
        yield scratch / "model", mount


def test_slow_mount_is_asked_for_each_byte_once_in_large_requests(far):
    here, mount = far
    total = sum(path.stat().st_size for path in weight_files(here))
    mount.take_requests()
    model = load_model(mount.folder)
    requests = [request.nbytes for request in mount.take_requests()]
    assert sum(size for size in requests if size > 500_000) > 0.9 * total
    assert sum(requests) < 1.1 * total
    assert_same(model, load_model(here))
    assert mount.take_requests() == []
    assert_same(load_model(mount.folder, prefetch=False), model)
    assert max(request.nbytes for request in mount.take_requests()) < 500_000


def test_measured_prefetch_on_a_slow_mount_holds_the_weights_in_memory_once(far):
    here, mount = far
    total = sum(path.stat().st_size for path in weight_files(here))
    for dtype, share in (("auto", 1.0), ("float16", 0.0)):  # what is cast is in memory anyway
        read, mapped = (measure_load(source, dtype=dtype, prefetch=True) for source in (mount.folder, here))
        assert "prefetch into memory" in str(read)
        assert "prefetch into memory" not in str(mapped)
        assert read.token_ids == mapped.token_ids
        more = (read.peak_anonymous_bytes - mapped.peak_anonymous_bytes) / total
        assert more == pytest.approx(share, abs=0.35)
