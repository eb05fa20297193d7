"""What headers say of a load's memory, against loads that were measured."""

import dataclasses

import pytest
import torch

from shardkit import Checkpoint, PlanError, make_demo_checkpoint, measure_load, plan_shards
from shardkit.estimate import StoredTensor, estimate_load, fit


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Checkpoint:
    return make_demo_checkpoint(tmp_path_factory.mktemp("estimate") / "model", size="300MB")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_estimate_is_within_5_percent_of_a_measured_load(model, dtype):
    measured = measure_load(model.source, dtype=dtype, cache="warm")
    predicted = model.estimate(dtype).peak_anonymous_bytes
    assert measured.ok, measured.reason
    assert predicted == pytest.approx(measured.peak_anonymous_bytes, rel=0.05)


def test_what_transformers_keeps_in_float32_counts_as_that():
    stored = [
        StoredTensor("block.0.DenseReluDense.wo.weight", 1000, "BF16"),
        StoredTensor("q.weight", 10, "BF16"),
    ]
    copied = [
        estimate_load("t5", stored, dtype, config={"model_type": "t5"}).copied_bytes
        for dtype in ("float16", "float32")
    ]
    assert copied == [4 * 1000 + 2 * 10, 4 * 1010]
    assert estimate_load("t5", stored, "bfloat16", config={"model_type": "t5"}).copied_bytes == 0


def test_experts_are_stacked_in_memory_whatever_their_dtype():
    stored = [StoredTensor("layers.0.mlp.experts.3.w1.weight", 1000, "BF16")]
    as_is, cast = (estimate_load("moe", stored, dtype) for dtype in (None, "float32"))
    assert (as_is.copied_bytes, as_is.stacking_bytes, as_is.mapped_bytes) == (2000, 500, 0)
    assert (cast.copied_bytes, cast.stacking_bytes) == (4000, 4000)
    assert "4 KB while experts are stacked" in str(cast)


def test_where_the_config_says_nothing_the_first_floats_dtype_is_everybodys(model):
    tensors = {name: dataclasses.replace(t, dtype="F32") for name, t in model.tensors.items()}
    first = next(iter(tensors))
    tensors[first] = dataclasses.replace(tensors[first], dtype="BF16")
    mixed = dataclasses.replace(model, config=None, tensors=tensors)
    assert mixed.estimate().copied_bytes == 2 * sum(t.elements for t in list(tensors.values())[1:])


def test_shards_in_the_dtype_asked_for_are_mapped_and_not_copied(model):
    as_is, sharded = (
        model.estimate("float16"),
        plan_shards(model, dtype="float16").estimate("float16", config=None),
    )
    assert as_is.copied_bytes == sharded.mapped_bytes == model.total_bytes
    assert as_is.mapped_bytes == sharded.copied_bytes == 0


def test_tied_tensors_of_a_pickle_are_converted_one_by_one(tmp_path):
    weights = torch.zeros(100, 10)
    torch.save({"a": weights, "b": weights, "c": torch.zeros(7)}, tmp_path / "pytorch_model.bin")
    tied = Checkpoint.open(tmp_path)
    assert len(tied.aliases) == 1
    assert tied.estimate("float16").copied_bytes == 2 * (2 * 1000 + 7)
    assert tied.estimate("float16").mapped_bytes == 0
    assert tied.estimate("float32").mapped_bytes == 4 * (1000 + 7)


def test_a_plan_knows_of_the_model_what_its_config_says(model):
    config = {**model.config, "quantization_config": {"quant_method": "mxfp4"}}
    assert plan_shards(model).estimate(None, config=model.config).hosts
    assert not plan_shards(model).estimate(None, config=config).hosts


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_what_the_config_says_decides_where_no_dtype_is_asked_for(model, dtype):
    says_float32 = dataclasses.replace(model, config={**model.config, "dtype": "float32"})
    assert model.estimate(dtype).copied_bytes == 0
    assert says_float32.estimate(dtype).copied_bytes == 2 * model.total_bytes


def test_an_unknown_dtype_is_refused(model):
    with pytest.raises(PlanError, match="int3"):
        model.estimate("int3")


def test_a_host_fits_all_of_it_or_only_what_must_exist_or_neither():
    gigabyte = 10**9
    verdicts = [
        fit("host", 10 * gigabyte, a * gigabyte, m * gigabyte).verdict for a, m in [(4, 4), (4, 8), (10, 0)]
    ]
    assert verdicts == ["fits", "fits tightly", "does not fit"]


def test_the_summary_names_every_host(model):
    shown = str(model.estimate("float16"))
    assert all(host in shown for host in ("this machine", "Colab", "Kaggle", "Binder"))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"quantization_config": {"quant_method": "mxfp4"}}, "U8"), ({}, "F8_E4M3")],
    ids=["config", "dtype"],
)
def test_of_quantised_weights_no_host_is_promised(config, dtype):
    found = estimate_load("q", [StoredTensor("w", 1000, dtype)], None, config=config)
    assert found.hosts == ()
    assert "quantised (" in str(found)
    assert "this is the least" in str(found)
    assert "at least 268 MB (memory that must exist)" in str(found)


def test_stacked_experts_that_are_turned_are_copied():
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 64}}
    stored = [
        StoredTensor("model.layers.0.mlp.experts.gate_up_proj", 4 * 64 * 96, "BF16", (4, 64, 96)),
        StoredTensor("model.layers.0.mlp.experts.down_proj", 4 * 48 * 64, "BF16", (4, 48, 64)),
        StoredTensor("model.layers.0.q_proj.weight", 64 * 64, "BF16", (64, 64)),
    ]
    turned = estimate_load("moe", stored, None, config=config)
    assert turned.copied_bytes == 2 * 4 * 64 * (96 + 48)
    assert turned.stacking_bytes == 2 * 4 * 64 * 96
    assert turned.mapped_bytes == 2 * 64 * 64
    straight = [StoredTensor("model.layers.0.mlp.experts.gate_up_proj", 4 * 64 * 96, "BF16", (4, 96, 64))]
    assert estimate_load("moe", straight, None, config=config).copied_bytes == 0
