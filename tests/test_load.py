"""Loading a model in this process."""

import shutil

import pytest

from shardkit import CheckpointError, PlanError, load_model, make_demo_checkpoint, measure_load


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
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_folder_and_the_file_that_is_loaded_give_the_same_model(one_file, source):
    model = load_model(one_file / source)
    assert type(model).__name__ == "MistralForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"


def test_text_that_is_no_dtype_is_refused_before_anything_is_read(demo):
    with pytest.raises(PlanError, match="'fp16' is not one of float16"):
        load_model(demo, dtype="fp16")
