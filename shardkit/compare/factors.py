"""What gives the gain: files, their dtype, their format, the loader, each changed while all else stays.

Notebook 04 shows it; a second stack is a second comparison, with `python=article_stack()`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from shardkit.base.record import plural
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare.comparison import Comparison
from shardkit.compare.experiment import compare_loads
from shardkit.demo.bins import write_bins
from shardkit.formats.tensor import DtypeLike
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.quantities import QUANTITIES, Quantity, ratios_of
from shardkit.measure.samples import ORIGINAL, SHARDED
from shardkit.shard.engine import shard_checkpoint
from shardkit.show.effects import EFFECT_QUANTITIES, Effect

_MARGIN = 0.05
# Where reading begins before the load does, only what counts from process start counts all of it.
_AHEAD = {
    "load_wall_seconds": QUANTITIES["start_to_load_seconds"],
    "time_to_first_token_seconds": QUANTITIES["start_to_first_token_seconds"],
}


class Cell(NamedTuple):
    """How a model lies on the disk, and how it is loaded; by default, as before anybody sharded it."""

    files: int = 1
    dtype: str = "bfloat16"
    format: str = "safetensors"
    loader: str = "plain"

    def __str__(self) -> str:
        return f"{plural(self.files, 'file')}, {self.dtype}, {self.format}, {self.loader}"


# The levels of each factor; the first is the one that the others are compared with.
_LEVELS: dict[str, tuple[Any, ...]] = {
    "files": (1, 2, 8),
    "dtype": ("bfloat16", "float16"),
    "format": ("safetensors", ".bin"),
    "loader": ("plain", "prefetch"),
}
_SHARDED: dict[str, Any] = {"files": 8, "dtype": "float16"}  # what the article changed: two things at once
# Each change in words, and the levels that it sets.
_CHANGES: dict[str, dict[str, Any]] = {
    f"{level}{' files' * (name == 'files')} instead of {base}": {name: level}
    for name, (base, *levels) in _LEVELS.items()
    for level in levels
} | {"8 float16 files instead of 1 bfloat16": _SHARDED}


def choose_cells(*, full: bool = False) -> tuple[Cell, ...]:
    """Return all 24 combinations; or the first, four that change one thing, and the article's shards."""
    changed = [Cell()._replace(**{name: levels[-1]}) for name, levels in _LEVELS.items()]
    few = (Cell(), *changed, Cell()._replace(**_SHARDED))
    return tuple(dict.fromkeys((*few, *(Cell(*levels) for levels in product(*_LEVELS.values()) if full))))


def make_sources(
    source: str | os.PathLike[str], folder: str | os.PathLike[str], cells: Sequence[Cell]
) -> dict[Cell, Path]:
    """Write what each cell loads into a folder: a copy of the model for each way that it lies on the disk."""
    checkpoint = Checkpoint.open(source, download=True)
    sources = {}
    for cell in cells:
        safe = Path(folder, f"{plural(cell.files, 'file')}, {cell.dtype}")
        if not safe.exists():
            # Whether they are one model is seen before they are compared.
            shard_checkpoint(checkpoint, safe, files=cell.files, dtype=cell.dtype, verify=False)
        sources[cell] = safe if cell.format == "safetensors" else Path(f"{safe}, {cell.format}")
        if not sources[cell].exists():
            write_bins(safe, sources[cell])
    return sources


def compare_cells(
    cells: Sequence[Cell], sources: Mapping[Cell, Path], *, dtype: DtypeLike, **options: Any
) -> Comparison:
    """Load every cell in turn by `compare_loads`, which takes the options: its original is the first cell."""
    first, second, *others = cells
    rest = {str(cell): {"source": sources[cell], "prefetch": cell.loader == "prefetch"} for cell in others}
    return compare_loads(sources[first], sources[second], dtype=dtype, others=rest, **options)


def effects(found: Mapping[str, Comparison], cells: Sequence[Cell]) -> list[Effect]:
    """Return the effect of every change, on each stack, and of the later stack instead of the first.

    Of all combinations, every one is a start of changes; of a few, the first alone.
    """
    starts = cells if len(cells) == math.prod(map(len, _LEVELS.values())) else cells[:1]
    stacks = {stack: _by_cell(comparison, cells) for stack, comparison in found.items()}
    made: list[Effect] = []
    for change, levels in _CHANGES.items():
        for stack, runs in stacks.items():
            both = [(runs[cell], runs[other]) for cell in starts if (other := _changed(cell, levels)) in runs]
            made += _effect(change, stack, both)
    if len(stacks) == 2:
        (old, before), (new, after) = stacks.items()
        made += _effect(
            f"stack of {new} instead of {old}", "", [(before[cell], after[cell]) for cell in cells]
        )
    return made


_Runs = Mapping[int, LoadMeasurement]


def _by_cell(comparison: Comparison, cells: Sequence[Cell]) -> dict[Cell, _Runs]:
    names = (ORIGINAL, SHARDED, *map(str, cells[2:]))
    return {cell: comparison.by_pair(name) for cell, name in zip(cells, names, strict=True)}


def _changed(cell: Cell, levels: Mapping[str, Any]) -> Cell | None:
    """Return what a change makes of a cell; nothing of one that has another level than the first."""
    is_base = all(getattr(cell, name) == _LEVELS[name][0] for name in levels)
    return cell._replace(**levels) if is_base else None


def _effect(change: str, stack: str, both: Sequence[tuple[_Runs, _Runs]]) -> Iterator[Effect]:
    pairs: dict[Quantity, tuple[list[float], list[float]]] = {}
    for before, after in both:
        for quantity in EFFECT_QUANTITIES:
            if known := [*_values(before, after, quantity)]:
                if len(both) > 1:  # repeated, one combination tells no more of the others
                    one, other = map(geometric_mean, zip(*known, strict=True))
                    known = [(one, other)]
                firsts, seconds = pairs.setdefault(quantity, ([], []))
                firsts += (first for first, _ in known)
                seconds += (second for _, second in known)
    if pairs:
        yield Effect(change, stack, pairs, ratios_of(pairs, EFFECT_QUANTITIES, _MARGIN))


def _values(before: _Runs, after: _Runs, quantity: Quantity) -> Iterator[tuple[float, float]]:
    for number in before.keys() & after.keys():
        runs = before[number], after[number]
        clock = _AHEAD.get(quantity.name, quantity) if any(run.prefetch for run in runs) else quantity
        one, other = map(clock.of, runs)
        if one and other:
            yield one, other
