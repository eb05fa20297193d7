"""Step 4: load both, and say what differs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.advice import Loads
from shardkit.app.choose_step import Choose
from shardkit.app.job_thread import Worker
from shardkit.app.shard_step import Shard
from shardkit.app.step import Step, box, checkbox, field, text_field
from shardkit.base.disk import measured_rate
from shardkit.base.errors import ShardkitError
from shardkit.base.record import plural
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.hosts import memory_limits
from shardkit.compare.comparison import Comparison
from shardkit.compare.experiment import compare_loads
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.measure.article_stack import article_stack
from shardkit.measure.limit import why_unlimited
from shardkit.measure.samples import AUTO, MOST_PAIRS
from shardkit.show.plots import comparison_png
from shardkit.show.report_page import alternative

_CACHES = (("cold: read from the disk", "cold"), ("warm: from the page cache", "warm"))
_GENERATES = "Also time the first token, which includes work that the load deferred"
_UNTIL = "Add pairs only until every verdict is decided"
_IN_2024 = "Load with transformers 4.37 of 2024 (installed once, in an environment of its own)"
_TOKENS_IN_A_BUDGET = 4  # the first, and three to tell the time of a later one by
# What a run takes beside reading, until one was timed here: seconds for process, imports and first token of a
# small model, and bytes a second that are converted. Both were measured on two cores.
_START_SECONDS, _CONVERT_RATE = 6.0, 6e8
_READING_SECONDS = 0.2  # which show what the disk gives


class Compare(Step):
    """Loads both checkpoints in turn, each time in a fresh process; if stopped, it keeps what it found."""

    number, title, button, working = 4, "Compare", "Compare", "Comparing…"
    hint = "Loads the original and the shards in turn, each time in a fresh process."
    later = "loads the original and the shards in turn: once there are shards"

    def __init__(
        self, choose: Choose, shard: Shard, given: Mapping[str, Any], limit: int | None, budget: int | None
    ) -> None:
        super().__init__()
        self._choose, self._shard = choose, shard
        self.comparison: Comparison | None = None
        self.loads: Loads | None = None
        self._seconds_a_run = 0.0
        self._timed: Checkpoint | None = None
        self._rate = math.inf
        self._lies, self._long, self._tiles, self._details = (widgets.HTML() for _ in range(4))
        dtypes = [("dtype from config", ""), *((name, name) for name in CAST_DTYPES)]
        self.dtype = field(widgets.Dropdown, "Load dtype", options=dtypes)
        adds = given["repeats"] == AUTO
        pairs = MOST_PAIRS if adds else given["repeats"]
        most = max(pairs, 2 * MOST_PAIRS)
        self.repeats = field(widgets.IntSlider, "Pairs of loads", min=1, max=most, value=pairs)
        self.until = checkbox(_UNTIL, adds)
        self.cache = field(widgets.Dropdown, "Page cache", options=_CACHES, value=given["cache"])
        self.first_token = checkbox(_GENERATES, given["first_token"])
        self.trust = checkbox(page.TRUSTS, given["trust_remote_code"])
        self.in_2024 = checkbox(_IN_2024, given["with_2024_stack"])
        self.limit = field(widgets.Dropdown, "Memory limit", options=_limits(limit), value=limit or 0)
        budget_text, example = "" if budget is None else str(budget), "none, or a size: 2GB"
        self.budget = text_field("Memory budget of a third variant", budget_text, placeholder=example)
        for control in (self.repeats, self.until, self.cache, self.budget):
            control.observe(self._say_how_long, "value")
        checked = [self.until, self.first_token, self.in_2024, self.trust]
        self.controls = [self.dtype, self.repeats, self.cache, self.budget, *checked]
        limit_or_why: Any = self.limit
        if why := why_unlimited():
            limit_or_why = widgets.HTML(page.hint(f"No memory limit can be set here: {why}."))
        else:
            self.controls.append(self.limit)
        fields = (self.dtype, self.repeats, self.cache, limit_or_why, self.budget, box("checks", *checked))
        self.buttons.children += (self._long,)
        shown = (self._lies, self.buttons, self._bar, self._message, self._tiles, self._details)
        self._body.children = (box("fields", *fields), *shown)
        self.clear()

    @property
    def missing(self) -> str:
        """What has to be done before: there must be two to compare."""
        if self._choose.checkpoint is None:
            return "nothing to compare: open a checkpoint (step 1)"
        if self._shard.there is None:
            return f"no shards in {self._shard.folder!r} yet: shard first (step 3)"
        if self._shard.report is not None and self._shard.report.freed:
            return "the original was freed: there is nothing to compare the shards with"
        return ""

    @property
    def is_done(self) -> bool:
        """Whether all pairs were compared."""
        return self._seconds_a_run > 0

    def show(self, *, working: bool, busy: bool, is_next: bool) -> None:
        """Say as well what would be compared, and how long that takes."""
        super().show(working=working, busy=busy, is_next=is_next)
        self._long.layout.display = "none" if working else None  # the bar has the time left
        found = self._shard.found if self.comparison is None else ""
        self._lies.value = page.warning(f"{found}: this is what would be compared.") if found else ""
        self._say_how_long()

    def clear(self) -> None:
        """Forget what was found."""
        super().clear()
        self.comparison, self._seconds_a_run = None, 0.0
        self.stopped = "No results yet. Compare starts over."
        self._tiles.value = self._details.value = ""

    def run(self) -> None:
        """Compare, showing what is known after every run."""
        self.clear()
        assert self._choose.checkpoint is not None  # noqa: S101 - or it would be `missing`
        python = others = None
        if self.in_2024.value:
            self.show_progress(0, "Making the environment of 2024, unless it is there")
            python = article_stack()
        if text := self.budget.value.strip():
            budget = parse_size(text)
            others = {f"within {format_size(budget)}": {"max_memory": budget, "python": None}}
        began = time.monotonic()
        self.comparison = compare_loads(
            self._choose.checkpoint.source,
            self._shard.folder,
            dtype=self.dtype.value or None,
            cache=self.cache.value,
            repeats=AUTO if self.until.value else self.repeats.value,
            most=self.repeats.value,
            generate=_TOKENS_IN_A_BUDGET if others else int(self.first_token.value),
            memory_limit=self.limit.value or None,
            python=python,
            options={"trust_remote_code": True} if self.trust.value else None,
            others=others,
            progress=partial(self._progress, began),
            on_sample=self._draw,
            stop=Worker.to_stop.is_set,
        )
        self._seconds_a_run = (time.monotonic() - began) / len(self.comparison.all_runs)
        self._draw(self.comparison, is_complete=True)
        pairs = len({sample.pair for sample in self.comparison.samples})
        self.say(page.done(f"{plural(pairs, 'pair')} compared.") if pairs else "")

    def _say_how_long(self, _: Any = None) -> None:
        pairs, variants = self.repeats.value, 2 + bool(self.budget.value.strip())
        seconds = variants * (1 + pairs) * (self._seconds_a_run or self._guess())
        known = "as the last ones took" if self._seconds_a_run else "estimated"
        about = f"{'at most ' * self.until.value}about {page.whole_seconds(seconds)}"
        self._long.value = page.hint(f"{about} for {plural(pairs, 'pair')}, {known}")

    def _guess(self) -> float:
        """Return about how many seconds a run takes: the original's and the shards' on average."""
        if (loads := self.loads) is None:
            return _START_SECONDS
        converted = (loads.requested.copied_bytes + loads.shards.copied_bytes) / 2
        read: float = (loads.original_bytes + loads.plan.total_bytes) / 2 * (self.cache.value == "cold")
        return _START_SECONDS + converted / _CONVERT_RATE + (read and read / self._disk_rate())

    def _disk_rate(self) -> float:
        """Return bytes a second that the disk of the shards gives; infinite where that cannot be measured."""
        if (there := self._shard.there) is not None and there is not self._timed:
            self._timed, self._rate = there, math.inf
            with suppress(ShardkitError):
                self._rate = measured_rate(map(there.path, there.files), _READING_SECONDS)
        return self._rate

    def _progress(self, began: float, done: int, total: int, label: str) -> bool:
        seconds = (time.monotonic() - began) / done if done else self._guess()
        left = page.whole_seconds(seconds * (total - done))
        run, most = f"Run {min(done + 1, total)} of {total}: {label}", "at most " * self.until.value
        self.show_progress(done / total, f"{run}, {most}about {left} left")
        return not Worker.to_stop.is_set()

    def _draw(self, comparison: Comparison, *, is_complete: bool = False) -> None:
        self.comparison = comparison
        if not comparison.failures and not any(map(comparison.ratios_of, comparison.names)):
            self._tiles.value = page.hint("Figures appear after the first pair.")
            return
        self.stopped = "Results so far are kept below. Compare starts over."
        self._tiles.value = page.tiles(comparison)
        png = comparison_png(comparison)
        found = [comparison.summary().html(), page.picture(png, alternative(comparison.verdict))]
        if is_complete:
            data = json.dumps(comparison.to_dict()).encode()
            found.append(page.download("comparison.json", "application/json", data))
            found.append(page.download("comparison.png", "image/png", png))
            found.append(page.download("comparison.html", "text/html", comparison.to_html().encode()))
        self._details.value = page.details("Details", *found, name="comparison")


def _limits(asked: int | None) -> list[tuple[str, int]]:
    limits = {size: f"{name}: {format_size(size)}" for name, size in memory_limits().items()}
    if asked is not None:
        limits.setdefault(asked, format_size(asked))
    return [("none", 0), *((limits[size], size) for size in sorted(limits))]
