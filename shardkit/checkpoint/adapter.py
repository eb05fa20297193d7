"""Adapters, of peft or diffusers: weights that are of use with a base model alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from shardkit.base.errors import CheckpointError
from shardkit.checkpoint.bounded import BoundedEstimate
from shardkit.checkpoint.budget import Sequences
from shardkit.checkpoint.estimate import RUNTIME_BYTES, Estimate, estimate_load, with_hosts
from shardkit.checkpoint.loaded import LOAD_BITS
from shardkit.formats.tensor import TensorInfo

if TYPE_CHECKING:
    from shardkit.checkpoint.checkpoint import Checkpoint


def is_adapter(stem: str, config: Mapping[str, Any] | None, names: Iterable[str]) -> bool:
    """Whether weights are an adapter's, of peft or diffusers, which needs a base model beside it."""
    if stem == "adapter_model" or "peft_type" in (config or {}):
        return True
    return config is None and {"lora" in name for name in names} == {True}


def estimate_with_base(
    source: str,
    tensors: Iterable[TensorInfo],
    dtype: str | None,
    open_checkpoint: Callable[[str], Checkpoint],
    *,
    stem: str,
    config: Mapping[str, Any] | None,
    sequences: Sequences | None = None,
    max_memory: int | None = None,
    **asked: Any,
) -> Estimate:
    """Estimate a load; of a peft adapter with its base model: without that, no host fits."""
    tensors = tuple(tensors)
    if not is_adapter(stem, config, (tensor.name for tensor in tensors)):
        asked |= {"config": config, "sequences": sequences, "max_memory": max_memory}
        return estimate_load(source, tensors, dtype, **asked)
    # Whatever the base is loaded in, peft keeps an adapter that can be trained in float32.
    copied = sum(tensor.elements for tensor in tensors) * LOAD_BITS["float32"] // 8
    named, within = (config or {}).get("base_model_name_or_path"), None
    if max_memory is not None:
        work = (sequences or Sequences()).within(max_memory)
        within = BoundedEstimate(work, why="not known: a budget is for models, not adapters")
    if (base := _open_base(named, open_checkpoint)) is None:
        called = str(named or "not named")[:200]
        note = (
            f"an adapter: its base model ({called}) is not on this machine and not included: inspect it too"
        )
        return Estimate(source, dtype, RUNTIME_BYTES, copied, 0, 0, notes=(note,), within=within)
    made = base.estimate(dtype, **asdict(sequences) if sequences else {})
    sizes = made.sizes and replace(made.sizes, loaded_bytes=made.sizes.loaded_bytes + copied)
    notes = (*made.notes, f"an adapter: the estimate includes its base model, {made.source}")
    made = replace(made, source=source, copied_bytes=made.copied_bytes + copied, notes=notes, sizes=sizes)
    return with_hosts(replace(made, tolerance=None, within=within))


def _open_base(named: object, open_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint | None:
    """Open the base model that an adapter names; None if it is not here, cannot be read, or is an adapter."""
    with suppress(CheckpointError):
        if isinstance(named, str) and os.path.exists(os.path.expanduser(named)):
            base = open_checkpoint(named)
            return None if is_adapter(base.stem, base.config, base.tensors) else base
    return None
