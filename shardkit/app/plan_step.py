"""Step 2: how it is sharded; the layout follows while the slider moves."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.advice import Loads
from shardkit.app.choose_step import Choose
from shardkit.app.step import Step, box, field, text_field
from shardkit.base.machine import free_bytes
from shardkit.base.record import Summary
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.estimate import Estimate
from shardkit.formats.tensor import CAST_DTYPES, stored_dtype
from shardkit.plan.packing import STRATEGIES
from shardkit.plan.plan import ShardPlan, plan_shards

_MOST_FILES, _USUAL_FILES, _LEAST_BYTES = 200, 8, 1_000_000
_MANTISSAS = (10, 12, 16, 20, 25, 32, 40, 50, 63, 80)  # ten steps from a size to ten times it
_ROUND_SIZES = [mantissa * 10**power for power in range(5, 16) for mantissa in _MANTISSAS]


class Plan(Step):
    """Sets size, strategy and dtype, and shows what would be written; there may be no such plan."""

    number, title = 2, "Plan"
    hint = "Computed from the headers: nothing is written yet."
    later = "size, strategy and dtype of the shards: once a checkpoint is open"

    def __init__(self, choose: Choose, max_shard_size: int | None, strategy: str, dtype: str | None) -> None:
        super().__init__()
        self.plan: ShardPlan | None = None
        self._choose = choose
        self.changed: Callable[[Loads | None], None] = lambda _: None
        self._asked, self._filling = max_shard_size, False
        self._original: dict[str | None, Estimate] = {}  # what loading it needs, by dtype: of no plan
        self.size = text_field("Max shard size", placeholder="80 MB")
        self.slider = field(widgets.SelectionSlider, "Max shard size", options=[("-", 0)], readout=False)
        self.slider.add_class("sk-slider")
        strategies = [(packing.words, name) for name, packing in STRATEGIES.items()]
        self.strategy = field(widgets.Dropdown, "Strategy", options=strategies, value=strategy)
        self.dtype = field(widgets.Dropdown, "Dtype of shards", options=_dtypes(None), value=dtype or "")
        self.controls = [self.size, self.slider, self.strategy, self.dtype]
        self._map, self._facts = widgets.HTML(), widgets.HTML()
        self.slider.observe(self._slid, "value")
        for control in (self.size, self.strategy, self.dtype):
            control.observe(self._changed, "value")
        self._body.children = (box("fields", *self.controls), self._message, self._map, self._facts)

    def open(self, checkpoint: Checkpoint, *, is_other: bool) -> None:
        """Plan for a checkpoint that was opened; if it is another than before, in sizes that suit it."""
        self._original, kept = {}, self.dtype.value
        sizes = shard_sizes(checkpoint.total_bytes, self._asked)
        self._filling = True
        self.slider.options = [(format_size(size), size) for size in sizes]
        if is_other:
            largest = checkpoint.largest.nbytes if checkpoint.largest else 0
            usual = self._asked or max(checkpoint.total_bytes // _USUAL_FILES, largest + largest // 100)
            self.size.value = _typed(next(size for size in sizes if size >= usual))
        self.dtype.options = _dtypes(stored_dtype(checkpoint.dtypes))
        self.dtype.value = kept
        self._filling = False
        self.attempt()

    @property
    def missing(self) -> str:
        """What has to be done before: a checkpoint."""
        return "" if self._choose.checkpoint else "nothing to plan: open a checkpoint (step 1)"

    @property
    def is_done(self) -> bool:
        """Whether there is a plan."""
        return self.plan is not None

    def run(self) -> None:
        """Plan again, show it, and tell who waits for it."""
        self.plan = loads = None
        try:
            if (checkpoint := self._choose.checkpoint) is not None:
                size = parse_size(self.size.value)
                self._follow(size)
                self.plan = plan = plan_shards(
                    checkpoint,
                    max_shard_size=size,
                    strategy=self.strategy.value,
                    dtype=self.dtype.value or None,
                )
                loads = self._loads(checkpoint, plan)
                self._map.value = page.layout_map(checkpoint, plan)
                self._facts.value = _facts(plan)
        finally:
            if self.plan is None:
                self._map.value = self._facts.value = ""
            self.changed(loads)

    def _loads(self, checkpoint: Checkpoint, plan: ShardPlan) -> Loads:
        for dtype in {stored := stored_dtype(checkpoint.dtypes), plan.dtype} - self._original.keys():
            self._original[dtype] = checkpoint.estimate(dtype)
        requested, config, side_files = self._original[plan.dtype], checkpoint.config, checkpoint.side_files
        shards = plan.estimate(requested.dtype, config=config, side_files=side_files)
        return Loads(self._original[stored], requested, shards, plan, checkpoint.total_bytes)

    def _slid(self, change: Any) -> None:
        if not self._filling:
            self.size.value = _typed(change["new"])

    def _follow(self, size: int) -> None:
        """Put the slider where the size is, or as near as it goes."""
        sizes = [value for _, value in self.slider.options]
        self._filling = True
        self.slider.index = min(bisect_left(sizes, size), len(sizes) - 1)
        self._filling = False

    def _changed(self, _: Any) -> None:
        if not self._filling:
            self.attempt()


def _dtypes(stored: str | None) -> list[tuple[str, str]]:
    return [(f"as stored ({stored or 'bytes are copied'})", ""), *((name, name) for name in CAST_DTYPES)]


def _typed(size: int) -> str:
    """Return a size as somebody would type it, to the byte."""
    return short if parse_size(short := format_size(size)) == size else str(size)


def _facts(plan: ShardPlan) -> str:
    """Return what is wrong with the plan, and, folded, what it takes, its files beside that."""
    summary, free = plan.summary(), free_bytes(".")
    needs = f"The shards need {format_size(plan.disk_bytes)}, this disk has {format_size(free)} free"
    lacks = (f"{needs}: choose a folder on another.",) * (free < plan.disk_bytes)
    room = format_size(free) if free < sys.maxsize else "unknown"
    facts = Summary(summary.title, (*summary.facts, ("disk free here", room)))
    columns = (f"<div>{part.html()}</div>" for part in (facts, Summary("Files", tables=summary.tables)))
    body = f'<div class="sk-columns">{"".join(columns)}</div>'
    warnings = "".join(map(page.warning, (*lacks, *summary.notes)))
    return warnings + page.details("Details and files", body, name="plan")


def shard_sizes(total_bytes: int, asked: int | None) -> list[int]:
    """Return the sizes to choose from: round ones, from many files to one, and what was asked for."""
    least = max(_LEAST_BYTES, total_bytes // _MOST_FILES)
    sizes = [size for size in _ROUND_SIZES if size >= least]
    whole = bisect_right(sizes, total_bytes * 1.01)  # room for a header: all in one file
    return sorted({*sizes[: whole + 1], asked or sizes[whole]})
