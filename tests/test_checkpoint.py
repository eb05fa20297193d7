"""What is found in a folder, and what is refused; the readers of transformers decide what is right."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from shardkit import Checkpoint, shard_checkpoint
from shardkit.errors import CheckpointError
from shardkit.formats.tensor import DTYPE_NAMES
from tests.support import (
    DTYPES,
    FreshFolder,
    Tensor,
    Tensors,
    checkpoints,
    data_offsets,
    file_bytes,
    make_tensor,
    safetensors_bytes,
    union,
    write_checkpoint,
)

CONFIG = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 8}


def numbers(*values: float) -> Tensor:
    data = torch.tensor(values, dtype=torch.float32).numpy().tobytes()
    return Tensor("F32", (len(values),), data)


def put(folder: Path, files: dict[str, object]) -> Path:
    """Write bytes, text, JSON or tensors under their file names."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        elif name.endswith(".json"):
            path.write_text(json.dumps(content))
        elif name.endswith(".bin"):
            torch.save(content, path)
        else:
            path.write_bytes(safetensors_bytes(content))  # type: ignore[arg-type]
    return folder


def index(**weight_map: str) -> dict[str, object]:
    return {"metadata": {}, "weight_map": weight_map}


WEIGHTS: dict[str, Tensor] = {"w": numbers(1, 2)}


@settings(max_examples=50)
@given(files=checkpoints())
def test_every_tensor_is_found_with_its_file_and_first_byte(
    files: list[Tensors], fresh_folder: FreshFolder
) -> None:
    with fresh_folder() as folder:
        checkpoint = Checkpoint.open(write_checkpoint(folder, files))
        for name, offset in itertools.chain(*(data_offsets(folder / f).items() for f in checkpoint.files)):
            assert checkpoint.tensors[name].offset == offset
    made = union(files)
    found = {name: (t.dtype, t.shape, t.nbytes) for name, t in checkpoint.tensors.items()}
    assert found == {name: (t.dtype, t.shape, len(t.data)) for name, t in made.items()}
    assert list(checkpoint.tensors) == list(made)  # in order of file and offset
    assert checkpoint.total_bytes == sum(len(t.data) for t in made.values())
    assert sum(checkpoint.dtypes.values()) == checkpoint.total_bytes
    assert checkpoint.largest is not None
    assert checkpoint.largest.nbytes == max(len(t.data) for t in made.values())


KINDS: dict[str, dict[str, object]] = {
    "model.safetensors": {"model.safetensors": {"one": numbers(1)}},
    "model.safetensors.index.json": {
        "model.safetensors.index.json": index(two="model-00001-of-00001.safetensors"),
        "model-00001-of-00001.safetensors": {"two": numbers(2)},
    },
    "pytorch_model.bin": {"pytorch_model.bin": {"three": torch.ones(3)}},
    "pytorch_model.bin.index.json": {
        "pytorch_model.bin.index.json": index(four="pytorch_model-00001-of-00001.bin"),
        "pytorch_model-00001-of-00001.bin": {"four": torch.ones(4)},
    },
}


@pytest.mark.parametrize(
    "kinds", [c for n in range(1, 5) for c in itertools.combinations(KINDS, n)], ids=" + ".join
)
def test_folder_of_several_formats_is_read_as_transformers_reads_it(
    kinds: tuple[str, ...], tmp_path: Path
) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    for kind in kinds:
        put(tmp_path, KINDS[kind])
    chosen, _ = _get_resolved_checkpoint_files(
        str(tmp_path),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert [checkpoint.path(file) for file in checkpoint.files] == chosen
    assert not checkpoint.side_files.keys() & {name for kind in kinds for name in KINDS[kind]}


def test_file_that_the_config_names_comes_before_all_others(tmp_path: Path) -> None:
    put(tmp_path, {**KINDS["model.safetensors"], "other.safetensors": WEIGHTS})
    put(tmp_path, {"config.json": {"transformers_weights": "other.safetensors"}})
    assert list(Checkpoint.open(tmp_path).tensors) == ["w"]


def test_single_file_alone_takes_nothing_from_around_it(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS, "holiday.jpg": b"mine"})
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert (list(checkpoint.tensors), checkpoint.config, checkpoint.side_files) == (["w"], None, {})


