"""The GGUF file format, of llama.cpp: what a file says of its model, and which tensors it holds.

It is read to say what a load takes: a magic, counts, keys with values, then name, shape, type and offset of
each tensor, and last their bytes: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from shardkit.base.errors import CheckpointError
from shardkit.formats.ranged import RangedFile
from shardkit.formats.safetensors import check_name, refuse_lfs_pointer
from shardkit.formats.tensor import TensorInfo, collector_paused

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the first counted in 32 bits
_MAX_HEADER_BYTES = 50_000_000  # vocabulary and merges of 500,000 tokens have 20 MB
_MAX_KEYS, _MAX_TENSORS = 10_000, 200_000
_AT_ONCE = 1 << 20
_MAX_DIMENSIONS = 8
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KEPT_NUMBERS = 10_000  # of an array: one for each layer
# Of each type that is no longer taken out: its name, elements of a block, and bytes of one.
# fmt: off
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}
BLOCK_BITS = {name: 8 * nbytes / elements for name, elements, nbytes in _TYPES.values()}  # bits of an element
# What a model's numbers are called behind the name of its architecture, and in a config of transformers.
_NAMES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "tokenizer.ggml.tokens": "vocab_size",
}
# fmt: on


class GgufFile(NamedTuple):
    """What a file holds, and the numbers of its model under the names that transformers' configs have."""

    tensors: tuple[TensorInfo, ...]
    config: dict[str, Any]


def read_gguf(file: RangedFile, name: str) -> GgufFile:
    """List the tensors of a file, without reading them."""
    refuse_lfs_pointer(file.get(0, min(file.size, 24)), file.where)
    header = _Header(file)
    if header.take(4) != MAGIC:
        raise CheckpointError("is not a GGUF file", file=file.where)
    if (version := header.number("I")) not in _VERSIONS:
        raise CheckpointError(f"is GGUF of version {version}, not of 2 or 3, or big-endian", file=file.where)
    count, keys = header.number("Q"), header.number("Q")
    if count > _MAX_TENSORS or keys > _MAX_KEYS:
        raise CheckpointError(f"claims {count:,} tensors and {keys:,} keys: it is damaged", file=file.where)
    with collector_paused():
        said = dict(header.pair() for _ in range(keys))
        entries = [header.entry() for _ in range(count)]
    alignment = said.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"declares an alignment of {alignment!r:.40} bytes", file=file.where)
    start = -(-header.at // alignment) * alignment
    tensors = tuple(_tensor(file, name, start, *entry) for entry in entries)
    return GgufFile(tensors, _config(said))


class _Header:
    """Reads values one after another; each comes from what was read at once."""

    def __init__(self, file: RangedFile) -> None:
        self.at = 0
        self._file, self._start, self._read = file, 0, b""

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        if nbytes > _MAX_HEADER_BYTES - self.at:
            raise CheckpointError(
                f"has a header of more than {_MAX_HEADER_BYTES:,} bytes, or is damaged", file=self._file.where
            )
        begin = self.at - self._start
        if begin + nbytes > len(self._read):
            left = self._file.size - self.at
            self._read = self._file.get(self.at, max(nbytes, min(_AT_ONCE, left)))
            self._start, begin = self.at, 0
        self.at += nbytes
        return self._read[begin : begin + nbytes]

    def number(self, code: str) -> Any:
        """Return the next number, of a code of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """Return the next string; half a character in it is replaced."""
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def pair(self) -> tuple[str, Any]:
        """Return the next key and its value; None in place of one that nobody asks for."""
        key, value = self.text(), self.value()
        is_wanted = key.startswith("general.a") or key.endswith(tuple(_NAMES))
        return key, value if is_wanted else None

    def value(self) -> Any:
        """Return the next value with its type; of strings, and of many numbers, how many."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        return self.number(self._code(kind))

    def _array(self, kind: int, count: int) -> list[Any] | int:
        if kind == _STRING:
            for _ in range(count):
                self.take(self.number("Q"))
            return count
        code = self._code(kind)
        raw = self.take(count * struct.calcsize(f"<{code}"))
        return list(struct.unpack(f"<{count}{code}", raw)) if count <= _KEPT_NUMBERS else count

    def _code(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise CheckpointError(f"has a value of unknown type {kind}", file=self._file.where)
        return _NUMBERS[kind]

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of the next tensor; its last dimension is written first."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise CheckpointError(f"has {dimensions} dimensions", file=self._file.where, tensor=name[:200])
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _tensor(
    file: RangedFile, file_name: str, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> TensorInfo:
    check_name(name, file.where)
    if kind not in _TYPES:
        raise CheckpointError(f"has unknown type {kind}", file=file.where, tensor=name)
    dtype, elements, nbytes = _TYPES[kind]
    size = prod(shape) // elements * nbytes
    if start + offset + size > file.size:
        raise CheckpointError(
            f"has {file.size:,} bytes, but its tensors extend to byte {start + offset + size:,}: the file "
            "may be incomplete",
            file=file.where,
            tensor=name,
        )
    return TensorInfo(name, dtype, shape, file_name, start + offset, size)


def _config(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of its model; of a number for each layer, the largest."""
    kind = str(said.get("general.architecture", "unknown"))[:100]
    config: dict[str, Any] = {"architectures": [kind], "model_type": kind, "dtype": "float32"}
    config["quantization_config"] = {"quant_method": "gguf"}
    for name, called in _NAMES.items():
        value = said.get(f"{kind}.{name}", said.get(name))
        value = max(value, default=None) if isinstance(value, list) else value
        if type(value) is int:
            config[called] = value
    return config
