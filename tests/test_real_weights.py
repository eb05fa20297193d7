"""Real trained weights, through transformers' own loading: the sharded model is the model."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardkit import Checkpoint, shard_checkpoint, verify_checkpoint

SENTENCES = [
    "A model is a long row of numbers with names.",
    "Ein Modell ist eine lange Reihe von Zahlen mit Namen.",
    "The plate is whole.",
    "copy_file_range(2) copies a range of data from one file to another",
]


@cache
def tokens(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")


def embed(model: Any, folder: Path) -> torch.Tensor:
    """Sentence embeddings as the model was trained to give them: mean over tokens, length one."""
    inputs = tokens(folder)
    with torch.no_grad():
        hidden = model.eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, **options)


def with_weights(minilm: Path, folder: Path) -> Path:
    """A copy of the model's folder without its weights."""
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def as_safetensors(minilm: Path, folder: Path) -> None:
    (folder / "model.safetensors").symlink_to(minilm / "model.safetensors")


def as_zip_pickle(minilm: Path, folder: Path) -> None:
    torch.save(load_file(minilm / "model.safetensors"), folder / "pytorch_model.bin")


def as_legacy_pickle(minilm: Path, folder: Path) -> None:
    state = load_file(minilm / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_sharded_pickle(minilm: Path, folder: Path) -> None:
    state = load_file(minilm / "model.safetensors")
    names = list(state)
    parts = {f"pytorch_model-0000{n}-of-00003.bin": names[n - 1 :: 3] for n in (1, 2, 3)}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def as_sharded_safetensors(minilm: Path, folder: Path) -> None:
    state = load_file(minilm / "model.safetensors")
    names = list(state)
    parts = {f"model-0000{n}-of-00003.safetensors": names[n - 1 :: 3] for n in (1, 2, 3)}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


LAYOUTS = [as_safetensors, as_sharded_safetensors, as_zip_pickle, as_sharded_pickle, as_legacy_pickle]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_model_gives_the_same_embeddings_to_the_last_bit(
    layout: Callable[[Path, Path], None], minilm: Path, tmp_path: Path
) -> None:
    source = with_weights(minilm, tmp_path / "source")
    layout(minilm, source)
    report = shard_checkpoint(source, tmp_path / "out", max_shard_size="20MB")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert sizes == report.files
    # The word embeddings alone are 47 MB, one tensor: in a file of their own, and said so.
    assert [size for size in sizes.values() if size > 20_000_000] == [max(sizes.values())]
    assert any("embeddings.word_embeddings.weight" in note for note in report.notes)
    ours, theirs = load(tmp_path / "out"), load(minilm)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(embed(ours, tmp_path / "out"), embed(theirs, minilm))
    assert verify_checkpoint(minilm, tmp_path / "out").equal  # whatever the format it came by


@pytest.mark.parametrize("layout", [as_safetensors, as_sharded_pickle])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_model_gives_the_embeddings_of_the_cast_of_torch(
    dtype: str, layout: Callable[[Path, Path], None], minilm: Path, tmp_path: Path
) -> None:
    source = with_weights(minilm, tmp_path / "source")
    layout(minilm, source)
    shard_checkpoint(source, tmp_path / "out", max_shard_size="20MB", dtype=dtype)
    ours, theirs = load(tmp_path / "out", dtype="auto"), load(minilm).to(getattr(torch, dtype))
    assert ours.dtype == getattr(torch, dtype)  # config.json followed the cast
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(embed(ours, tmp_path / "out"), embed(theirs, minilm))


@pytest.mark.parametrize("strategy", ["layer", "balanced"])
def test_other_strategies_load_as_well(strategy: Any, minilm: Path, tmp_path: Path) -> None:
    report = shard_checkpoint(minilm, tmp_path / "out", max_shard_size="20MB", strategy=strategy)
    assert torch.equal(embed(load(tmp_path / "out"), minilm), embed(load(minilm), minilm))
    if strategy == "layer":
        keys = [set(load_file(tmp_path / "out" / file)) for file in report.files]
        blocks = [{int(k.split(".")[2]) for k in part if k.startswith("encoder.layer.")} for part in keys]
        assert sorted(block for held in blocks for block in held) == list(range(6))


def test_merged_model_is_the_original_file(minilm: Path, tmp_path: Path) -> None:
    shard_checkpoint(minilm, tmp_path / "sharded", max_shard_size="20MB")
    shard_checkpoint(tmp_path / "sharded", tmp_path / "merged")
    state = load_file(minilm / "model.safetensors")
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors"
    ).read_bytes()
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()


def test_everything_beside_the_weights_comes_along(minilm: Path, tmp_path: Path) -> None:
    report = shard_checkpoint(minilm, tmp_path / "out", max_shard_size="50MB")
    beside = {str(p.relative_to(minilm)) for p in minilm.rglob("*") if p.is_file()} - {"model.safetensors"}
    assert set(report.side_files) == beside
    assert all((tmp_path / "out" / name).read_bytes() == (minilm / name).read_bytes() for name in beside)
    assert "1_Pooling/config.json" in beside


def test_inspection_of_a_real_model_says_what_it_is(minilm: Path) -> None:
    checkpoint = Checkpoint.open(minilm)
    state = load_file(minilm / "model.safetensors")
    assert checkpoint.parameters == sum(tensor.numel() for tensor in state.values())
    assert checkpoint.architecture == "BertModel"
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in state.values())
    assert checkpoint.largest is not None
    assert checkpoint.largest.name == "embeddings.word_embeddings.weight"
