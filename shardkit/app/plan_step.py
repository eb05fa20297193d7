"""Step 2: how it is sharded; the layout follows while the slider moves."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.choose_step import Choose
from shardkit.app.step import Area, Step, field
from shardkit.base.record import Summary
from shardkit.base.sizes import format_size
from shardkit.checkpoint.estimate import Estimate
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.plan.packing import STRATEGIES
from shardkit.plan.plan import ShardPlan, plan_shards

_MOST_FILES, _USUAL_FILES, _LEAST_BYTES = 200, 8, 1_000_000
_MANTISSAS = (10, 12, 16, 20, 25, 32, 40, 50, 63, 80)  # ten steps from a size to ten times it
_ROUND_SIZES = [mantissa * 10**power for power in range(5, 16) for mantissa in _MANTISSAS]


class Plan(Step):
    """Sets size, strategy and dtype, and shows what would be written; there may be no such plan."""

    title, hint = "2. Plan", "The plan is computed from the headers: nothing is written yet."

    def __init__(self, choose: Choose, max_shard_size: int | None, strategy: str, dtype: str | None) -> None:
        super().__init__()
        self.plan: ShardPlan | None = None
        self.estimates: tuple[Estimate, Estimate] | None = None  # of a load as it is, and as planned
        self._choose = choose
        self.changed: Callable[[], None] = lambda: None
        self._asked, self._source, self._filling = max_shard_size, "", False
        self.size = field(widgets.SelectionSlider, "Max shard size", options=[("-", 0)])
        strategies = [(packing.words, name) for name, packing in STRATEGIES.items()]
        self.strategy = field(widgets.Dropdown, "Strategy", options=strategies, value=strategy)
        dtypes = [("as stored (bytes are copied)", ""), *((name, name) for name in CAST_DTYPES)]
        self.dtype = field(widgets.Dropdown, "Dtype of shards", options=dtypes, value=dtype or "")
        self.controls = [self.size, self.strategy, self.dtype]
        self._map = Area("layout", "layout of the files", "The layout of the files is shown here.")
        empty = "Number of files, disk and memory needed are shown here."
        self._told = Area("plan", "the plan", empty)
        for control in self.controls:
            control.observe(self._changed, "value")
        self.place(*self.controls, self._message, self._map, self._told)

    def open(self) -> None:
        """Plan for another checkpoint, or none."""
        if (checkpoint := self._choose.checkpoint) is not None:
            sizes = shard_sizes(checkpoint.total_bytes, self._asked)
            kept = self.size.value if checkpoint.source == self._source else None
            self._source = checkpoint.source
            self._filling = True
            self.size.options = [(format_size(size), size) for size in sizes]
            largest = checkpoint.largest.nbytes if checkpoint.largest else 0
            usual = self._asked or max(checkpoint.total_bytes // _USUAL_FILES, largest + largest // 100)
            self.size.value = kept if kept in sizes else next(size for size in sizes if size >= usual)
            self._filling = False
        self.attempt()

    @property
    def missing(self) -> str:
        """What has to be done before: a checkpoint."""
        return "" if self._choose.checkpoint else "nothing to plan: open a checkpoint (step 1)"

    def show(self, *, working: bool, busy: bool) -> None:
        """Let the controls say whether there is something to plan for."""
        super().show(working=working, busy=busy or bool(self.missing))

    def run(self) -> None:
        """Plan anew, show it, and tell who waits for it."""
        self.plan = self.estimates = None
        try:
            if (checkpoint := self._choose.checkpoint) is not None:
                self.plan = plan = plan_shards(
                    checkpoint,
                    max_shard_size=self.size.value,
                    strategy=self.strategy.value,
                    dtype=self.dtype.value or None,
                )
                now = checkpoint.estimate(plan.dtype)
                config, side_files = checkpoint.config, checkpoint.side_files
                self.estimates = now, plan.estimate(now.dtype, config=config, side_files=side_files)
                self._map.fill(page.layout_map(checkpoint, plan))
                self._told.fill(_told(plan, *self.estimates))
        finally:
            if self.plan is None:
                self._map.clear()
                self._told.clear()
            self.changed()

    def _changed(self, _: Any) -> None:
        if not self._filling:
            self.attempt()


def _told(plan: ShardPlan, now: Estimate, then: Estimate) -> str:
    """Return the plan with what it asks of disk and memory, and its files beside it."""
    free = shutil.disk_usage(Path.cwd()).free
    verdict = "enough" if free >= plan.disk_bytes else "NOT enough: choose a folder on another disk"
    summary = plan.summary()
    facts = (
        *summary.facts,
        ("disk free here", f"{format_size(free)}: {verdict}"),
        ("memory to load", f"{then.needed} anonymous ({now.needed} as it is now)"),
    )
    files = Summary("Files", tables=summary.tables)
    return page.columns(replace(summary, facts=facts, tables=()).html(), files.html())


def shard_sizes(total_bytes: int, asked: int | None) -> list[int]:
    """Return the sizes to choose from: round ones, from many files to one, and what was asked for."""
    least = max(_LEAST_BYTES, total_bytes // _MOST_FILES)
    sizes = [size for size in _ROUND_SIZES if size >= least]
    whole = bisect_right(sizes, total_bytes * 1.01)  # room for a header: all in one file
    return sorted({*sizes[: whole + 1], asked or sizes[whole]})
