"""Loading a model in this process."""

import shutil

import pytest

from shardkit import load_model, make_demo_checkpoint, measure_load
from shardkit.errors import CheckpointError, PlanError
from shardkit.load.load_model import loader_names


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
