"""The embedded model: right in shape and size, the same for everybody, whole or absent."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit import compare_loads, demo, load_model, shard_checkpoint
from shardkit.base.errors import CheckpointError, DestinationError, PlanError, SizeError, SpaceError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo import DemoShape, demo_shape, make_demo_checkpoint
from shardkit.plan.plan import plan_shards
from shardkit.shard import tasks

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
TRUE_SHAPE = DemoShape(hidden=4096, intermediate=14336, layers=32, vocab=32000)
untimed = settings(deadline=None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "small", size="5MB")


@pytest.fixture(scope="module")
def tokenizer(small):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small.folder)


def tensor_data(checkpoint):
    """Bytes of every tensor, by name."""
    data = {}
    for name, tensor in checkpoint.tensors.items():
        with open(checkpoint.path(tensor.file), "rb") as file:
            file.seek(tensor.offset)
            data[name] = file.read(tensor.nbytes)
    return data


def folder_data(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def make_in_child(folder, size):
    """Make a demo in a fresh process; return its peak memory in bytes and which heavy modules it imported."""
    script = (
        "import json, sys; from shardkit.demo import make_demo_checkpoint;"
        "make_demo_checkpoint(sys.argv[1], size=sys.argv[2]);"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1];"
        "print(json.dumps([int(peak) * 1024, sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    command = [sys.executable, "-c", script, str(folder), size]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# The shape


@pytest.mark.parametrize(
    ("size", "dtype"),
    [("14.5GB", "bfloat16"), ("14.5GB", "float16"), ("29GB", "float32"), (14_483_464_192, "bfloat16")],
)
def test_largest_size_is_exactly_mistral_7b(size, dtype):
    assert demo_shape(size, dtype) == TRUE_SHAPE
    assert TRUE_SHAPE.parameters == 7_241_732_096
    assert (TRUE_SHAPE.heads, TRUE_SHAPE.heads // 4, TRUE_SHAPE.hidden // TRUE_SHAPE.heads) == (32, 8, 128)


@untimed
@given(st.data(), st.sampled_from(sorted(ITEMSIZE)))
def test_weights_are_within_tolerance_of_the_size_asked(data, dtype):
    largest = 7_250_000_000 * ITEMSIZE[dtype]
    exponent = data.draw(st.floats(np.log10(5_000_000), np.log10(largest)))
    asked = min(max(int(10**exponent), 5_000_000), largest)
    made = demo_shape(asked, dtype).parameters * ITEMSIZE[dtype]
    assert abs(made - asked) <= (0.03 if asked < 10**9 else 0.06) * asked


@untimed
@given(st.integers(5_000_000, 14_500_000_000) | st.integers(5_000_000, 500_000_000))
def test_every_shape_is_one_that_mistral_can_have(size):
    shape = demo_shape(size)
    assert shape.hidden % shape.heads == 0
    assert (shape.hidden // shape.heads) % 2 == 0, "rotary embeddings turn pairs"
    assert shape.heads % 4 == 0
    assert 7 <= shape.layers <= 40
    assert shape.vocab == (32_000 if size >= 400_000_000 else 960)
    assert 2 <= shape.intermediate / shape.hidden <= 5


@pytest.mark.parametrize("size", ["3.6GB", "8GB", "14GB"])
def test_from_about_3_and_a_half_gigabytes_up_the_widths_are_the_true_ones(size):
    shape = demo_shape(size)
    assert (shape.hidden, shape.intermediate, shape.vocab) == (4096, 14336, 32000)


@pytest.mark.parametrize("size", [4_999_999, "14.6GB", 14_500_000_001])
def test_size_out_of_range_names_the_range_and_the_size_asked(size, tmp_path):
    with pytest.raises(SizeError, match=r"5,000,000.*14,500,000,000") as caught:
        make_demo_checkpoint(tmp_path / "demo", size=size)
    assert repr(size) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# What is written


@pytest.mark.parametrize(("dtype", "shards"), [("bfloat16", 2), ("float16", 3), ("float32", 1)])
def test_plain_from_pretrained_loads_it_and_generates(tmp_path, dtype, shards):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make_demo_checkpoint(tmp_path / "demo", size="5MB", dtype=dtype, shards=shards)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    model, loading = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "MistralForCausalLM"
    assert model.dtype == getattr(torch, dtype)
    assert list(made.tensors) == [name for name, _ in demo_shape("5MB", dtype).tensors()]
    prompt = tokenizer("The plate", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**prompt, min_new_tokens=1, max_new_tokens=1, do_sample=False)
    assert output.shape[1] == prompt["input_ids"].shape[1] + 1
    assert isinstance(tokenizer.decode(output[0]), str)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory):
    return make_demo_checkpoint(
        tmp_path_factory.mktemp("demo") / "falcon", size="20MB", architecture="falcon"
    )


def test_falcon_has_the_proportions_of_the_original(falcon):
    shape = demo_shape("14.5GB", architecture="falcon")
    assert (shape.hidden, shape.layers, shape.heads, shape.vocab) == (4544, 32, 71, 65024)
    assert shape.parameters * 2 == 14_434_379_520  # as the index on the Hub says
    small = demo_shape("20MB", architecture="falcon")
    assert (
        dict(small.tensors())["transformer.h.0.self_attention.query_key_value.weight"][0]
        == small.hidden + 128
    )
    assert falcon.total_bytes == pytest.approx(20e6, rel=0.04)


def test_falcon_is_files_that_torch_saved_with_its_tied_head_stored_twice(falcon):
    assert falcon.files == ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    data = tensor_data(falcon)
    assert data["lm_head.weight"] == data["transformer.word_embeddings.weight"]
    assert not np.frombuffer(data["transformer.h.1.input_layernorm.bias"], np.uint8).any()
    again = make_demo_checkpoint(falcon.folder, size="20MB", architecture="falcon")
    assert again.seen == falcon.seen, "nothing is written again"
    assert [path.name for path in Path(falcon.folder).parent.iterdir()] == ["falcon"]
    with pytest.raises(DestinationError, match="not the requested demo"):
        make_demo_checkpoint(falcon.folder, size="20MB", architecture="falcon", seed=1)


@pytest.mark.slow
def test_falcon_goes_all_the_way(falcon, tmp_path):
    """Loaded, sharded, verified, compared, and run in less memory than it has."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, found = AutoModelForCausalLM.from_pretrained(falcon.folder, dtype="auto", output_loading_info=True)
    assert not any(found.values())
    report = shard_checkpoint(falcon, tmp_path / "shards", max_shard_size="5MB", strategy="layer")
    assert report.verification.equal
    comparison = compare_loads(falcon, report, repeats=1)
    assert not comparison.failures
    with pytest.raises(PlanError, match="is too small") as caught:
        load_model(report, max_memory=1, context_tokens=64)
    needed = int(re.search(r"at least [\d,]+ MB \(([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    within = load_model(report, max_memory=needed + 6_000_000, context_tokens=64)
    assert within.memory_plan.streamed_bytes > 0
    tokens = AutoTokenizer.from_pretrained(falcon.folder)("The quick", return_tensors="pt")
    assert torch.equal(model(**tokens).logits, within(**tokens).logits)


def test_weights_are_normal_and_norms_are_ones(small):
    data = tensor_data(small)
    for name in ("lm_head.weight", "model.layers.3.mlp.up_proj.weight"):
        values = np.frombuffer(data[name], ml_dtypes.bfloat16).astype(np.float32)
        assert abs(values.mean()) < 0.001
        assert values.std() == pytest.approx(0.02, rel=0.02)
    norms = [data[name] for name in data if "norm" in name]
    assert len(norms) == 2 * demo_shape("5MB").layers + 1
    assert all((np.frombuffer(norm, ml_dtypes.bfloat16) == 1).all() for norm in norms)


def test_files_are_named_as_on_the_hub_and_nearly_equal(tmp_path):
    made = make_demo_checkpoint(tmp_path / "demo", size="8MB", shards=4)
    assert made.files == tuple(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5))
    sizes = [sum(t.nbytes for t in made.tensors.values() if t.file == file) for file in made.files]
    assert max(sizes) - min(sizes) <= made.largest.nbytes
    index = json.loads((tmp_path / "demo/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.total_bytes == sum(sizes)
    alone = make_demo_checkpoint(tmp_path / "alone", size="8MB", shards=1)
    assert alone.files == ("model.safetensors",)
    assert not (tmp_path / "alone/model.safetensors.index.json").exists()


@untimed
@given(st.data())
def test_any_number_of_files_up_to_one_a_tensor_holds_all_tensors_in_order(small, data):
    tensors = [(tensor.name, tensor.shape) for tensor in small.tensors.values()]
    shards = data.draw(st.integers(1, len(tensors)))
    planned = plan_shards(small, files=shards).shards
    assert len(planned) == shards
    held = [tensor for shard in planned for tensor in shard.tensors]
    assert [(tensor.source.name, tensor.source.shape) for tensor in held] == tensors
    for shard in planned:
        assert shard.tensors[0].begin == 0
        assert all(a.begin + a.nbytes == b.begin for a, b in pairwise(shard.tensors))


# The same for everybody


def test_same_arguments_give_the_same_bytes_whatever_the_threads_and_tasks(small, tmp_path, monkeypatch):
    expected = folder_data(small.folder)
    for threads, task in ((1, 333_333), (5, 1 << 20)):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        monkeypatch.setattr(tasks, "TASK_BYTES", task)
        again = make_demo_checkpoint(tmp_path / str(threads), size="5MB")
        assert folder_data(again.folder) == expected


def test_tensors_do_not_depend_on_the_number_of_files(small, tmp_path):
    expected = tensor_data(small)
    for shards in (1, 7):
        made = make_demo_checkpoint(tmp_path / str(shards), size="5MB", shards=shards)
        assert len(made.files) == shards
        assert tensor_data(made) == expected


def test_another_seed_gives_other_weights(small, tmp_path):
    other = tensor_data(make_demo_checkpoint(tmp_path / "other", size="5MB", seed=1))
    for name, data in tensor_data(small).items():
        assert (data == other[name]) == ("norm" in name)


def test_no_two_drawn_tensors_begin_alike(small):
    begins = [data[:64] for name, data in tensor_data(small).items() if "norm" not in name]
    assert len(set(begins)) == len(begins)


# The tokenizer


@untimed
@given(st.text())
def test_tokenizer_spells_any_text(tokenizer, text):
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["Naïve Ünïcode — 日本語 🧩\n\t x  y ", " don ' t , do n't . ", "\x00\x7f"])
def test_tokenizer_keeps_spaces_and_non_ascii(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_tokenizer_has_learned_words_and_knows_its_special_tokens(small, tokenizer):
    assert tokenizer.is_fast
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer("shards").input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer(" The model is in the file").input_ids) < 10
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert -(-len(tokenizer) // 64) * 64 == small.config["vocab_size"]


def test_ids_above_the_tokenizer_decode_to_nothing(tokenizer):
    known = tokenizer("plate", add_special_tokens=False).input_ids
    assert tokenizer.decode([*known, len(tokenizer), 31_999]) == "plate"


# Memory


def test_memory_does_not_grow_with_the_size_and_torch_is_never_imported(tmp_path):
    small_peak, small_imports = make_in_child(tmp_path / "small", "40MB")
    large_peak, large_imports = make_in_child(tmp_path / "large", "300MB")
    shutil.rmtree(tmp_path / "large")
    assert abs(large_peak - small_peak) < 30_000_000
    assert large_peak < 150_000_000
    assert small_imports == large_imports == []


# Absent or whole


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "demo").mkdir()
    assert make_demo_checkpoint(tmp_path / "demo", size="5MB").config["model_type"] == "mistral"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_missing_parents_are_made(tmp_path):
    assert make_demo_checkpoint(tmp_path / "a/b/demo", size="5MB").folder == str(tmp_path / "a/b/demo")


def test_the_same_demo_is_returned_without_being_written_again(tmp_path):
    first = make_demo_checkpoint(tmp_path / "demo", size="5MB")
    before = {path.name: path.stat() for path in (tmp_path / "demo").iterdir()}
    assert make_demo_checkpoint(tmp_path / "demo", size=5_000_000) == first
    assert {path.name: path.stat() for path in (tmp_path / "demo").iterdir()} == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"size": "6MB"}, {"dtype": "float16"}, {"shards": 3}])
