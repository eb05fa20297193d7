"""Quantized weights are known by their tensors, whoever wrote them; ordinary integers are no such thing."""

from typing import Any

import pytest

from shardkit import Checkpoint, plan_shards
from shardkit.errors import PlanError
from tests.test_plan import checkpoint as unwritten

Made = dict[str, tuple[str, tuple[int, ...]]]


def checkpoint(tensors: Made, config: dict[str, Any] | None = None) -> Checkpoint:
    return unwritten(((name, *how) for name, how in tensors.items()), config)


def under(module: str, tensors: str) -> Made:
    """Tensors as they are written down below: name, dtype and shape of each."""
    made = (tensor.split() for tensor in tensors.split(", "))
    return {
        module + name: (dtype, tuple(int(n) for n in shape.split("x") if n != "scalar"))
        for name, dtype, shape in made
    }


LINEAR = {
    "GPTQ": "qweight I32 4x32, qzeros I32 1x4, scales F16 1x32, g_idx I32 32",
    "AWQ": "qweight I32 32x4, qzeros I32 1x4, scales F16 1x32, bias F16 32",
    "Marlin": "B I32 2x64, s F16 1x32",
    "MLX": "weight U32 4x32, scales BF16 4x1, biases BF16 4x1",
    "compressed-tensors, packed": "weight_packed I32 4x32, weight_scale F16 32x1, weight_shape I64 2",
    "compressed-tensors, int8": "weight I8 32x32, weight_scale BF16 32x1",
    "compressed-tensors, NVFP4": "weight_packed U8 32x16, weight_scale F8_E4M3 32x2, "
    "weight_global_scale F32 1",
    "bitsandbytes, 4 bits": "weight U8 512x1, weight.absmax F32 16, "
    "weight.quant_map F32 16, weight.quant_state.bitsandbytes__nf4 U8 38",
    "bitsandbytes, 4 bits stored as bfloat16": "weight BF16 256x1, weight.absmax U8 16, "
    "weight.quant_map F32 16, weight.quant_state.bitsandbytes__nf4 U8 38",
    "bitsandbytes, 8 bits": "weight I8 32x32, SCB F32 32, weight_format U8 scalar",
    "FP8": "weight F8_E4M3 32x32, weight_scale_inv F32 1x1",
    "FP8 of two bits of fraction": "weight F8_E5M2 32x32",
    "FP6": "weight F6_E2M3 32x32",
    "FP4": "weight F4 32x32",
    "MXFP4": "down_proj_blocks U8 2x32x1x16, down_proj_scales U8 2x32x1, down_proj_bias BF16 2x32",
    "HQQ": "W_q U8 16x32, scale F16 32x1, zero F16 32x1",
    "EETQ": "weight I8 32x32, weight_scales F16 32",
    "torchao": "weight:qdata I8 32x32, weight:scale BF16 32x1",
    "GGUF's blocks": "weight U8 32x18",
    "BitNet": "weight U8 8x32, weight_scale BF16 1",
    "AQLM": "codes I8 32x4x1, codebooks F16 1x256x1x8, scales F16 32x1x1x1",
    "quanto": "weight._data I8 32x32, weight._scale F32 32x1, input_scale F32 scalar",
    "SpQR": "dense_weights I64 99, row_offsets I32 33, col_vals I32 9, in_perm U16 32",
    "VPTQ": "indices I16 1x4x8, centroids.weight F16 1x64, weight_scale F16 32, weight_bias F16 32",
    "EXL2": "q_weight I32 4x32, q_scale I32 1x4, q_scale_max F16 1, q_invperm I16 32",
    "EXL3": "trellis I16 2x2x64, suh F16 32, svh F16 32",
    "QuIP#": "Qidxs I64 32x4, SU F16 32, SV F16 32, Wscale F32 scalar",
    "experts in one tensor": "gate_up_proj I8 2x32x32, gate_up_proj_scale F32 2x32x1",
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("module", ["", "model.layers.0.mlp.down_proj."])
def test_cast_of_quantized_tensors_is_refused_without_a_word_in_the_config(kind: str, module: str) -> None:
    tensors = {"embed.weight": ("BF16", (64, 32)), **under(module, LINEAR[kind])}
    source = checkpoint(tensors, {"model_type": "llama"})
    for dtype in ("float16", "bfloat16", "float32"):
        with pytest.raises(PlanError, match=r"^/source: .*quantized.*leave out dtype") as caught:
            plan_shards(source, dtype=dtype)
        assert any(repr(name) in str(caught.value) for name in tensors)
    assert len(plan_shards(source).shards) == 1  # as it is, it can be sharded


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"parts": [{"llm_quantization_config": {"bits": 4}}]}, "llm_quantization_config"),
    ],
)
def test_config_that_says_so_is_believed(config: dict[str, Any], method: str) -> None:
    with pytest.raises(PlanError, match=rf"quantized \({method}\)"):
        plan_shards(checkpoint({"weight": ("F16", (8, 8))}, config), dtype="float32")


ORDINARY = {
    "position_ids": "position_ids I64 1x64, weight F32 32x32, scale F32 32",
    "position_ids of 32 bits": "position_ids I32 1x64, scale F32 32",
    "batch norm": "weight F32 32, bias F32 32, running_mean F32 32, num_batches_tracked I64 scalar",
    "Swin": "relative_position_index I64 49x49, relative_position_bias_table F32 32x32, logit_scale F32 32",
    "Swin of 32 bits": "relative_position_index I32 49x49, scale F32 32",
    "GPT-2's mask": "bias U8 1x1x64x64, masked_bias F32 scalar, scale F32 32",
    "a mask of booleans": "causal BOOL 64x64, scale F32 32",
    "scale beside a weight": "weight F32 32x32, scale F32 32, scales F32 32, weight_scale F32 32",
    "weights and an integer table": "weight F32 32x32, scales F32 32, lookup I32 8x8",
    "CLIP": "logit_scale F32 scalar, visual.weight F32 32x32, pairs I32 2x2",
    "a codec": "codebook.embed F32 32x32, codebook.cluster_size F32 32, levels I32 4, scale F32 32",
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_integers_and_scales_are_no_quantized_weights(kind: str) -> None:
    tensors = under("layers.0.attn.", ORDINARY[kind])
    config = {"codec_config": {"vector_quantization_config": {"bins": 8}}, "quantization_config": {}}
    plan = plan_shards(checkpoint(tensors, config), dtype="float16")
    assert {t.source.name for t in plan.shards[0].tensors if t.is_cast} == {
        name for name, (dtype, _) in tensors.items() if dtype == "F32"
    }


def test_config_can_say_that_integers_are_not_quantized_weights() -> None:
    tensors = under("tree.", "nodes I32 9x9, scale F32 9")
    with pytest.raises(PlanError, match="set quantization_config to null"):
        plan_shards(checkpoint(tensors), dtype="float16")
    assert plan_shards(checkpoint(tensors, {"quantization_config": None}), dtype="float16").total_bytes


@pytest.mark.parametrize("kind", ["FP8", "bitsandbytes, 4 bits stored as bfloat16"])
def test_what_no_other_tensor_looks_like_is_quantized_whatever_the_config_says(kind: str) -> None:
    with pytest.raises(PlanError, match="quantized"):
        plan_shards(checkpoint(under("", LINEAR[kind]), {"quantization_config": None}), dtype="float16")
