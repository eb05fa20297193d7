"""How a load is to be done: every option checked once, when it is made, before anything is opened or run."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import reprlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

from shardkit.base.errors import MeasurementError, ShardkitError
from shardkit.base.extras import require
from shardkit.base.sizes import parse_size
from shardkit.formats.tensor import LoadDtypeLike, dtype_name
from shardkit.measure.limit import limited

Rule = Callable[[Any], object]  # raises what is wrong with a value, and what to give

# Of NVIDIA's driver, AMD's, and Windows' for Linux.
_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_DEVICE = re.compile(r"cpu|auto|balanced(_low_0)?|sequential|cuda(:\d+)?")


def check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuse the first value that breaks the rule of its name, with a `MeasurementError` that names it."""
    for name, value in values.items():
        try:
            rules[name](value)
        except ShardkitError as error:
            words = str(error)
            raise MeasurementError(words if words.startswith(name) else f"{name}: {words}") from None


def must(hold: Callable[[Any], bool], words: str) -> Rule:
    """Return a rule: what has to hold of a value, and what the value has to be, in words."""

    def rule(value: object) -> None:
        if not hold(value):
            raise MeasurementError(f"{value!r} is not {words}")

    return rule


def one_of(*choices: object) -> Rule:
    """Return the rule of a value that is one of a few."""
    return must(lambda value: value in choices, f"one of {', '.join(map(str, choices))}")


def whole_number(least: int, *or_else: str) -> Rule:
    """Return the rule of a whole number, 0 or 1 at least, or of a word that may stand for one."""
    words = f"a whole number {'above zero' if least else 'of zero or more'}"
    words += "".join(f", or {word!r}" for word in or_else)
    return must(lambda value: (type(value) is int and value >= least) or value in or_else, words)


def share(low: float, high: float) -> Rule:
    """Return the rule of a share between two numbers."""
    words = f"a share above {low:g}{f' and below {high:g}' if high < math.inf else ''}, such as 0.05 for 5 %"
    return must(lambda value: isinstance(value, (int, float)) and low < value < high, words)


def optional(rule: Rule) -> Rule:
    """Return the rule of a value that may be None."""
    return lambda value: None if value is None else rule(value)


def _is_file(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        raise MeasurementError(f"{path!r} is not a file with a function `load`")


def _can_start(python: object) -> None:
    must(lambda value: isinstance(value, (str, os.PathLike)), "a path of an interpreter")(python)
    if shutil.which(os.path.expanduser(str(python))) is None:
        raise MeasurementError(f"{str(python)!r} is not there, or not executable: use another interpreter")


def _require_gpu(device: str) -> None:
    """Refuse a GPU where there is none: now, not after the first load."""
    if (version := metadata.version("torch")).endswith("+cpu"):
        raise MeasurementError(
            f"device {device!r} needs a torch with CUDA, but {version} is its CPU build: use the CPU"
        )
    if sys.platform == "linux" and not any(map(os.path.exists, _GPU_NODES)):
        raise MeasurementError(f"device {device!r} needs a GPU, but this machine has none: use the CPU")


def _arrive(options: Mapping[str, Any]) -> None:
    """Refuse options that would not reach another process just as they are."""
    must(lambda value: isinstance(value, Mapping), "arguments by name")(options)
    for name, value in options.items():
        try:
            arrives = type(name) is str and ast.literal_eval(repr(value)) == value
            json.dumps(value, allow_nan=False)  # as which results are kept
        except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
            arrives = False
        if not arrives:
            raise MeasurementError(
                f"{name!r} is {reprlib.repr(value)}: it is sent to another process, so use strings, "
                "numbers, booleans, None, or lists, tuples and dicts of them"
            )


Cache = Literal["cold", "warm"]
CACHES: tuple[Cache, ...] = ("cold", "warm")
RULES: dict[str, Rule] = {
    "dtype": lambda value: value in (None, "auto") or dtype_name(value),
    "device": must(
        lambda value: isinstance(value, str) and bool(_DEVICE.fullmatch(value)),
        'a device: "cpu", "cuda", "cuda:1", "auto"',
    ),
    "cache": one_of(*CACHES),
    "generate": whole_number(0),
    "prefetch": one_of(True, False),
    "memory_limit": optional(lambda limit: limited(parse_size(limit))),
    "python": optional(_can_start),
    "timeout": optional(
        must(lambda value: isinstance(value, (int, float)) and 0 <= value < math.inf, "a number of seconds")
    ),
    "options": optional(_arrive),
    "max_memory": optional(parse_size),
    "loader": optional(_is_file),
    "prompt": optional(must(lambda value: isinstance(value, str) and value != "", "text")),
    "generation": optional(_arrive),
}


@dataclass(frozen=True)
class LoadSpec:
    """The arguments of `measure_load`, which says what each means; one that is not understood is refused."""

    dtype: LoadDtypeLike | None = None
    device: str = "cpu"
    cache: Cache = "cold"
    generate: int = 1
    prefetch: bool = False
    memory_limit: int | str | None = None
    python: str | os.PathLike[str] | None = None
    timeout: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_memory: int | str | None = None
    loader: str | os.PathLike[str] | None = None
    prompt: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(vars(self), RULES)
        if self.loader and self.max_memory is not None:
            raise MeasurementError("max_memory is for shardkit's own load, not for a loader: use one of them")
        object.__setattr__(
            self, "dtype", self.dtype if self.dtype in (None, "auto") else dtype_name(self.dtype)
        )
        for name in ("options", "generation"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        for name in ("python", "loader"):
            object.__setattr__(self, name, getattr(self, name) and os.fspath(getattr(self, name)))
        # Another interpreter loads with packages of its own, but who watches it is here.
        needed = ("memory_profiler", *(() if self.python else ("torch", "transformers")))
        require("load", "measuring a load", *needed)
        if self.device.startswith("cuda") and not self.python:
            _require_gpu(self.device)

    @property
    def memory_limit_bytes(self) -> int | None:
        """The memory limit as a number."""
        return None if self.memory_limit is None else parse_size(self.memory_limit)

    @property
    def max_memory_bytes(self) -> int | None:
        """The memory budget as a number."""
        return None if self.max_memory is None else parse_size(self.max_memory)
