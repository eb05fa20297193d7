"""Step 4: load both, and say what differs."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.advice import Loads
from shardkit.app.choose_step import Choose
from shardkit.app.job_thread import Worker
from shardkit.app.shard_step import Shard
from shardkit.app.step import TRUSTS, Step, box, field, in_the_app
from shardkit.base.disk import measured_rate
from shardkit.base.errors import ShardkitError
from shardkit.base.record import escaped, plural
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.hosts import memory_limits
from shardkit.compare.comparison import Comparison
from shardkit.compare.experiment import compare_loads
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.measure.article_stack import article_stack
from shardkit.measure.limit import why_unlimited
from shardkit.measure.samples import AUTO, MOST_PAIRS, Repeats
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
        self,
        choose: Choose,
        shard: Shard,
        *,
        repeats: Repeats,
        cache: str,
        first_token: bool,
        trust: bool,
        limit: int | None,
        budget: int | None,
        in_2024: bool,
    ) -> None:
        super().__init__()
        self._choose, self._shard = choose, shard
        self.comparison: Comparison | None = None
        self.loads: Loads | None = None
        self._seconds_a_run, self._is_complete = 0.0, False
        self._timed: Checkpoint | None = None
        self._rate = math.inf
        self._lies, self._long, self._tiles, self._details = (widgets.HTML() for _ in range(4))
        dtypes = [("dtype from config", ""), *((name, name) for name in CAST_DTYPES)]
        self.dtype = field(widgets.Dropdown, "Load dtype", options=dtypes)
        pairs = repeats if isinstance(repeats, int) else MOST_PAIRS
        self.repeats = field(
            widgets.IntSlider, "Pairs of loads", min=1, max=max(pairs, 2 * MOST_PAIRS), value=pairs
        )
        self.until = field(widgets.Checkbox, _UNTIL, value=repeats == AUTO, indent=False)
        self.cache = field(widgets.Dropdown, "Page cache", options=_CACHES, value=cache)
        self.first_token = field(widgets.Checkbox, _GENERATES, value=first_token, indent=False)
        self.trust = field(widgets.Checkbox, TRUSTS, value=trust, indent=False)
        self.in_2024 = field(widgets.Checkbox, _IN_2024, value=in_2024, indent=False)
        self.limit = field(widgets.Dropdown, "Memory limit", options=_limits(limit), value=limit or 0)
        self.budget = _budget_field(budget)
        for control in (self.repeats, self.until, self.cache, self.budget):
            control.observe(self._say_how_long, "value")
        checked = [self.until, self.first_token, self.in_2024, self.trust]
        self.controls = [self.dtype, self.repeats, self.cache, self.budget, *checked]
        limit_or_why: Any = self.limit
        if why := why_unlimited():
            limit_or_why = widgets.HTML(page.hint(f"No memory limit can be set here: {why}."))
        else:
            self.controls.append(self.limit)
        checks = box("checks", *checked)
        fields = [self.dtype, self.repeats, self.cache, limit_or_why, self.budget, checks]
        self.buttons.children += (self._long,)
        shown = (self._lies, self.buttons, self._bar, self._message, self._tiles, self._details)
        self.place(box("fields", *fields), *shown)
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
        return self._is_complete

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
        self.comparison, self._is_complete, self._seconds_a_run = None, False, 0.0
        self.stopped = "No results yet. Compare starts over."
        self._tiles.value = self._details.value = ""

    def run(self) -> None:
        """Compare, showing what is known after every run."""
        self.clear()
        assert self._choose.checkpoint is not None  # noqa: S101 - or it would be `missing`
        python, others = self._python(), self._others()
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
            stop=Worker.stopping,
        )
        self._is_complete = True
        self._seconds_a_run = (time.monotonic() - began) / len(self.comparison.all_runs)
        self._draw(self.comparison, *_downloads(self.comparison))
        pairs = len({sample.pair for sample in self.comparison.samples})
        self.say(page.done(f"{plural(pairs, 'pair')} compared.") if pairs else "")

    def _python(self) -> Path | None:
        if not self.in_2024.value:
            return None
        self.show_progress(0, "Making the environment of 2024, unless it is there")
        return article_stack()

    def _others(self) -> dict[str, dict[str, Any]] | None:
        if not (text := self.budget.value.strip()):
            return None
        budget = parse_size(text)
        return {f"within {format_size(budget)}": {"max_memory": budget, "python": None}}

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
        seconds = (time.monotonic() - began) / done if done else self._seconds_a_run or self._guess()
        left = page.whole_seconds(seconds * (total - done))
        run, most = f"Run {min(done + 1, total)} of {total}: {label}", "at most " * self.until.value
        self.show_progress(done / total, f"{run}, {most}about {left} left")
        return not Worker.stopping()

    def _draw(self, comparison: Comparison, *downloads: str) -> None:
        self.comparison = comparison
        if not comparison.failures and not any(map(comparison.ratios_of, comparison.names)):
            self._tiles.value = page.hint("Figures appear after the first pair.")
            return
        self.stopped = "Results so far are kept below. Compare starts over."
        self._tiles.value = in_the_app(page.tiles(comparison), escaped)
        self._details.value = page.details(
            "Details",
            in_the_app(comparison.summary().html(), escaped),
            page.picture(comparison_png(comparison), alternative(comparison.verdict)),
            *downloads,
            name="comparison",
        )


def _budget_field(budget: int | None) -> widgets.Text:
    return field(
        widgets.Text,
        "Memory budget of a third variant",
        value="" if budget is None else str(budget),
        placeholder="none, or a size: 2GB",
        continuous_update=False,
    )


def _limits(asked: int | None) -> list[tuple[str, int]]:
    """Return the memory limits to choose from: none, those of the free hosts, and what was asked for."""
    limits = {size: f"{name}: {format_size(size)}" for name, size in memory_limits().items()}
    if asked is not None:
        limits.setdefault(asked, format_size(asked))
    return [("none", 0), *((limits[size], size) for size in sorted(limits))]


def _downloads(comparison: Comparison) -> list[str]:
    document = json.dumps(comparison.to_dict(), ensure_ascii=False)
    return [
        page.download("comparison.json", "application/json", document.encode()),
        page.download("comparison.png", "image/png", comparison_png(comparison)),
        page.download("comparison.html", "text/html", comparison.to_html().encode()),
    ]