def test_single_file_beside_a_config_is_a_whole_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS, "config.json": CONFIG, "tokenizer.json": "{}"})
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert set(checkpoint.side_files) == {"config.json", "tokenizer.json"}


def test_path_of_an_index_opens_the_shards_it_names(tmp_path: Path) -> None:
    put(tmp_path, KINDS["model.safetensors"] | KINDS["model.safetensors.index.json"])
    assert list(Checkpoint.open(tmp_path / "model.safetensors.index.json").tensors) == ["two"]


@pytest.mark.parametrize(
    ("files", "stem"),
    [
        ({"diffusion_pytorch_model.safetensors": WEIGHTS}, "diffusion_pytorch_model"),
        ({"diffusion_pytorch_model.fp16.safetensors": WEIGHTS}, "diffusion_pytorch_model"),
        ({"diffusion_pytorch_model.bin": {"w": torch.ones(1)}}, "diffusion_pytorch_model"),
        (
            {
                "diffusion_pytorch_model.safetensors.index.fp16.json": index(w="part.fp16.safetensors"),
                "part.fp16.safetensors": WEIGHTS,
            },
            "diffusion_pytorch_model",
        ),
        ({"adapter_model.safetensors": WEIGHTS, "adapter_config.json": {}}, "adapter_model"),
        ({"adapter_model.bin": {"w": torch.ones(1)}}, "adapter_model"),
        ({"model.fp16.safetensors": WEIGHTS}, "model"),
        ({"consolidated.safetensors": WEIGHTS}, "model"),
        ({"consolidated.safetensors": WEIGHTS, "params.json": {}}, "consolidated"),
        ({"consolidated.safetensors": WEIGHTS, "params.json": {}, "config.json": CONFIG}, "model"),
        ({"open_clip_model.safetensors": WEIGHTS, "open_clip_config.json": {}}, "open_clip_model"),
    ],
)
def test_weights_of_other_stems_are_found(files: dict[str, object], stem: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(put(tmp_path, files))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.stem == stem


def test_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    home = tmp_path / "models--mistralai--tiny"
    snapshot = home / "snapshots" / "0123abc"
    blobs = put(home / "blobs", {"aa": safetensors_bytes(WEIGHTS), "bb": json.dumps(CONFIG)})
    blobs = put(blobs, {"cc": json.dumps(index(w="model-00001-of-00001.safetensors")), "dd": "{}"})
    links = {"model-00001-of-00001.safetensors": "aa", "config.json": "bb"}
    links |= {"model.safetensors.index.json": "cc", "1_Pooling/config.json": "dd"}
    for name, blob in links.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / blob, (snapshot / name).parent))
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.config == CONFIG
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.side_files.keys() == {"config.json", os.path.join("1_Pooling", "config.json")}


