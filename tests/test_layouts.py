"""Folders as people really have them: untidy, cut, of several models; what belongs to a model comes along."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardkit import Checkpoint, shard_checkpoint, verify_checkpoint
from shardkit.errors import CheckpointError
from shardkit.plan.plan import Strategy
from tests.test_checkpoint import CONFIG, WEIGHTS, index, numbers, put

MODEL: dict[str, object] = {"model.safetensors": WEIGHTS, "config.json": CONFIG}
ADAPTER: dict[str, object] = {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": {}}

BELONGS: dict[str, tuple[dict[str, object], list[str]]] = {
    "voices": (MODEL, ["spk_dict.pt"]),
    "heads of its own": (MODEL, ["colbert_linear.pt", "sparse_linear.pt", "medusa_lm_head.pt"]),
    "normalizer states": (MODEL, ["policy_preprocessor_step_3_normalizer_processor.safetensors"]),
    "further weights of an adapter": (
        ADAPTER,
        ["non_lora_trainables.bin", "style/adapter_model.safetensors"],
    ),
    "adapters of a model": (
        MODEL,
        ["adapter_model.safetensors", "adapter_config.json", "vision-lora/adapter_model.safetensors"],
    ),
    "routes": (
        {**MODEL, "modules.json": [{"path": "1_Router"}]},
        ["1_Router/query_0_Dense/model.safetensors"],
    ),
    "other names": ({"diffusion_pytorch_model.safetensors": WEIGHTS, "config.json": {}}, ["Wan2.1_VAE.pth"]),
    "parts of a pipeline": ({**MODEL, "model_index.json": {}}, ["vae/diffusion_pytorch_model.safetensors"]),
    "a folder that the config names": ({**MODEL, "modules.json": [{"path": "onnx"}]}, ["onnx/model.onnx"]),
    "a scheduler's config": (MODEL, ["scheduler/scheduler_config.json", "optimizer_config.json"]),
    "a part called by the model's name": (MODEL, ["model.mm_projector.bin", "model_vision.safetensors"]),
}


@pytest.mark.parametrize("kind", BELONGS)
def test_weights_beside_the_main_file_come_along(kind: str, tmp_path: Path) -> None:
    files, needed = BELONGS[kind]
    put(tmp_path / "source", {**files, **dict.fromkeys(needed, b"\x01\x02\x03")})
    report = shard_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [name for name in needed if (tmp_path / "out" / name).read_bytes() != b"\1\2\3"] == []
    assert report.left_out == {}
    assert set(needed) <= set(report.to_dict()["side_files"])


STAYS = {
    "the same weights in another format": [
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.pt",
        "model.fp16.safetensors", "model-00001-of-00009.safetensors", "model.safetensors.index.fp16.json",
        "model.fp16-00001-of-00002.safetensors", "consolidated.00.pth", "params.json",
    ],
    "weights for other runtimes": [
        "tf_model.h5", "flax_model.msgpack", "flax_model-00001-of-00002.msgpack", "rust_model.ot",
        "64.tflite",
        "m.Q4_K_M.gguf", "model.onnx_data", "onnx/model.onnx.data", "onnx/config.json",
        "original/params.json", "original/consolidated.00.pth",
        "openvino_model.bin", "openvino_model.xml", "openvino/openvino_model.xml", "coreml/a.mlpackage/b.bin",
        "metal/model.bin", "model_state.pdparams", "model.nemo", "model.ckpt.data-00000-of-00001",
    ],
    "training state": [
        "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin",
        "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "random_states_0.pkl",
        "global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
    "partial downloads and backups": [
        "model-00002-of-00002.safetensors.part", "model.safetensors.bak", "tokenizer.json.incomplete",
        "pytorch_model.bin.aria2", "model.safetensors.crdownload", "model.safetensors~",
    ],
}  # fmt: skip


def test_only_what_is_known_not_to_be_needed_stays_behind_and_all_of_it_is_listed(tmp_path: Path) -> None:
    put(tmp_path / "source", {**MODEL, "params.txt": "mine"})
    put(tmp_path / "source", {name: b"\0" for names in STAYS.values() for name in names})
    put(tmp_path / "source", {".huggingface/download/model.safetensors.0a1b.incomplete": b""})
    report = shard_checkpoint(tmp_path / "source", tmp_path / "out")
    assert set(report.side_files) == {"config.json", "params.txt"}
    assert report.left_out == {name: kind for kind, names in STAYS.items() for name in names}
    assert report.to_dict()["left_out"] == report.left_out
    assert all(f"{kind}: {len(names)} files" in str(report) for kind, names in STAYS.items())


def test_side_file_that_would_shadow_the_shards_never_comes_along(tmp_path: Path) -> None:
    put(
        tmp_path / "source",
        {"config.json": {"transformers_weights": "w.safetensors", "base": "model.safetensors"}},
    )
    put(
        tmp_path / "source",
        {"w.safetensors": {"w": numbers(3)}, "model.safetensors": WEIGHTS, "w.fp16.bin": b""},
    )
    report = shard_checkpoint(tmp_path / "source", tmp_path / "out")
    assert report.left_out.keys() == {"model.safetensors", "w.fp16.bin"}
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [3.0]
    assert "shards of w are named model, the name that from_pretrained looks for" in str(report)


def test_weights_that_another_loader_finds_by_name_keep_it(tmp_path: Path) -> None:
    put(
        tmp_path / "source",
        {"consolidated.safetensors": {f"t{i}": numbers(i) for i in range(9)}, "params.json": {}},
    )
    report = shard_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size=500)
    assert all(name.startswith("consolidated-0000") for name in report.files)
    assert (tmp_path / "out" / "consolidated.safetensors.index.json").is_file()
    assert "params.json" in report.side_files
    assert verify_checkpoint(tmp_path / "source", tmp_path / "out").equal


def test_pipeline_is_not_taken_for_the_single_file_at_its_root(tmp_path: Path) -> None:
    put(tmp_path, {"dreamy.safetensors": WEIGHTS, "model_index.json": {}})
    put(tmp_path, {"unet/diffusion_pytorch_model.safetensors": WEIGHTS, "vae/model.safetensors": WEIGHTS})
    with pytest.raises(CheckpointError, match=r"pipeline of several models.*unet, vae"):
        Checkpoint.open(tmp_path)
    assert list(Checkpoint.open(tmp_path / "dreamy.safetensors").tensors) == ["w"]
    assert Checkpoint.open(tmp_path / "unet").stem == "diffusion_pytorch_model"


def shards(
    folder: Path, count: int, name: str = "model-{:05d}-of-{:05d}.safetensors", first: int = 1
) -> list[str]:
    names = [name.format(number, count) for number in range(first, count + first)]
    for number, file in enumerate(names):
        put(folder, {file: {f"t{number}": numbers(number)}})
    return names


@pytest.mark.parametrize("place", [0, 2])
def test_path_of_one_shard_means_the_whole_checkpoint(place: int, tmp_path: Path) -> None:
    names = shards(tmp_path, 3)
    put(tmp_path, {"config.json": CONFIG})
    put(tmp_path, {"model.safetensors.index.json": index(**{f"t{n}": name for n, name in enumerate(names)})})
    checkpoint = Checkpoint.open(tmp_path / names[place])
    assert list(checkpoint.tensors) == ["t0", "t1", "t2"]
    assert f"{names[place]} is one of 3 shards" in str(checkpoint)
    assert set(checkpoint.side_files) == {"config.json"}


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model-{:05d}-of-{:05d}.safetensors", 1),
        ("model-{:05d}-of-{:06d}.safetensors", 1),
        ("model-{:05d}-of-{:05d}.safetensors", 0),
        ("model_{:02d}_of_{:02d}.safetensors", 1),
        ("model-{:05d}-of-{:05d}.fp16.safetensors", 1),
    ],
)
def test_shards_whose_index_is_lost_are_a_checkpoint_where_all_are_there(
    name: str, first: int, tmp_path: Path
) -> None:
    names = shards(tmp_path / "source", 3, name, first)
    for source in (tmp_path / "source", tmp_path / "source" / names[1]):
        checkpoint = Checkpoint.open(source)
        assert list(checkpoint.tensors) == ["t0", "t1", "t2"]
        assert "3 shards without an index" in str(checkpoint)
    shard_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size=200)
    made = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(made["weight_map"]) == ["t0", "t1", "t2"]
    (tmp_path / "source" / names[2]).unlink()
    for source in (tmp_path / "source", tmp_path / "source" / names[1]):
        with pytest.raises(CheckpointError, match=r"one of 3 shards, but only 2 files found"):
            Checkpoint.open(source)


def test_shards_of_the_model_come_before_weights_of_other_names(tmp_path: Path) -> None:
    shards(tmp_path, 2)
    put(tmp_path, {"consolidated.safetensors": WEIGHTS, "extra.safetensors": WEIGHTS})
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["t0", "t1"]
    assert set(checkpoint.side_files) == {"extra.safetensors"}


INDEXES: dict[str, tuple[dict[str, str], str]] = {
    "a tensor that no file holds": (
        {"t0": "a", "t1": "b", "mtp.fc.weight": "b"}, "lists 1 tensor that no file contains: mtp.fc.weight"
    ),
    "a tensor in another file": ({"t0": "b", "t1": "b", "u": "a"}, "lists 1 tensor in the wrong file: t0"),
    "a tensor not at all": ({"t0": "a", "u": "b"}, "omits 1 tensor that its files contain: t1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_index_that_is_wrong_about_its_files_is_taken_with_a_note(kind: str, tmp_path: Path) -> None:
    weight_map, note = INDEXES[kind]
    named = {tensor: f"{file}.safetensors" for tensor, file in weight_map.items()}
    put(tmp_path, {"a.safetensors": {"t0": numbers(0)}, "b.safetensors": {"t1": numbers(1)}})
    put(tmp_path, {"model.safetensors.index.json": index(**named)})
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {
        "t0": "a.safetensors", "t1": "b.safetensors"
    }  # fmt: skip
    assert note in str(checkpoint)


def test_tensor_in_two_shards_is_that_of_the_last_as_in_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    source = tmp_path / "source"
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    model.save_pretrained(source, max_shard_size="2KB")
    first, *_, last = sorted(source.glob("model-*.safetensors"))
    name = next(iter(load_file(first)))
    save_file({**load_file(last), name: load_file(first)[name] + 1}, last, {"format": "pt"})
    report = shard_checkpoint(source, tmp_path / "out")
    assert f"{name} is in both {first.name} and {last.name}" in str(report)
    ours, theirs = (
        GPT2LMHeadModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", source)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("repository", ["models--a--b", "datasets--a--b"])
def test_links_into_the_hub_cache_are_followed(repository: str, tmp_path: Path) -> None:
    blobs = put(tmp_path / "cache" / repository / "blobs", {"aa": b"", "bb": "{}"})
    source = put(tmp_path / "source", {"model.safetensors": WEIGHTS, "model.safetensors.index.json": "{}"})
    shards(tmp_path, 1, "part.safetensors")
    (tmp_path / "part.safetensors").rename(blobs / "aa")
    put(source, {"model.safetensors.index.json": index(t0="part.safetensors")})
    (source / "model.safetensors").unlink()
    for name, blob in (("part.safetensors", "aa"), ("tokenizer.json", "bb")):
        (source / name).symlink_to(blobs / blob)
    checkpoint = Checkpoint.open(source)
    assert list(checkpoint.tensors) == ["t0"]
    shard_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_git_lfs_pointer_beside_the_weights_is_told(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 499723\n"
    checkpoint = Checkpoint.open(put(tmp_path, {**MODEL, "tokenizer.model": pointer}))
    assert "tokenizer.model is a Git LFS pointer, not the file: run `git lfs pull`" in str(checkpoint)


def test_config_that_names_a_key_twice_is_read_as_python_reads_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(put(tmp_path, {**MODEL, "config.json": '{"a": 1, "a": 2}'}))
    assert checkpoint.config == {"a": 2}


@pytest.mark.parametrize("layout", ["index", "mixed"])
@pytest.mark.parametrize("strategy", ["size", "layer", "balanced"])
def test_load_chooses_the_same_dtype_for_the_copy_where_the_config_says_none(
    layout: str, strategy: Strategy, tmp_path: Path
) -> None:
    from tests.architectures import make_model

    source, model = tmp_path / "source", make_model("LlamaForCausalLM")
    model.save_pretrained(source, max_shard_size="20KB" if layout == "index" else "1GB")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    if layout == "index":
        path = source / "model.safetensors.index.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "metadata": {"dtype": "float16"}}))
    else:
        tensors = load_file(source / "model.safetensors")
        mixed = {
            name: tensor.half() if "embed" in name or "lm_head" in name else tensor
            for name, tensor in tensors.items()
        }
        save_file(mixed, source / "model.safetensors", {"format": "pt"})
    shard_checkpoint(source, tmp_path / "out", max_shard_size="15KB", strategy=strategy)
    ours, theirs = (type(model).from_pretrained(folder).state_dict() for folder in (tmp_path / "out", source))
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shards_of_another_stem_are_verified_beside_a_model_that_came_along(tmp_path: Path) -> None:
    put(tmp_path / "source", {**MODEL, "adapter_model.safetensors": {"lora": numbers(1, 2, 3)}})
    report = shard_checkpoint(tmp_path / "source" / "adapter_model.safetensors", tmp_path / "out")
    assert report.verification is not None
    assert (report.verification.tensors, list(report.files)) == (1, ["adapter_model.safetensors"])
    assert "model.safetensors" in report.side_files


def test_shards_that_the_index_does_not_name_stay_behind_under_their_own_reason(tmp_path: Path) -> None:
    names = shards(tmp_path, 3)
    put(tmp_path, {"config.json": CONFIG, "model.safetensors.index.json": index(t0=names[0])})
    put(tmp_path, {"model.ema.safetensors": WEIGHTS, "checkpoint-7/model.safetensors": WEIGHTS})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.left_out == {
        **dict.fromkeys(names[1:], "shards that the index does not list"),
        "checkpoint-7/model.safetensors": "training state",
    }
    assert "model.ema.safetensors" in checkpoint.side_files
    put(tmp_path, {"config.json": {**CONFIG, "speaker_encoder": "checkpoint-7"}})
    assert "checkpoint-7/model.safetensors" in Checkpoint.open(tmp_path).side_files


def test_folder_called_like_that_of_another_runtime_comes_along_if_it_holds_no_weights(
    tmp_path: Path,
) -> None:
    put(tmp_path, {**MODEL, "original/notes.txt": "mine", "onnx/config.json": {}, "onnx/model.onnx": b""})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.side_files) == {"config.json", "original/notes.txt"}
    assert set(checkpoint.left_out) == {"onnx/config.json", "onnx/model.onnx"}


def test_cast_is_followed_by_dtypes_of_parts_wherever_a_config_names_them(tmp_path: Path) -> None:
    config = {
        "architectures": ["X"],
        "dtype": {"": "float32", "vision": "float32"},
        "parts": [{"dtype": "float32"}],
    }
    put(tmp_path / "source", {**MODEL, "config.json": config})
    shard_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float16")
    adapted = json.loads((tmp_path / "out" / "config.json").read_text())
    assert adapted["dtype"] == {"": "float16", "vision": "float16"}
    assert adapted["parts"] == [{"dtype": "float16"}]


def test_byte_order_mark_before_a_config_is_named(tmp_path: Path) -> None:
    put(tmp_path, {**MODEL, "config.json": b"\xef\xbb\xbf{}"})
    with pytest.raises(
        CheckpointError, match=r"config\.json starts with a byte order mark.*save it without one"
    ):
        Checkpoint.open(tmp_path)