def test_another_demo_is_refused_and_left_alone(small, other):
    before = folder_data(small.folder)
    with pytest.raises(DestinationError, match="not the requested demo"):
        make_demo_checkpoint(small.folder, **{"size": "5MB", **other})
    assert folder_data(small.folder) == before


def test_a_folder_with_anything_else_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match="is not empty"):
        make_demo_checkpoint(tmp_path, size="5MB")
    assert folder_data(tmp_path) == {"notes.txt": b"mine"}


def test_a_damaged_demo_is_not_reused(tmp_path):
    made = make_demo_checkpoint(tmp_path / "demo", size="5MB")
    os.truncate(made.path(made.files[0]), 1_000_000)
    with pytest.raises(DestinationError):
        make_demo_checkpoint(tmp_path / "demo", size="5MB")


def test_a_resharded_or_cast_copy_that_carries_the_record_is_not_taken_for_the_demo(small, tmp_path):
    made = make_demo_checkpoint(tmp_path / "demo", size="5MB", shards=3)
    made.config["shardkit_demo"]["shards"] = 2
    (tmp_path / "demo/config.json").write_text(json.dumps(made.config))
    with pytest.raises(DestinationError):
        make_demo_checkpoint(tmp_path / "demo", size="5MB", shards=2)
    shard_checkpoint(small, tmp_path / "cast", files=2, dtype="float16", verify=False)
    with pytest.raises(DestinationError):
        make_demo_checkpoint(tmp_path / "cast", size="5MB")


