"""One tensor on disk, and the words for its dtype: safetensors' ("BF16") and torch's ("bfloat16")."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

from shardkit.base.errors import PlanError, misspelled
from shardkit.base.sizes import format_size
from shardkit.formats.pieces import Pieces
from shardkit.formats.strided import Layout

DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2", "F6_E2M3": "float6_e2m3fn", "F6_E3M2": "float6_e3m2fn",
}  # fmt: skip

# The dtypes that a cast may start from or end in; anything smaller is quantized.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# What editors suggest; their short names, and torch's own dtypes, are understood as well.
Dtype = Literal["float16", "bfloat16", "float32"]
DtypeLike: TypeAlias = Dtype | Any
LoadDtype = Literal["auto", "float16", "bfloat16", "float32"]
LoadDtypeLike: TypeAlias = LoadDtype | Any
_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
QUANTIZED_DTYPES = tuple(name for name in DTYPE_NAMES if name == "F4" or name.startswith(("F6_", "F8_")))


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype to cast to or load in, by any of its names: "fp16", "half", torch.float16.

    A PlanError if it is none, which suggests the nearest.
    """
    name = str(dtype).removeprefix("torch.").lower()
    name = _SHORT.get(name, name)
    if name not in CAST_DTYPES:
        raise PlanError(misspelled("dtype", dtype, CAST_DTYPES, _SHORT))
    return name


def stored_dtype(dtypes: Iterable[str]) -> str | None:
    """Return the first floating-point one of some dtypes on disk, in torch's words; None where none is."""
    return next((DTYPE_NAMES[dtype] for dtype in dtypes if dtype in FLOAT_DTYPES), None)


def parse_dtype(dtype: object) -> str | None:
    """Return the dtype that a cast is to end in, in safetensors' words; None for none; as `dtype_name`."""
    return None if dtype is None else CAST_DTYPES[dtype_name(dtype)]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's cycle collector from walking hundreds of thousands of new records, over and over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor on disk.

    Attributes
    ----------
    name, dtype, shape
        As in the file; dtype in safetensors' words ("BF16"), or, of blocks, GGUF's ("Q4_K").
    file
        Name of its file, relative to the checkpoint's folder; of a tensor in pieces, that of the first.
    offset
        Its first byte in that file.
    nbytes
        Size in bytes.
    layout
        How its items lie in that file, or in those of its pieces; None where they lie as they are written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    layout: Layout | Pieces | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"{self.name} ({shape} {DTYPE_NAMES.get(self.dtype, self.dtype)}, {format_size(self.nbytes)})"
