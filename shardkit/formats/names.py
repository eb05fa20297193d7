"""File names of weights, as frameworks and the Hub have them."""

from __future__ import annotations

import re

_INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|tflite)")
# As torch.distributed.checkpoint calls what each rank wrote.
_OF_RANK = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def is_of_rank(name: str) -> bool:
    """Whether a file name is that of the weights of one rank, which has pieces of tensors."""
    return _OF_RANK.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """Whether a file name is that of an index: ``model.safetensors.index.json``."""
    return _INDEX.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file name is that of weights, in any format, or of their index."""
    return _WEIGHTS.fullmatch(name) is not None or is_index(name)
