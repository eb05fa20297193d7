"""What a comparison is asked for, in notebooks and in the app: checked before any work begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from shardkit.base.errors import InOneLine, ShardkitError
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.plan.plan import Strategy


class ParameterError(InOneLine, ShardkitError, ValueError):
    """A parameter of a notebook or of the app is unknown, or its value cannot be used."""


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse values of parameters that cannot be used."""
    for name, value in values.items():
        try:
            RULES[name](value)
        except ShardkitError as error:
            raise ParameterError(f"parameter {name}: {error}") from None


def _is_text(value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ShardkitError(f"{value!r} is no text (papermill's -r passes a number as text)")


def _one_of(*choices: object) -> Callable[[object], None]:
    def check(value: object) -> None:
        if value not in choices:
            raise ShardkitError(f"{value!r} is not one of {', '.join(map(str, choices))}")

    return check


def _is_checkpoint(value: Any) -> None:
    if value != "":  # the demo model
        _is_text(value)
        Checkpoint.open(value)


def _is_folder(value: Any) -> None:
    _is_text(value)
    if not Path(value).is_dir():
        raise ShardkitError(f"{value!r} is not a folder that exists")


def _is_count(value: object) -> None:
    if type(value) is not int or value < 1:
        raise ShardkitError(f"{value!r} is not a whole number above zero")


RULES: dict[str, Callable[[Any], object]] = {
    "model": _is_checkpoint,
    "demo_size": parse_size,
    "max_shard_size": parse_size,
    "strategy": _one_of(*get_args(Strategy)),
    "dtype": _one_of(*CAST_DTYPES),
    "repeats": _is_count,
    "cache": _one_of("cold", "warm"),
    "overwrite": _one_of(True, False),
    "first_token": _one_of(True, False),
    "trust_remote_code": _one_of(True, False),
    "output_folder": _is_text,
    "results": _is_folder,
}