def test_a_file_is_refused(tmp_path, small):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file/demo", small.path(small.files[0])):
        with pytest.raises(DestinationError):
            make_demo_checkpoint(folder, size="5MB")


@pytest.mark.parametrize("arguments", [{"dtype": "int8"}, {"shards": 0}, {"shards": 10_000}, {"seed": -1}])
def test_arguments_that_make_no_demo_are_refused_before_anything_is_written(tmp_path, arguments):
    with pytest.raises(PlanError, match=r"int8|shards=|-1"):
        make_demo_checkpoint(tmp_path / "demo", size="5MB", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 123_456, 123_456))
    needed = demo_shape("512MB").parameters * 2
    with pytest.raises(SpaceError, match=r"needs 5\d\d,\d\d\d,\d\d\d bytes.*123,456") as caught:
        make_demo_checkpoint(tmp_path / "demo", size="512MB")
    assert needed <= int(str(caught.value).split("needs ")[1].split()[0].replace(",", "")) < needed * 1.01
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cause", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.EIO, "input/output error"), CheckpointError)],
)
def test_a_write_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch, cause, seen):
    def cut(*_):
        assert list(tmp_path.iterdir()), "the staging folder is there by now"
        raise cause

    monkeypatch.setattr(demo.DemoFiles, "_drawn", cut)
    with pytest.raises(seen):
        make_demo_checkpoint(tmp_path / "demo", size="5MB")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_was_cut_short_is_resumed_by_the_same_call(small, tmp_path, monkeypatch):
    real, failed, drawn = demo.DemoFiles._drawn, [], set()

    def cut(files, name, start):
        if name == "lm_head.weight" and not failed:
            failed.append(name)
            raise OSError(errno.EIO, "input/output error")
        if failed:
            drawn.add(name)
        return real(files, name, start)

    monkeypatch.setattr(demo.DemoFiles, "_drawn", cut)
    with pytest.raises(CheckpointError) as caught:
        make_demo_checkpoint(tmp_path / "demo", size="5MB")
    assert "run again to resume" in caught.value.__notes__[0]
    assert not (tmp_path / "demo").exists()
    made = make_demo_checkpoint(tmp_path / "demo", size="5MB")
    assert drawn == {name for name, tensor in small.tensors.items() if tensor.file == small.files[1]}
    assert folder_data(made.folder) == folder_data(small.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_that_another_process_filled_meanwhile_is_left_alone(tmp_path, monkeypatch):
    def fetched(self, name):
        (tmp_path / "demo").mkdir(exist_ok=True)
        (tmp_path / "demo/notes.txt").write_text("theirs")
        return self._beside / name

    monkeypatch.setattr(demo.DemoFiles, "fetched", fetched)
    with pytest.raises(DestinationError, match="already exists and is not empty"):
        make_demo_checkpoint(tmp_path / "demo", size="5MB")
    assert folder_data(tmp_path / "demo") == {"notes.txt": b"theirs"}


def test_it_opens_as_a_checkpoint_of_the_size_asked(small):
    opened = Checkpoint.open(small.folder)
    assert opened == small
    assert opened.total_bytes == pytest.approx(5_000_000, rel=0.03)
    assert opened.dtypes == {"BF16": opened.total_bytes}
    assert set(opened.side_files) >= {"README.md", "generation_config.json", "tokenizer.json"}
