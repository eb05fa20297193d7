"""Parameters of notebooks and of the app, checked before any work begins; what many notebooks found.

Papermill only warns of a name that the notebook does not know, and runs on with the default.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardkit.base.record import listed, plural, printable
from shardkit.compare.comparison import Comparison, merge_comparisons
from shardkit.compare.parameters import RULES, ParameterError, check_values
from shardkit.measure.quantities import compared

if TYPE_CHECKING:
    import pandas as pd

_INJECTED = "# Parameters"  # how papermill begins the cell that it writes


def check_parameters(names: Mapping[str, Any]) -> None:
    """Refuse parameters that a notebook does not know, and values that it cannot use.

    The parameters are those that its cells annotate: ``repeats: int = 5``; the names are its `globals()`.
    """
    cells: Sequence[str] = names.get("In", ())
    known = dict.fromkeys(name for cell in cells for name in _assigned(cell, ast.AnnAssign))
    given = [name for cell in cells if cell.startswith(_INJECTED) for name in _assigned(cell, ast.Assign)]
    if unknown := [name for name in given if name not in known]:
        raise ParameterError(
            f"{plural(len(unknown), 'unknown parameter')} ({listed(unknown)}): "
            f"this notebook has {listed(known, len(known))}"
        )
    check_values({name: names[name] for name in known.keys() & RULES.keys()})


def _assigned(cell: str, kind: type[ast.Assign | ast.AnnAssign]) -> list[str]:
    """Return the names that a cell assigns at its top level, with or without an annotation."""
    with suppress(SyntaxError):
        found = (node for node in ast.parse(cell).body if isinstance(node, kind))
        targets = (node.targets[0] if isinstance(node, ast.Assign) else node.target for node in found)
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def read_results(folder: str) -> tuple[dict[str, Comparison], pd.DataFrame]:
    """Return every comparison below a folder by its file's name, and their runs, a row each.

    Warm-ups are left out, unless a variant has nothing else.
    """
    files = {str(path): path for path in sorted(Path(folder).rglob("*comparison.json"))}
    runs = merge_comparisons(files)
    names = {file: printable(str(path.relative_to(folder))) for file, path in files.items()}
    runs.insert(0, "result", runs["file"].map(names))
    counted = runs.groupby(["file", "variant"])["pair"].transform("count")
    found = {name: Comparison.load(file) for file, name in names.items()}
    return found, runs[runs["pair"].notna() | (counted == 0)]


def median_figures(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of the main figures by result and variant, over the counted loads that succeeded.

    They are in seconds and gigabytes, as the columns' names say: "load time (s)".
    """
    main = compared(False, "main")
    names = [quantity.name for quantity in main]
    loaded = runs[(runs["outcome"] == "ok") & runs["pair"].notna()].astype(dict.fromkeys(names, "Float64"))
    medians = loaded.groupby(["result", "variant"], sort=False)[names].median()
    for quantity in main:
        scale, unit = (1, "s") if quantity.unit == "seconds" else (1e9, "GB")
        medians[quantity.name] /= scale
        medians = medians.rename(columns={quantity.name: f"{quantity.label} ({unit})"})
    return medians