def test_all_that_is_not_weights_comes_along(tmp_path: Path) -> None:
    beside: dict[str, object] = {
        "config.json": CONFIG,
        "generation_config.json": {},
        "tokenizer.model": b"\0",
        "README.md": "card",
        "modeling_remote.py": "code",
        "1_Pooling/config.json": {},
        "assets/deep/picture.png": b"\0",
    }
    module: dict[str, object] = {
        "modules.json": [{"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}],
        "2_Dense/config.json": {},
        "2_Dense/model.safetensors": WEIGHTS,
        "2_Dense/pytorch_model.bin": {"w": torch.ones(1)},
    }
    other: dict[str, object] = {
        "pytorch_model.bin": {"w": torch.ones(1)},
        "model.fp16.safetensors": WEIGHTS,
        "tf_model.h5": b"",
        "flax_model.msgpack": b"",
        "rust_model.ot": b"",
        "model.Q4_K_M.gguf": b"",
        "onnx/model.onnx": b"",
        "original/consolidated.00.pth": b"",
        "optimizer.pt": b"",
        "checkpoint-500/config.json": {},
        "checkpoint-500/model.safetensors": WEIGHTS,
    }
    ours: dict[str, object] = {
        ".git/HEAD": "ref",
        "assets/.git": "gitdir: ../../.git/modules/assets",
        ".cache/huggingface/download.lock": "",
        ".out.shardkit-staging/model.safetensors": WEIGHTS,
    }
    put(tmp_path, {"model.safetensors": WEIGHTS, **beside, **module, **other, **ours})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.side_files) == {*beside, *module}
    assert set(checkpoint.left_out) == set(other)
    assert "pytorch_model.bin" not in str(checkpoint.files)
    assert "weights for other runtimes: 6 files (flax_model.msgpack" in str(checkpoint)
    assert "training state: 3 files (optimizer.pt, checkpoint-500/config.json" in str(checkpoint)


def test_sharded_weights_of_a_module_come_along(tmp_path: Path) -> None:
    module: dict[str, object] = {
        "modules.json": [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}],
        "2_Dense/config.json": {},
        "2_Dense/model.safetensors.index.json": index(w="model-00001-of-00001.safetensors"),
        "2_Dense/model-00001-of-00001.safetensors": WEIGHTS,
    }
    put(tmp_path, {"model.safetensors": WEIGHTS, "config.json": CONFIG, **module})
    assert set(Checkpoint.open(tmp_path).side_files) == {"config.json", *module}


@pytest.mark.parametrize(
    "modules", ["[1]", "{}", '[{"path": 3}]', '[{"path": ""}]', '[{"path": ".."}]', "[{}]"]
)
def test_odd_list_of_modules_takes_no_other_weights_along(modules: str, tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS, "pytorch_model.bin": {"w": torch.ones(1)}})
    put(tmp_path, {"modules.json": modules, "onnx/model.onnx": b""})
    assert set(Checkpoint.open(tmp_path).left_out) == {"pytorch_model.bin", "onnx/model.onnx"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["contains no weights"]),
        ({"config.json": CONFIG}, ["contains no weights"]),
        ({"unet/diffusion_pytorch_model.safetensors": WEIGHTS}, ["contains no weights", "unet"]),
        ({"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS}, ["several", "a.safetensors, b.safetensors"]),
        (
            {"model-00001-of-00003.safetensors": WEIGHTS, "model-00003-of-00003.safetensors": WEIGHTS},
            ["model-00001-of-00003.safetensors", "number 2 of 00003 is missing", "2 files"],
        ),
        ({"model-00001-of-00002.safetensors": WEIGHTS}, ["one of 2 shards", "number 2 of 00002 is missing"]),
        ({"model-00001-of-99999999.safetensors": WEIGHTS}, ["one of 99999999 shards", "most are missing"]),
        ({"model.safetensors.index.json": index(w="gone.safetensors")}, ["gone.safetensors", "not exist"]),
        (
            {
                "model.safetensors.index.json": index(w="a.safetensors", v="b.bin"),
                "a.safetensors": WEIGHTS,
                "b.bin": {"v": torch.ones(1)},
            },
            ["mixes formats", ".bin, .safetensors"],
        ),
        ({"model.safetensors.index.json": {}}, ["no weight_map"]),
        ({"model.safetensors.index.json": []}, ["no weight_map"]),
        ({"model.safetensors.index.json": index()}, ["weight_map is empty"]),
        ({"model.safetensors.index.json": {"weight_map": {"w": 1}}}, ["no weight_map"]),
        ({"model.safetensors.index.json": "{"}, ["not valid JSON"]),
        ({"model.safetensors": WEIGHTS, "config.json": "{"}, ["config.json", "not valid JSON"]),
        ({"model.safetensors": WEIGHTS, "config.json": "[]"}, ["config.json", "not a JSON object"]),
        ({"config.json": {"transformers_weights": "../w.safetensors"}}, ["config.json", "outside"]),
    ],
)  # fmt: skip
def test_folder_that_is_no_checkpoint_is_refused_with_the_reason(
    files: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(put(tmp_path, files))
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "{tmp}/outside.safetensors",
        "sub/../../outside.safetensors",
        "link.safetensors",
    ],
)
def test_weight_map_must_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"outside.safetensors": WEIGHTS})
    folder = put(tmp_path / "source", {"sub/file": ""})
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    name = name.format(tmp=tmp_path)
    assert (folder / name).is_file()  # it would be read
    put(folder, {"model.safetensors.index.json": index(w=name)})
    with pytest.raises(CheckpointError, match=r"outside the folder") as caught:
        Checkpoint.open(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["./w.safetensors", "sub//w.safetensors", "sub/./w.safetensors"])
