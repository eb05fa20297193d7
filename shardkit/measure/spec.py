"""How a load is to be done: every option checked once, when it is made, before anything is opened or run."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardkit.base.errors import MeasurementError, ShardkitError
from shardkit.base.extras import require
from shardkit.base.sizes import parse_size
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.measure.limit import limited

Rule = Callable[[Any], object]  # raises what is wrong with a value, and what to give

_DEVICE = re.compile(r"cpu|auto|balanced(_low_0)?|sequential|(cuda|mps|xpu|npu|hpu)(:\d+)?")


def check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuse the first value that breaks the rule of its name, with a `MeasurementError` that names it."""
    for name, value in values.items():
        try:
            rules[name](value)
        except ShardkitError as error:
            raise MeasurementError(f"{name}: {error}") from None


def one_of(*choices: object) -> Rule:
    """Return the rule of a value that is one of a few."""

    def rule(value: object) -> None:
        if value not in choices:
            raise MeasurementError(f"{value!r} is not one of {', '.join(map(str, choices))}")

    return rule


def whole_number(least: int) -> Rule:
    """Return the rule of a whole number, 0 or 1 at least."""
    words = "above zero" if least else "of zero or more"

    def rule(value: object) -> None:
        if type(value) is not int or value < least:
            raise MeasurementError(f"{value!r} is not a whole number {words}")

    return rule


def _is_device(value: object) -> None:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise MeasurementError(f'{value!r} is not a device: give "cpu", "cuda", "cuda:1" or "auto"')


def _can_be_set(limit: int | str | None) -> None:
    with limited(None if limit is None else parse_size(limit)):
        pass


def _is_interpreter(value: object) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise MeasurementError(f"{value!r} is not the path of an interpreter")


def _is_timeout(value: object) -> None:
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise MeasurementError(f"{value!r} is not a number of seconds; None waits as long as it takes")


def _arrive(options: Mapping[str, Any] | None) -> None:
    """Refuse options that would not reach another process just as they are."""
    if not isinstance(options or {}, Mapping):
        raise MeasurementError(f"{reprlib.repr(options)}: give arguments of from_pretrained by name")
    for name, value in (options or {}).items():
        try:
            arrives = type(name) is str and ast.literal_eval(repr(value)) == value
            json.dumps(value, allow_nan=False)  # as which results are kept
        except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
            arrives = False
        if not arrives:
            raise MeasurementError(
                f"{name!r} is {reprlib.repr(value)}: it goes to another process, so give text, numbers, "
                "booleans or None, or lists, tuples and dicts of them"
            )


CACHES = ("cold", "warm")
_RULES: dict[str, Rule] = {
    "dtype": one_of(None, "auto", *CAST_DTYPES),
    "device": _is_device,
    "cache": one_of(*CACHES),
    "generate": whole_number(0),
    "prefetch": one_of(True, False),
    "memory_limit": _can_be_set,
    "python": _is_interpreter,
    "timeout": _is_timeout,
    "options": _arrive,
}


@dataclass(frozen=True)
class LoadSpec:
    """The arguments of `measure_load`, which says what each means.

    Raises
    ------
    MeasurementError
        If one is not understood, or memory cannot be limited here.
    """

    dtype: str | None = None
    device: str = "cpu"
    cache: str = "cold"
    generate: int = 1
    prefetch: bool = False
    memory_limit: int | str | None = None
    python: str | os.PathLike[str] | None = None
    timeout: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(vars(self), _RULES)
        object.__setattr__(self, "options", dict(self.options or {}))
        # Another interpreter loads with packages of its own, but who watches it is here.
        needed = ("memory_profiler", *(() if self.python else ("torch", "transformers")))
        require("load", "measuring a load", *needed)

    @property
    def memory_limit_bytes(self) -> int | None:
        """The memory limit as a number."""
        return None if self.memory_limit is None else parse_size(self.memory_limit)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name, as results keep them."""
        return {**vars(self), "python": self.python and os.fspath(self.python)}
