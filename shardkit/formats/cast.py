"""Dtype conversion chunk by chunk, with a count of what it lost.

The result is that of torch's `.to()`, bit for bit. Two points decide that: float64 goes to 16 bits through
float32, as in torch, and rounding is to nearest even throughout. NaN stays NaN; which NaN is undefined in
torch as well, whose vector and scalar code write different payloads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_NUMPY: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_EXACT = {("BF16", "F32"), ("F16", "F32"), ("F16", "BF16")}  # neither overflow nor underflow is possible
# Infinity as an unsigned integer; only NaN is above, where the sign is left out.
_INFINITY = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}


class Cast(NamedTuple):
    """A chunk in its new dtype, and how many values became infinite or zero that were not."""

    data: memoryview
    overflowed: int
    flushed: int


def cast(data: bytes | memoryview, dtype: str, target: str) -> Cast:
    """Cast the bytes of whole elements from one floating-point dtype to another ("F32" to "BF16")."""
    values = np.frombuffer(data, dtype=_NUMPY[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = values.astype(np.float32) if dtype == "F64" else values
        result = narrow.astype(_NUMPY[target])
    lost = (0, 0) if (dtype, target) in _EXACT else _lost(values, dtype, result, target)
    return Cast(result.view(np.uint8).data, *lost)


def _lost(values: NDArray[Any], dtype: str, result: NDArray[Any], target: str) -> tuple[int, int]:
    before, after = _magnitude(values), _magnitude(result)
    flushed = int(np.count_nonzero(before)) - int(np.count_nonzero(after))
    if after.max(initial=0) < _INFINITY[target]:
        return 0, flushed
    infinite = int(np.count_nonzero(after == _INFINITY[target]))
    return infinite - int(np.count_nonzero(before == _INFINITY[dtype])), flushed


def _magnitude(values: NDArray[Any]) -> NDArray[Any]:
    """Return all bits but the sign as unsigned integers, which are counted faster than floats of 16 bits."""
    bits = values.view(f"u{values.itemsize}")
    magnitude: NDArray[Any] = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return magnitude
