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

from shardkit.formats.safetensors import DTYPE_BITS

_NUMPY: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_EXACT = {("BF16", "F32"), ("F16", "F32"), ("F16", "BF16")}  # neither overflow nor underflow is possible
_FEW = 8  # times as many are moved as are cast one by one
# Infinity as an unsigned integer; only NaN is above, where the sign is left out.
_INFINITY = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}


class Cast(NamedTuple):
    """A chunk in its new dtype, and how many values became infinite or zero that were not."""

    data: memoryview
    overflowed: int
    flushed: int


class Caster:
    """Casts chunk after chunk of whole elements from one floating-point dtype to another ("F32" to "BF16").

    The memory of results, of the `nbytes` of the largest chunk, is used again, because fresh memory costs as
    much time as counting: a chunk is good until the next one is cast.
    """

    def __init__(self, dtype: str, target: str, nbytes: int) -> None:
        count = nbytes * 8 // DTYPE_BITS[dtype]
        self._dtype, self._target = dtype, target
        self._result = np.empty(count, _NUMPY[target])
        self._before = np.empty(count, f"u{DTYPE_BITS[dtype] // 8}")
        self._is_other = np.empty(count, bool)
        self._after = np.empty(count, f"u{DTYPE_BITS[target] // 8}")

    def cast(self, data: bytes | memoryview) -> Cast:
        """Cast a chunk."""
        values = np.frombuffer(data, dtype=_NUMPY[self._dtype])
        result = self._result[: values.size]
        with np.errstate(over="ignore", invalid="ignore"):
            if (lost := self._moved(values, result)) is None:
                narrow = values.astype(np.float32) if self._dtype == "F64" else values
                np.copyto(result, narrow, casting="unsafe")
                lost = (0, 0) if (self._dtype, self._target) in _EXACT else self._lost(values, result)
        return Cast(result.view(np.uint8).data, *lost)

    def _moved(self, values: NDArray[Any], result: NDArray[Any]) -> tuple[int, int] | None:
        """Move bits of bfloat16 to where float16 has them, which takes half the time, and cast only others.

        These are what is not normal in both: of weights, few. None where they are many, or of other dtypes.
        """
        if (self._dtype, self._target) != ("BF16", "F16"):
            return None
        bits, moved, spare = values.view(np.uint16), result.view(np.uint16), self._before[: values.size]
        np.left_shift(bits, 1, out=spare)  # without the sign
        np.subtract(spare, 113 << 8, out=spare)  # the least exponent, of 30
        others = np.flatnonzero(np.greater_equal(spare, 30 << 8, out=self._is_other[: values.size]))
        if others.size > values.size // _FEW:
            return None
        np.left_shift(bits, 3, out=moved)
        np.bitwise_xor(moved, 1 << 14, out=moved)  # exponents count from 127 and from 15, which differ by 112
        np.bitwise_and(moved, 0x7FFF, out=moved)
        np.bitwise_or(moved, np.bitwise_and(bits, 0x8000, out=spare), out=moved)
        few = values[others]
        result[others] = cast = few.astype(np.float16)
        return self._lost(few, cast)

    def _lost(self, values: NDArray[Any], result: NDArray[Any]) -> tuple[int, int]:
        """Return how many values overflowed and flushed; the source is looked at only where some may have."""
        after = _magnitude(result, self._after)
        zeros = after.size - int(np.count_nonzero(after))
        is_infinite = after.max(initial=0) >= _INFINITY[self._target]
        if not (zeros or is_infinite):
            return 0, 0
        before = _magnitude(values, self._before)
        flushed = zeros - (before.size - int(np.count_nonzero(before)))
        if not is_infinite:
            return 0, flushed
        infinite = int(np.count_nonzero(after == _INFINITY[self._target]))
        return infinite - int(np.count_nonzero(before == _INFINITY[self._dtype])), flushed


def _magnitude(values: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    """Return all bits but the sign as unsigned integers, which are counted faster than floats of 16 bits."""
    bits = values.view(out.dtype)
    magnitude: NDArray[Any] = np.bitwise_and(bits, np.iinfo(out.dtype).max >> 1, out=out[: bits.size])
    return magnitude
