"""Parameters of notebooks and of the app, checked before any work begins; what many notebooks found.

Papermill only warns of a name that the notebook does not know, and runs on with the default.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from shardkit.base.errors import InOneLine, ShardkitError
from shardkit.base.record import listed, plural, printable
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare.comparison import Comparison, merge_comparisons
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.plan.plan import Strategy

if TYPE_CHECKING:
    import pandas as pd

_INJECTED = "# Parameters"  # how papermill begins the cell that it writes


class ParameterError(InOneLine, ShardkitError, ValueError):
    """A parameter of a notebook or of the app is unknown, or its value cannot be used."""


def check_parameters(names: Mapping[str, Any]) -> None:
    """Refuse parameters that a notebook does not know, and values that it cannot use.

    The parameters are those that its cells annotate: ``repeats: int = 5``.

    Parameters
    ----------
    names
        The `globals()` of a notebook, behind its parameters.

    Raises
    ------
    ParameterError
        Names the parameter, its value, and what it may be.
    """
    cells: Sequence[str] = names.get("In", ())
    known = dict.fromkeys(name for cell in cells for name in _assigned(cell, ast.AnnAssign))
    given = [name for cell in cells if cell.startswith(_INJECTED) for name in _assigned(cell, ast.Assign)]
    if unknown := [name for name in given if name not in known]:
        raise ParameterError(
            f"{plural(len(unknown), 'unknown parameter')} ({listed(unknown)}): "
            f"this notebook has {listed(known, len(known))}"
        )
    check_values({name: names[name] for name in known.keys() & _RULES.keys()})


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse values of parameters that cannot be used; as `check_parameters`."""
    for name, value in values.items():
        try:
            _RULES[name](value)
        except ShardkitError as error:
            raise ParameterError(f"parameter {name}: {error}") from None


def _assigned(cell: str, kind: type[ast.Assign | ast.AnnAssign]) -> list[str]:
    """Return the names that a cell assigns at its top level, with or without an annotation."""
    with suppress(SyntaxError):
        found = (node for node in ast.parse(cell).body if isinstance(node, kind))
        targets = (node.targets[0] if isinstance(node, ast.Assign) else node.target for node in found)
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


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


_RULES: dict[str, Callable[[Any], object]] = {
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


def read_results(folder: str) -> tuple[dict[str, Comparison], pd.DataFrame]:
    """Return every comparison below a folder by its file's name, and their runs, a row each.

    Warm-ups are left out, unless an arm has nothing else.

    Raises
    ------
    MeasurementError
        If there is none, or one cannot be read.
    """
    files = {str(path): path for path in sorted(Path(folder).rglob("*comparison.json"))}
    runs = merge_comparisons(files)
    names = {file: printable(str(path.relative_to(folder))) for file, path in files.items()}
    runs.insert(0, "result", runs["file"].map(names))
    counted = runs.groupby(["file", "arm"])["pair"].transform("count")
    found = {name: Comparison.load(file) for file, name in names.items()}
    return found, runs[runs["pair"].notna() | (counted == 0)]
