"""Step 4: load both, and say what differs."""

from __future__ import annotations

import json
import os
import time
from functools import partial

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.choose_step import Choose
from shardkit.app.job_thread import Worker
from shardkit.app.shard_step import Shard
from shardkit.app.step import TRUSTS, Area, Step, field, in_the_app
from shardkit.base.record import escaped
from shardkit.base.sizes import format_size
from shardkit.checkpoint.hosts import HOSTS
from shardkit.compare.comparison import Comparison
from shardkit.compare.experiment import compare_loads
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.measure.limit import why_unlimited
from shardkit.measure.quantities import format_seconds
from shardkit.show.plots import comparison_png
from shardkit.show.report_page import alternative

_CACHES = (("cold: read from the disk", "cold"), ("warm: from the page cache", "warm"))
_GENERATES = "Also time the first token, which includes work that the load deferred"
_MOST_REPEATS = 20


class Compare(Step):
    """Loads both checkpoints in turn, each time in a fresh process; if stopped, it keeps what it found."""

    title, button, working = "4. Compare", "Compare", "Comparing…"
    hint = "Loads the original and the shards in turn, each time in a fresh process, and reports differences."

    def __init__(
        self,
        choose: Choose,
        shard: Shard,
        repeats: int,
        cache: str,
        first_token: bool,
        trust: bool,
        limit: int | None,
    ) -> None:
        super().__init__()
        self._choose, self._shard = choose, shard
        self.comparison: Comparison | None = None
        dtypes = [("dtype from config", ""), *((name, name) for name in CAST_DTYPES)]
        self.dtype = field(widgets.Dropdown, "Load dtype", options=dtypes)
        self.repeats = field(
            widgets.IntSlider, "Pairs of loads", min=1, max=max(repeats, _MOST_REPEATS), value=repeats
        )
        self.cache = field(widgets.Dropdown, "Page cache", options=_CACHES, value=cache)
        self.first_token = field(widgets.Checkbox, _GENERATES, value=first_token)
        self.trust = field(widgets.Checkbox, TRUSTS, value=trust)
        limits, why = _limits(limit), why_unlimited()
        self.limit = field(widgets.Dropdown, "Memory limit", options=limits, value=limit or 0)
        settings = [self.dtype, self.repeats, self.cache, self.first_token, self.trust, self.limit]
        self.controls, self.limit.disabled = settings[:-1] if why else settings, bool(why)
        hint = page.hint(f"No memory limit can be set here: {why}.") if why else ""
        self._verdict = Area("verdict", "verdict", "The verdict and its figures appear here, run by run.")
        self._picture, self._downloads = widgets.HTML(), widgets.HTML()
        self.box.add_class("sk-runs")
        buttons = widgets.HBox([self.start, self.cancel])
        shown = [self._verdict, self._downloads, self._picture]
        self.place(*settings, widgets.HTML(hint), buttons, self._bar, self._message, *shown)
        self.clear()

    @property
    def missing(self) -> str:
        """What has to be done before: there must be two to compare."""
        if self._choose.checkpoint is None:
            return "nothing to compare: open a checkpoint (step 1)"
        if not os.path.isdir(os.path.expanduser(self._shard.folder)):
            return f"{self._shard.folder}: does not exist yet: shard first (step 3)"
        return ""

    def clear(self) -> None:
        """Forget what was found."""
        super().clear()
        self.comparison = None
        self.stopped = "No results yet. Compare starts over."
        self._verdict.clear()
        self._downloads.value = page.links()
        self._picture.value = page.no_picture(
            "Times, peaks and memory over time are plotted here, run by run."
        )

    def run(self) -> None:
        """Compare, showing what is known after every run."""
        self.clear()
        assert self._choose.checkpoint is not None  # noqa: S101 - or it would be `missing`
        self.comparison = compare_loads(
            self._choose.checkpoint.source,
            self._shard.folder,
            dtype=self.dtype.value or None,
            cache=self.cache.value,
            repeats=self.repeats.value,
            generate=int(self.first_token.value),
            memory_limit=self.limit.value or None,
            options={"trust_remote_code": True} if self.trust.value else None,
            progress=partial(self._progress, time.monotonic()),
            on_sample=self._draw,
            stop=Worker.stopping,
        )
        self._downloads.value = page.links(*_downloads(self.comparison))
        self.say(page.done(in_the_app(self.comparison.verdict)))

    def _progress(self, began: float, done: int, total: int, label: str) -> bool:
        line = f"Run {min(done + 1, total)} of {total}: {label}"
        if done:
            left = (time.monotonic() - began) / done * (total - done)
            line += f", about {format_seconds(left)} left"
        self.show_progress(done / total, line)
        return not Worker.stopping()

    def _draw(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.stopped = "Results so far are kept below. Compare starts over."
        self._verdict.fill(in_the_app(comparison.summary().html(), escaped))
        self._picture.value = page.picture(comparison_png(comparison), alternative(comparison.verdict))


def _limits(asked: int | None) -> list[tuple[str, int]]:
    """Return the memory limits to choose from: none, those of the free hosts, and what was asked for."""
    limits = {size: f"{name}: {format_size(size)}" for name, size in HOSTS.items()}
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
