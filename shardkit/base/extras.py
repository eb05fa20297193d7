"""Packages that only a part of the work needs: where one is missing, the extra that brings it is named."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Literal

from shardkit.base.errors import MissingPackageError

Extra = Literal["load", "notebook"]


def require(extra: Extra, work: str, *packages: str) -> None:
    """Refuse work whose packages are not all installed, before any of it begins; nothing is imported.

    Parameters
    ----------
    extra
        The extra of shardkit that brings them.
    work
        What needs them, as the subject of a sentence: "loading a model".
    *packages
        Names to import.

    Raises
    ------
    MissingPackageError
        Names those that are missing, and how to install them.
    """
    missing = [name for name in packages if sys.modules.get(name) is None and find_spec(name) is None]
    if missing:
        *others, last = missing
        names, verb = (f"{', '.join(others)} and {last}", "are") if others else (last, "is")
        raise MissingPackageError(
            f'{work} needs {names}, which {verb} not installed: pip install "shardkit[{extra}]"'
        )