def test_file_that_a_weight_map_names_in_two_ways_is_read_once(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"w.safetensors": WEIGHTS, "sub/w.safetensors": WEIGHTS})
    put(tmp_path, {"model.safetensors.index.json": index(w=name, v=os.path.normpath(name))})
    assert Checkpoint.open(tmp_path).files == (os.path.normpath(name),)


def test_pipe_named_by_an_index_is_no_cut_download(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors.index.json": index(w="w.safetensors")})
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("target", ["../shared", "real"])
def test_linked_folder_is_refused_rather_than_left_out(target: str, tmp_path: Path) -> None:
    put(tmp_path, {"shared/vocab.txt": "a", "source/real/vocab.txt": "a"})
    (put(tmp_path / "source", {"model.safetensors": WEIGHTS}) / "tokenizer").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"tokenizer is a symlink to a folder"):
        Checkpoint.open(tmp_path / "source")


def test_dangling_link_is_refused_unless_it_is_of_weights_that_stay_behind(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS})
    (tmp_path / "tf_model.h5").symlink_to("../../blobs/pruned")
    assert Checkpoint.open(tmp_path).side_files == {}
    (tmp_path / "tokenizer.json").symlink_to("../../blobs/pruned")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to .*pruned, which does not"):
        Checkpoint.open(tmp_path)


def test_folder_that_cannot_be_read_is_refused_rather_than_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS, "private/vocab.txt": "a"})
    real = os.scandir

    def scandir(path: str) -> object:
        if os.path.basename(path) == "private":  # as root, whom no rights stop, would not see it
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CheckpointError, match=r"private cannot be read: Permission denied"):
        Checkpoint.open(tmp_path)


def test_config_of_many_megabytes_is_read_up_to_a_bound(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS, "config.json": json.dumps({"data": [[7] * 2048] * 512})})
    config = Checkpoint.open(tmp_path).config
    assert config is not None
    assert config["data"][511] == [7] * 2048
    with (tmp_path / "config.json").open("ab") as file:
        file.truncate(100_000_001)
    with pytest.raises(CheckpointError, match=r"config\.json has 100,000,001 bytes, more than the"):
        Checkpoint.open(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "hostile", ["[" * 9_000_000, "[" + "[]," * 4_000_000 + "[]]", '{"a":1}:' * 1_000_000]
)
def test_config_that_would_take_gigabytes_is_refused_before_it_is_parsed(
    hostile: str, tmp_path: Path
) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS, "config.json": hostile})
    with pytest.raises(CheckpointError, match=r"more than the limit of 8000000|not valid JSON"):
        Checkpoint.open(tmp_path)


