"""Whether weights are quantized: by what a config says, and by what is in the files.

Quantized weights are integers, often packed, that mean nothing without their scales; a cast would round the
scales and pass for success. Many tools write no config at all, so the tensors have to speak for themselves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from shardkit.checkpoint.config import parts_of
from shardkit.checkpoint.loaded import LoadedTensor
from shardkit.formats.tensor import DTYPE_NAMES, QUANTIZED_DTYPES, TensorInfo


class Packing(NamedTuple):
    """How a method packs weights, and what unpacking takes.

    Dtypes and names of packed tensors; weights in a byte; the compute capability of GPUs that need not unpack
    them, None if all have to; bytes beside each of the largest tensor's while it is unpacked; and between how
    many percent below and above what is estimated small models' peaks were measured.
    """

    dtypes: re.Pattern[str]
    names: re.Pattern[str]
    per_byte: int
    capability: float | None
    scratch: int
    below: int
    above: int

    def packs(self, tensor: TensorInfo) -> bool:
        """Whether a tensor holds packed weights."""
        return bool(self.dtypes.match(tensor.dtype) and self.names.search(tensor.name))

    @property
    def spread(self) -> str:
        """How far off the estimate may be, in words."""
        return f"peaks of small models were {self.below} % below to {self.above} % above"

    def spare_bytes(self, tensors: Iterable[TensorInfo]) -> int:
        """Return what a load holds beside unpacked weights: packed ones, and what unpacking takes."""
        packed = [tensor.nbytes for tensor in tensors if self.packs(tensor)]
        return sum(packed) + self.scratch * max(packed, default=0)


# transformers, MLX ("quantization"), AutoAWQ, compressed-tensors; of codecs, a vector quantizer is a layer.
_SETTINGS = re.compile(r"(?!.*vector).*quant(ization|ize)?_config|quantization|compression_config")
_BITSANDBYTES = re.compile(r"\.quant_(map$|state\.)")
_WEIGHT = re.compile(r"q?weight|weight_(packed|q)|W_q|codes|dense_weights|trellis|Qidxs")
_SCALE = re.compile(r"(?<!logit_)(?<!layer_)scale|absmax|^s$|codebooks")
# Methods whose weights transformers 5.23 turns into bfloat16 where its kernels do not run, as on processors.
_UNPACKED = {
    "fp8": Packing(re.compile(r"F8_"), re.compile(""), 1, 8.9, 0, 10, 10),
    "mxfp4": Packing(re.compile("U8"), re.compile(r"_blocks$"), 2, 7.5, 17, 10, 10),
    "compressed-tensors": Packing(
        re.compile("I8|I32|U8|F8_"), re.compile(r"weight(_packed)?$"), 1, None, 0, 15, 40
    ),
}
# Methods whose library computes with weights as they are stored, and what of those it copies: all in 4 bits
# (bitsandbytes 0.50), nothing (torchao 0.18).
HELD = {
    "bitsandbytes": Packing(re.compile("U8"), re.compile(r"weight$"), 2, None, 12, 0, 20),
    "torchao": Packing(re.compile("(?!)"), re.compile(""), 1, None, 0, 0, 10),
}
# What ordinary modules keep as integers: position_ids, relative_position_index, masks ("bias" in GPT-2).
_BUFFER = re.compile(r"(^|_)(ids?|idx|index|mask|bias|tracked|positions?|map|table|shape)$|scale")
_PACKED_DTYPES = ("I8", "U8", "I16", "U16", "I32", "U32")
_INTEGER_DTYPES = (*_PACKED_DTYPES, "I64", "U64")


def method_of(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str | None:
    """Return how weights are quantized, as the config says, or a dtype that stands for it; None if not."""
    found = (DTYPE_NAMES[tensor.dtype] for tensor in tensors if tensor.dtype in QUANTIZED_DTYPES)
    return quantization(config) or next(found, None)


def packing_of(config: Mapping[str, Any], method: str | None) -> Packing | None:
    """Return how a method packs weights that a processor has to unpack; None of others."""
    if (packing := _UNPACKED.get(method or "")) is None or method != "compressed-tensors":
        return packing
    return packing._replace(per_byte=8 // min(_bits(config), default=8))


def _bits(value: Any) -> Iterator[int]:
    """Yield the bits of a weight that a config states, of each group of them."""
    for key, part in value.items() if isinstance(value, dict) else ():
        bits = part.get("num_bits") if key == "weights" and isinstance(part, dict) else None
        yield from (bits,) if type(bits) is int and 0 < bits <= 8 else _bits(part)


def unpacked(tensor: LoadedTensor, packing: Packing | None) -> LoadedTensor:
    """Return a tensor as it is loaded where no kernel runs its method: packed weights in 16 bits."""
    if packing is None or not packing.packs(tensor.stored):
        return tensor
    return tensor._replace(converted="bfloat16", nbytes=2 * packing.per_byte * tensor.stored.nbytes)


def quantization(config: Any) -> str | None:
    """Return how the weights are quantized, as a config, or one nested in it, says; None if they are not."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict) and value and _SETTINGS.fullmatch(key):
            return str(value.get("quant_method", key))
    return next(filter(None, map(quantization, parts_of(config))), None)


def quantized(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return what shows that weights are quantized, as the beginning of an error; None if nothing does."""
    config = config or {}
    if method := quantization(config):
        return f"the config marks the weights as quantized ({method})"
    for name, tensor in tensors.items():
        if tensor.dtype in QUANTIZED_DTYPES:
            return f"tensor {name!r} is {DTYPE_NAMES[tensor.dtype]}, quantized with scales in other tensors"
        if _BITSANDBYTES.search(name):
            return f"tensor {name!r} is the state of weights quantized by bitsandbytes"
    # A config that says explicitly that nothing is quantized is believed: integers may have another meaning.
    return None if config.get("quantization_config", config) is None else _packed(tensors.values())


def _packed(tensors: Iterable[TensorInfo]) -> str | None:
    modules: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        modules[module][leaf] = tensor
    if found := next(filter(None, map(_packed_in, modules.values())), None):
        weight, scale = found
        scaled = f" with {scale.name!r} as its scale" if scale else ""
        way_on = "if it is not, set quantization_config to null in config.json"
        return f"tensor {weight.name!r} is {DTYPE_NAMES[weight.dtype]}, quantized{scaled} ({way_on})"
    return None


def _packed_in(module: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo | None] | None:
    """Return integers that stand for the weights of a module, and what scales them."""
    integers = [leaf for leaf, tensor in module.items() if tensor.dtype in _INTEGER_DTYPES]
    scales = [leaf for leaf in module if _SCALE.search(leaf)] if integers else []
    has_weight = "weight" in module and "weight" not in integers
    for leaf in integers:
        tensor = module[leaf]
        looks_packed = tensor.dtype in _PACKED_DTYPES and len(tensor.shape) > 1 and not _BUFFER.search(leaf)
        is_weight = _WEIGHT.fullmatch(leaf) and (leaf != "weight" or len(tensor.shape) > 1)
        if is_weight or (looks_packed and scales and not has_weight):
            return tensor, module[scales[0]] if scales else None
    return None
