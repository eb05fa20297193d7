"""What headers say of a load's memory, against loads that were measured."""

import dataclasses

import pytest

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
        estimate_load("t5", stored, dtype, model_type="t5").copied_bytes for dtype in ("float16", "float32")
    ]
    assert copied == [4 * 1000 + 2 * 10, 4 * 1010]
    assert estimate_load("t5", stored, "bfloat16", model_type="t5").copied_bytes == 0


def test_experts_are_stacked_in_memory_whatever_their_dtype():
    found = estimate_load("moe", [StoredTensor("layers.0.mlp.experts.3.w1.weight", 1000, "BF16")], None)
    assert (found.copied_bytes, found.mapped_bytes) == (2000, 0)
    assert "stacks the experts" in str(found)


def test_shards_in_the_dtype_asked_for_are_mapped_and_not_copied(model):
    as_is, sharded = model.estimate("float16"), plan_shards(model, dtype="float16").estimate()
    assert as_is.copied_bytes == sharded.mapped_bytes == model.total_bytes
    assert as_is.mapped_bytes == sharded.copied_bytes == 0


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
