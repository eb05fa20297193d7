"""Packages that only a part of the work needs: where one is missing, the extra that brings it is named."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Literal

from shardkit.base.errors import MissingPackageError


def require(extra: Literal["cluster", "kaggle", "load", "notebook"], work: str, *packages: str) -> None:
    """Refuse work ("loading a model") that needs packages which are not all installed; none is imported."""
    missing = [name for name in packages if sys.modules.get(name) is None and find_spec(name) is None]
    if missing:
        *others, last = missing
        names, verb = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
        raise MissingPackageError(
            f'{work} needs {names}, which {verb} not installed: pip install "shardkit[{extra}]"'
        )
