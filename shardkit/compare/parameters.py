"""Parameters of notebooks and of the app, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.base.errors import InOneLine, MeasurementError, ShardkitError
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.hosts import memory_limits
from shardkit.formats.tensor import dtype_name
from shardkit.measure.samples import AUTO
from shardkit.measure.spec import CACHES, Rule, check, must, one_of, whole_number
from shardkit.plan.packing import packing


class ParameterError(InOneLine, ShardkitError, ValueError):
    """A parameter of a notebook or of the app is unknown, or its value cannot be used."""


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse values of parameters that cannot be used."""
    try:
        check(values, RULES)
    except MeasurementError as error:
        raise ParameterError(f"parameter {error}") from None


_is_text = must(
    lambda value: isinstance(value, str) and value != "", "text (papermill's -r passes a number as text)"
)


def _is_checkpoint(value: Any) -> None:
    if value != "":  # the demo model
        _is_text(value)
        Checkpoint.open(value)


_FLAGS = ("overwrite", "first_token", "trust_remote_code", "with_2024_stack", "full")
RULES: dict[str, Rule] = {
    "model": _is_checkpoint,
    "demo_size": parse_size,
    "max_shard_size": parse_size,
    "line_speed": parse_size,
    "strategy": packing,
    "dtype": dtype_name,
    "host": one_of(*memory_limits()),
    "prompt": _is_text,
    "tokens": whole_number(1),
    "ranks": whole_number(1),
    "precision": must(lambda value: type(value) is int and 0 < value < 100, "a whole number of percent"),
    "repeats": whole_number(1, AUTO),
    "cache": one_of(*CACHES),
    **dict.fromkeys(_FLAGS, one_of(True, False)),
    "output_folder": _is_text,
    "results": must(
        lambda value: isinstance(value, str) and value != "" and Path(value).is_dir(), "a folder that exists"
    ),
}
