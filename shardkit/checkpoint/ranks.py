"""What processes that run one model together need of it: heads that they can share, columns that they cut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardkit.base.errors import CheckpointError, PlanError
from shardkit.checkpoint import asking
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.columns import COLUMN_BLOCKS, in_blocks
from shardkit.formats.strided import Layout

_SHARED = {"num_attention_heads": "attention heads", "num_key_value_heads": "key-value heads"}
_SHARING = ("distributed_config", "tp_plan", "tp_size")


def tensor_parallel_size(options: Mapping[str, Any]) -> int:
    """Return how many processes share each matrix, as options of `from_pretrained` say; 1 if they do not."""
    config = options.get("distributed_config") or options
    given = config if isinstance(config, Mapping) else vars(config)
    if given.get("tp_size") is None and given.get("tp_plan"):
        return int(os.environ.get("WORLD_SIZE", "1"))
    return int(given.get("tp_size") or 1)


def is_shared(checkpoint: Checkpoint, options: Mapping[str, Any]) -> bool:
    """Whether options of `from_pretrained` have several processes share a model whose parts can be read."""
    return checkpoint.format == "safetensors" and any(map(options.get, _SHARING))


def check_ranks(config: Mapping[str, Any] | None, ranks: int) -> None:
    """Refuse a number of processes that cannot share a model: each has as many whole heads as the others.

    Raises
    ------
    PlanError
        If it does not divide the heads; says which numbers do.
    """
    text = (config or {}).get("text_config") or config or {}
    counts = {words: text[key] for key, words in _SHARED.items() if isinstance(text.get(key), int)}
    if type(ranks) is not int or ranks < 1:
        raise PlanError(f"{ranks!r} processes: must be a whole number above zero")
    for words, count in counts.items():
        if count % ranks:
            fit = [str(n) for n in range(1, count + 1) if all(c % n == 0 for c in counts.values())]
            raise PlanError(
                f"{ranks} processes cannot share the {count} {words} of this model: "
                f"their number can be {', '.join(fit)}"
            )


def is_for_ranks(checkpoint: Checkpoint) -> bool:
    """Whether files of safetensors hold matrices in blocks of columns."""
    can_be = checkpoint.format == "safetensors"
    return can_be and any(isinstance(tensor.layout, Layout) for tensor in checkpoint.tensors.values())


def for_ranks(checkpoint: Checkpoint, ranks: int) -> Checkpoint:
    """Return a checkpoint as it is written for processes that share each matrix: see `formats.columns`.

    Raises
    ------
    CheckpointError
        If transformers is not installed, or has no plan for the model; or a tensor would be mistaken.
    PlanError
        As `check_ranks`.
    """
    check_ranks(checkpoint.config, ranks)
    matrices = [name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2]
    with asking.asked() as ask:
        found = ask({"question": "columns", "config": checkpoint.config or {}, "names": matrices})()
    if why := found.get("why"):
        raise CheckpointError(
            f"cannot be divided among processes by transformers: {why}", file=checkpoint.source
        )
    cut, tensors = set(found["columns"]), {}
    for name, tensor in checkpoint.tensors.items():
        if tensor.shape[0:1] == (ranks,) and len(tensor.shape) == 3:
            what = f"{list(tensor.shape)}, which would be mistaken for {ranks} blocks of columns"
            raise CheckpointError(f"has shape {what}", file=checkpoint.path(tensor.file), tensor=name)
        is_cut = name in cut and tensor.layout is None and tensor.shape[1] % ranks == 0
        tensors[name] = in_blocks(tensor, ranks) if is_cut else tensor
    return replace(checkpoint, tensors=tensors, metadata={**checkpoint.metadata, COLUMN_BLOCKS: str(ranks)})
