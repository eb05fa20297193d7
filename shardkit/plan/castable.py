"""What a cast may change: not quantized weights, nor what transformers loads in another dtype."""

from __future__ import annotations

from shardkit.base.errors import PlanError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.kept import kept_tensors
from shardkit.checkpoint.quantized import quantized
from shardkit.formats.tensor import DTYPE_NAMES, FLOAT_DTYPES


def kept_by_cast(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """Return which tensors a cast leaves as they are, with their dtype; refuse one of quantized weights."""
    if why := quantized(checkpoint.config, checkpoint.tensors):
        raise PlanError(f"{checkpoint.source}: {why}; a cast would destroy the weights: leave out dtype")
    floats = {t.name: t.dtype for t in checkpoint.tensors.values() if t.dtype in FLOAT_DTYPES}
    castable = {name: dtype for name, dtype in floats.items() if dtype != target}
    kept = kept_tensors(castable, checkpoint.config, target)
    return {name: DTYPE_NAMES[dtype] for name, dtype in castable.items() if name in kept}
