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
from shardkit.checkpoint.estimate import Estimate, estimate_adapter, estimate_load
from shardkit.checkpoint.loaded import StoredTensor
from shardkit.checkpoint.quantized import quantization
from shardkit.checkpoint.scan import GGUF
from shardkit.checkpoint.unpacked import estimate_gguf

if TYPE_CHECKING:
    from shardkit.checkpoint.checkpoint import Checkpoint


def is_adapter(stem: str, config: Mapping[str, Any] | None, names: Iterable[str]) -> bool:
    """Whether weights are an adapter's, of peft or diffusers, which needs a base model beside it."""
    if stem == "adapter_model" or "peft_type" in (config or {}):
        return True
    return config is None and {"lora" in name for name in names} == {True}


def estimate_with_base(
    source: str,
    tensors: Iterable[StoredTensor],
    dtype: str | None,
    open_checkpoint: Callable[[str], Checkpoint],
    *,
    stem: str,
    config: Mapping[str, Any] | None,
    **asked: Any,
) -> Estimate:
    """Estimate a load; of a peft adapter with its base model, where that is here; of GGUF, unpacked."""
    tensors = tuple(tensors)
    if quantization(config) == GGUF:
        return estimate_gguf(source, tensors, dtype, config=config or {}, **asked)
    if not is_adapter(stem, config, (tensor.name for tensor in tensors)):
        return estimate_load(source, tensors, dtype, config=config, **asked)
    named = (config or {}).get("base_model_name_or_path")
    base = _open_base(named, open_checkpoint) if isinstance(named, str) else None
    sequences, max_memory = asked.get("sequences"), asked.get("max_memory")
    made = base.estimate(dtype, **asdict(sequences) if sequences else {}) if base else None
    found = estimate_adapter(source, tensors, dtype, named, made)
    if max_memory is None:
        return found
    work = (sequences or Sequences()).within(max_memory)
    return replace(found, within=BoundedEstimate(work, why="not known: a budget is for models, not adapters"))


def _open_base(named: str, open_checkpoint: Callable[[str], Checkpoint]) -> Checkpoint | None:
    """Open the base model that an adapter names; None if it is not here, cannot be read, or is an adapter."""
    with suppress(CheckpointError):
        if os.path.exists(os.path.expanduser(named)):
            base = open_checkpoint(named)
            return None if is_adapter(base.stem, base.config, base.tensors) else base
    return None
