"""The shapes of demo models: those of Mistral-7B and falcon-7b, and smaller ones of the same proportions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import ml_dtypes
import numpy as np

from shardkit.base.errors import PlanError, SizeError, misspelled
from shardkit.base.sizes import format_size, parse_size
from shardkit.formats.tensor import dtype_name

Architecture = Literal["mistral", "falcon"]

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_SMALLEST_BYTES = 5_000_000
# Mistral-7B has 7,241,732,096 and falcon-7b 7,217,189,760: rounded as people do, 14.5 GB in bfloat16.
_LARGEST_PARAMETERS = 7_250_000_000
_WIDTHS = (4096, 3072, 2048, 1536, 1024, 512, 256, 192, 128, 96)
_FALCON_WIDTHS = range(4544, 0, -64)  # of whole heads, each 64 wide
_FALCON_LAYERS = 32
_FEWEST_LAYERS = 7  # a true width of fewer could miss a size by more than 6%
_TRUE_VOCAB_FROM = 200_000_000  # parameters; below, its two tables would be most of the model
_SMALL_VOCAB = 960  # the 936 tokens of the tokenizer, rounded up to a multiple of 64


@dataclass(frozen=True, slots=True)
class DemoShape:
    """The shape of a Mistral model; the other dimensions follow from these as in the original."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int

    @property
    def heads(self) -> int:
        """Number of attention heads, each 128 wide but in the small widths; a quarter as many for keys."""
        return max(4, self.hidden // 128)

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(prod(shape) for _, shape in self.tensors())

    @property
    def config(self) -> dict[str, Any]:
        """What of the model's config depends on its size."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads // 4,
            "num_hidden_layers": self.layers, "vocab_size": self.vocab,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each tensor, in the order of the model."""
        hidden, inner, keys = self.hidden, self.intermediate, self.hidden // 4
        layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for number in range(self.layers):
            for name, shape in layer.items():
                yield f"model.layers.{number}.{name}.weight", shape
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)

    def drawn_as(self, tensor: str) -> str | float:
        """Return the tensor whose name seeds this one's values, or the one value that fills it."""
        return 1.0 if "norm" in tensor else tensor


@dataclass(frozen=True, slots=True)
class FalconShape(DemoShape):
    """The shape of a falcon model: queries, keys and values in one matrix, one head for the latter two.

    The head is stored beside the embedding that it is tied to, as on the Hub.
    """

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.hidden // 64

    @property
    def config(self) -> dict[str, Any]:
        """What of the model's config depends on its size, and what is falcon's own."""
        return {
            "bos_token_id": 1, "eos_token_id": 2,  # of the tokenizer
            "architectures": ["FalconForCausalLM"], "model_type": "falcon",
            "hidden_size": self.hidden, "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers, "vocab_size": self.vocab,
            "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
            "alibi": False, "bias": False, "layer_norm_epsilon": 1e-05, "tie_word_embeddings": True,
            "attention_dropout": 0.0, "hidden_dropout": 0.0,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each tensor, in the order of the model."""
        hidden, inner = self.hidden, self.intermediate
        layer = {
            "self_attention.query_key_value.weight": (hidden + 2 * 64, hidden),
            "self_attention.dense.weight": (hidden, hidden),
            "mlp.dense_h_to_4h.weight": (inner, hidden), "mlp.dense_4h_to_h.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,), "input_layernorm.bias": (hidden,),
        }  # fmt: skip
        yield "transformer.word_embeddings.weight", (self.vocab, hidden)
        for number in range(self.layers):
            for name, shape in layer.items():
                yield f"transformer.h.{number}.{name}", shape
        yield from (("transformer.ln_f.weight", (hidden,)), ("transformer.ln_f.bias", (hidden,)))
        yield "lm_head.weight", (self.vocab, hidden)

    def drawn_as(self, tensor: str) -> str | float:
        """Return the tensor whose name seeds this one's values, or the one value that fills it."""
        if tensor == "lm_head.weight":
            return "transformer.word_embeddings.weight"
        is_norm = "ln_f" in tensor or "layernorm" in tensor
        return float(tensor.endswith("weight")) if is_norm else tensor


def demo_shape(size: int | str, dtype: str = "bfloat16", architecture: Architecture = "mistral") -> DemoShape:
    """Return the shape of the demo whose weights take about `size` bytes in `dtype`.

    The widest model of seven layers or more is chosen. Mistral's true width keeps the original's
    `intermediate`, only its layers vary; narrower models tune theirs to meet the size. A falcon's is four
    times its width, so the largest width is taken that meets the size within 2% with some number of layers.
    """
    dtype = dtype_name(dtype)
    if architecture not in _SHAPES:
        raise PlanError(misspelled("architecture", architecture, _SHAPES))
    asked, itemsize = parse_size(size), np.dtype(DTYPES[dtype]).itemsize
    largest = _LARGEST_PARAMETERS * itemsize
    if not _SMALLEST_BYTES <= asked <= largest:
        raise SizeError(
            f"size {size!r} is {asked:,} bytes: a demo in {dtype} can have from {_SMALLEST_BYTES:,} "
            f"({format_size(_SMALLEST_BYTES)}) to {largest:,} ({format_size(largest)})"
        )
    return _SHAPES[architecture](asked / itemsize)


def _mistral(wanted: float) -> DemoShape:
    vocab = 32_000 if wanted >= _TRUE_VOCAB_FROM else _SMALL_VOCAB
    for hidden in _WIDTHS:
        outside, one = (DemoShape(hidden, hidden * 7 // 2, layers, vocab).parameters for layers in (0, 1))
        layers = (wanted - outside) / (one - outside)
        if layers >= _FEWEST_LAYERS:
            break
    whole = DemoShape(hidden, hidden * 7 // 2, round(layers), vocab)
    if hidden == _WIDTHS[0]:
        return whole
    # By so much is `intermediate` too large: it is a side of three matrices in each layer.
    excess = (whole.parameters - wanted) / (3 * hidden * whole.layers)
    return replace(whole, intermediate=round((whole.intermediate - excess) / 16) * 16)


def _falcon(wanted: float) -> DemoShape:
    vocab = 65_024 if wanted >= _TRUE_VOCAB_FROM else _SMALL_VOCAB
    shapes = []
    for hidden in _FALCON_WIDTHS:
        outside, one = (FalconShape(hidden, 4 * hidden, layers, vocab).parameters for layers in (0, 1))
        layers = round((wanted - outside) / (one - outside))
        shape = FalconShape(hidden, 4 * hidden, max(_FEWEST_LAYERS, min(layers, _FALCON_LAYERS)), vocab)
        shapes.append((abs(shape.parameters / wanted - 1), shape))
    close = (shape for miss, shape in shapes if miss <= _CLOSE)
    return next(close, min(shapes, key=lambda one: one[0])[1])


_SHAPES = {"mistral": _mistral, "falcon": _falcon}
_CLOSE = 0.02  # of a size that is met
