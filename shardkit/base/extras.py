"""Packages that only a part of the work needs: where one is missing, the extra that brings it is named."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from shardkit.base.errors import MissingPackageError

_CUDA = "libtorch_cuda.so"


def require(extra: Literal["cluster", "kaggle", "load", "notebook"], work: str, *packages: str) -> None:
    """Refuse work ("loading a model") that needs packages which are not all installed; none is imported."""
    missing = [name for name in packages if sys.modules.get(name) is None and find_spec(name) is None]
    if missing:
        *others, last = missing
        names, verb = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
        raise MissingPackageError(
            f'{work} needs {names}, which {verb} not installed: pip install "shardkit[{extra}]"'
        )


def is_torch_for_cuda() -> bool:
    """Whether the torch that is installed here is built for CUDA; it is not imported for that."""
    with suppress(ValueError):  # of a module that is not from a file
        found = find_spec("torch")
        return bool(found and found.origin and Path(found.origin).with_name("lib").joinpath(_CUDA).is_file())
    return False
