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
# Infinity as an unsigned integer; only NaN is above, where the sign is left out.
_INFINITY = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}


class Cast(NamedTuple):
    """A chunk in its new dtype, and how many values became infinite or zero that were not."""

    data: memoryview
    overflowed: int
    flushed: int


class Caster:
    """Casts chunk after chunk of whole elements from one floating-point dtype to another ("F32" to "BF16").

    The memory of results is used again, because fresh memory costs as much time as counting: a chunk is good
    until the next one is cast.

    Parameters
    ----------
    nbytes
        Of the largest chunk.
    """

    def __init__(self, dtype: str, target: str, nbytes: int) -> None:
        count = nbytes * 8 // DTYPE_BITS[dtype]
        self._dtype, self._target = dtype, target
        self._result = np.empty(count, _NUMPY[target])
        self._before = np.empty(count, f"u{DTYPE_BITS[dtype] // 8}")
        self._after = np.empty(count, f"u{DTYPE_BITS[target] // 8}")
        self._is_other = np.empty(count, bool)

    def cast(self, data: bytes | memoryview) -> Cast:
        """Cast a chunk."""
        values = np.frombuffer(data, dtype=_NUMPY[self._dtype])
        result = self._result[: values.size]
        moves_bits = (self._dtype, self._target) == ("BF16", "F16")
        lost = (moves_bits and self._move_bits(values, result)) or self._round(values, result)
        return Cast(result.view(np.uint8).data, *lost)

    def _round(self, values: NDArray[Any], result: NDArray[Any]) -> tuple[int, int]:
        """Cast by rounding, and return how many values overflowed and flushed."""
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = values.astype(np.float32) if self._dtype == "F64" else values
            np.copyto(result, narrow, casting="unsafe")
        return (0, 0) if (self._dtype, self._target) in _EXACT else self._lost(values, result)

    def _move_bits(self, values: NDArray[Any], result: NDArray[Any]) -> tuple[int, int] | None:
        """Cast bfloat16 to float16 in half the time, exactly, where values are normal numbers in both.

        There the exponent becomes less by 112 and the mantissa longer by 3 bits. Some 1 weight in 400 is not
        (zero, tiny, too large) and is rounded. None, and nothing done, where those are many.
        """
        bits, moved, scratch = values.view(np.uint16), result.view(np.uint16), self._after[: values.size]
        np.bitwise_and(bits, 0x7FFF, out=scratch)
        np.subtract(scratch, 0x3880, out=scratch)  # 2**-14 in bfloat16
        others = np.flatnonzero(np.greater_equal(scratch, 0x0F00, out=self._is_other[: bits.size]))  # 2**16
        if others.size > bits.size // 8:
            return None
        np.multiply(bits, 8, out=scratch)
        np.add(scratch, 0x4000, out=scratch)
        np.bitwise_and(bits, 0x8000, out=moved)
        np.bitwise_or(moved, scratch, out=moved)
        rounded = np.empty(others.size, np.float16)
        lost = self._round(bits[others].view(values.dtype), rounded)
        moved[others] = rounded.view(np.uint16)
        return lost

    def _lost(self, values: NDArray[Any], result: NDArray[Any]) -> tuple[int, int]:
        before, after = _magnitude(values, self._before), _magnitude(result, self._after)
        flushed = int(np.count_nonzero(before)) - int(np.count_nonzero(after))
        if after.max(initial=0) < _INFINITY[self._target]:
            return 0, flushed
        infinite = int(np.count_nonzero(after == _INFINITY[self._target]))
        return infinite - int(np.count_nonzero(before == _INFINITY[self._dtype])), flushed


def _magnitude(values: NDArray[Any], out: NDArray[Any]) -> NDArray[Any]:
    """Return all bits but the sign as unsigned integers, which are counted faster than floats of 16 bits."""
    bits = values.view(out.dtype)
    magnitude: NDArray[Any] = np.bitwise_and(bits, np.iinfo(out.dtype).max >> 1, out=out[: bits.size])
    return magnitude
