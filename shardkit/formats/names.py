"""File names of weights, as frameworks and the Hub have them."""

from __future__ import annotations

import re

_INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|tflite)")


def is_index(name: str) -> bool:
    """Whether a file name is that of an index: ``model.safetensors.index.json``."""
    return _INDEX.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file name is that of weights, in any format, or of their index."""
    return _WEIGHTS.fullmatch(name) is not None or is_index(name)
