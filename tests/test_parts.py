"""Names of tensors say what part of a model they belong to."""

import pytest

from shardkit.checkpoint.parts import BLOCK, EMBEDDING, HEAD, Part, is_single_expert, part_of


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.embed_tokens.weight", Part(EMBEDDING)),
        ("transformer.wte.weight", Part(EMBEDDING)),
        ("shared.weight", Part(EMBEDDING)),
        ("model.layers.10.self_attn.q_proj.weight", Part(BLOCK, "model.layers", 10)),
        ("h.0.attn.c_attn.weight", Part(BLOCK, "h", 0)),
        ("0.weight", Part(BLOCK, "", 0)),
        ("encoder.block.1.layer.0.rel_pos_embed", Part(BLOCK, "encoder.block", 1)),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", Part(BLOCK, "model.layers", 1)),
        ("model.norm.weight", Part(HEAD)),
        ("lm_head.weight", Part(HEAD)),
        ("embed_out.weight", Part(HEAD)),
        (f"x.{'9' * 5000}.y", Part(HEAD)),
    ],
)
def test_a_block_is_known_by_the_first_number_in_a_name(tensor: str, part: Part) -> None:
    assert part_of(tensor) == part


def test_parts_sort_in_the_order_of_a_forward_pass() -> None:
    names = ["norm.weight", "layers.10.w", "embed.weight", "layers.2.w"]
    assert sorted(names, key=part_of) == ["embed.weight", "layers.2.w", "layers.10.w", "norm.weight"]


def test_experts_are_told_from_the_stack_that_holds_them() -> None:
    assert is_single_expert("model.layers.0.mlp.experts.3.up_proj.weight")
    assert not is_single_expert("model.layers.0.mlp.experts.gate_up_proj")