def test_infinite_and_undefined_numbers_of_a_config_are_kept(tmp_path: Path) -> None:
    text = '{"architectures": ["X"], "limits": [0.0, Infinity, -Infinity, NaN, 1e999], "dtype": "float32"}'
    put(tmp_path, {"source/model.safetensors": WEIGHTS, "source/config.json": text})
    strict = json.dumps(Checkpoint.open(tmp_path / "source").to_dict(), allow_nan=False)
    assert '[0.0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}, {"__float__": "NaN"}' in strict
    shard_checkpoint(tmp_path / "source", tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_text() == text
    shard_checkpoint(tmp_path / "source", tmp_path / "cast", dtype="bfloat16")
    adapted = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert str(adapted["limits"]) == "[0.0, inf, -inf, nan, inf]"
    assert adapted["dtype"] == "bfloat16"


def test_folder_named_like_the_hub_cache_gives_no_way_out(tmp_path: Path) -> None:
    put(tmp_path, {"outside.safetensors": WEIGHTS})
    folder = tmp_path / "models--a--b" / "snapshots" / "main"
    put(folder, {"model.safetensors.index.json": index(w="link.safetensors")})
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint.open(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "part.safetensors"])
def test_pipe_in_place_of_weights_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    if name == "part.safetensors":
        put(tmp_path, {"model.safetensors.index.json": index(w=name)})
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError):
            Checkpoint.open(source)


def test_git_lfs_pointer_in_a_folder_is_told_from_weights(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 90868376\n"
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        Checkpoint.open(put(tmp_path, {"model.safetensors": pointer}))


NO_IDS = ("runs/exp--1", "org/a..b", "org/x.git", "org/x-", "org/" + "x" * 97, "hf://x--y")


@pytest.mark.parametrize("source", ["absent", "a/b/absent", "", "a\0b", "x" * 5000, *NO_IDS])
def test_source_that_is_not_there_is_named(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a local folder or file|an empty name is no checkpoint"):
        Checkpoint.open(source)


def test_revision_of_what_is_here_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": WEIGHTS})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=f"{path} is a local path, which has no revisions"):
            Checkpoint.open(path, revision="v2")


def test_file_that_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"model.gguf": b"GGUF\3\0\0\0", "notes.txt": "text"})
    for name in ("model.gguf", "notes.txt"):
        with pytest.raises(CheckpointError, match=name):
            Checkpoint.open(tmp_path / name)


def test_error_of_a_checkpoint_survives_a_process_pool() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(CheckpointError("ends early", file="m.safetensors", tensor="w")))
    assert str(error) == "m.safetensors, tensor 'w' ends early"
    assert (error.file, error.tensor) == ("m.safetensors", "w")


def test_summary_says_what_the_config_says_against_what_the_files_hold(tmp_path: Path) -> None:
    put(tmp_path, {"model.safetensors": {"w": numbers(*range(1000))}, "config.json": CONFIG})
    shown = str(Checkpoint.open(tmp_path))
    facts = [
        "LlamaForCausalLM",
        "1,000 in 1 tensor",
        "4 KB in 1 file (safetensors)",
        "w (1000 float32, 4 KB)",
    ]
    assert [fact for fact in [*facts, "bfloat16 (the files are mostly float32)"] if fact not in shown] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_shown_by_a_name_of_torch(dtype: str, tmp_path: Path) -> None:
    import random

    put(tmp_path, {"model.safetensors": {"w": make_tensor(dtype, (4,), random.Random(0))}})
    assert DTYPE_NAMES[dtype] in str(Checkpoint.open(tmp_path))
    assert hasattr(torch, DTYPE_NAMES[dtype]) or dtype.startswith("F6")  # torch has no 6 bit dtypes


def test_folder_of_a_bare_header_is_an_empty_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(put(tmp_path, {"model.safetensors": file_bytes({})}))
    assert (checkpoint.tensors, checkpoint.total_bytes, checkpoint.largest) == ({}, 0, None)
    assert "0 in 0 tensors" in str(checkpoint)
