"""Step 3: carry out the plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.job_thread import Worker
from shardkit.app.plan_step import Plan
from shardkit.app.step import Step, field
from shardkit.base.errors import DestinationError, ShardkitError
from shardkit.base.jobs import Progress
from shardkit.base.record import plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.measure.quantities import format_seconds
from shardkit.shard.destination import leftovers
from shardkit.shard.engine import shard_checkpoint
from shardkit.shard.report import ShardReport
from shardkit.show.progress import STAGES

_SHOW_EVERY_SECONDS = 0.15  # a page that is told more often than that falls behind
_GOES_ON = "Shard resumes where it stopped"


class Shard(Step):
    """Writes the shards and proves them."""

    title, button, working = "3. Shard", "Shard", "Sharding…"
    hint = "Copies byte ranges, loads nothing, then compares every tensor. The source is never changed."
    stopped = f"Finished shards are kept: {_GOES_ON}."

    def __init__(self, plan: Plan, destination: str, overwrite: bool) -> None:
        super().__init__()
        self._plan = plan
        self.report: ShardReport | None = None
        self.written: Callable[[], None] = lambda: None
        self.destination = field(
            widgets.Text, "Destination folder", value=destination, continuous_update=False
        )
        self.overwrite = field(widgets.Checkbox, "Replace an existing checkpoint", value=overwrite)
        self.controls = [self.destination, self.overwrite]
        self.box.add_class("sk-runs")
        buttons = widgets.HBox([self.start, self.cancel])
        self.place(self.destination, self.overwrite, buttons, self._bar, self._message)

    @property
    def folder(self) -> str:
        """Where the shards are to be written."""
        return str(self.destination.value).strip()

    @property
    def missing(self) -> str:
        """What has to be done before: a plan."""
        if self._plan.plan is not None:
            return ""
        why = "open a checkpoint (step 1)" if self._plan.missing else "it cannot be made (step 2)"
        return f"there is no plan: {why}"

    def clear(self) -> None:
        """Forget what was written."""
        super().clear()
        self.report = None
        self.look()

    def look(self, _: Any = None) -> None:
        """Say so where an earlier run was interrupted, or no folder can be."""
        try:
            if self.unfinished:
                self.say(page.status(f"A run was interrupted here. With the same plan, {_GOES_ON}."))
        except DestinationError as error:
            self.refuse(self.in_words(error))

    @property
    def unfinished(self) -> bool:
        """Whether an interrupted run has left something beside the destination."""
        try:
            return bool(leftovers(self.folder))
        except ValueError:  # of a NUL, or half a character
            raise DestinationError(f"{self.folder!r} is not a valid folder name") from None

    def run(self) -> None:
        """Write, verify, publish."""
        plan, folder = self._plan.plan, self.folder
        assert plan is not None  # noqa: S101 - or it would be `missing`
        if not folder:
            raise ShardkitError("no destination folder: enter one")
        self.report = None
        self.say(page.status("Resuming …" if self.unfinished else "Starting …"))
        self.report = shard_checkpoint(
            plan.source,
            folder,
            max_shard_size=plan.max_shard_size,
            strategy=plan.strategy,
            dtype=plan.dtype,
            overwrite=self.overwrite.value,
            progress=_ByteProgress(self.show_progress),
        )
        self.written()
        self.say(_told(self.report))


def _told(report: ShardReport) -> str:
    proof = report.verification
    path = shown_path(report.destination)
    words = f"{plural(len(report.files), 'file')} in {path}, written in {report.copy_seconds:.2f} s"
    if proof is not None:
        words += f"; verified: all {plural(proof.tensors, 'tensor')} equal"
    if report.reused:
        words += f"; {plural(len(report.reused), 'file')} of the interrupted run checked and kept"
    return page.done(
        f"{words}. Load it like any model, or compare the loads below.",
        f"AutoModelForCausalLM.from_pretrained({path!r}, dtype={report.dtype or 'auto'!r})",
    )


class _ByteProgress:
    """Shows the progress of a job in bytes: a bar, and in words how much, how fast, how long yet."""

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show, self._stage, self._began, self._shown_at = show, "", 0.0, 0.0

    def __call__(self, progress: Progress) -> bool:
        """Show where the job stands; False asks it to stop."""
        now, done, total = time.monotonic(), progress.done_bytes, progress.total_bytes
        if progress.stage != self._stage:
            self._stage, self._began = progress.stage, now
        if now - self._shown_at >= _SHOW_EVERY_SECONDS or done == total:
            words = STAGES.get(progress.stage, progress.stage).capitalize()
            line = f"{words}: {format_size(done)} of {format_size(total)}" if total else words
            if done and now > self._began:
                rate = done / (now - self._began)
                line += f", {format_size(rate)}/s, {format_seconds((total - done) / rate)} left"
            self._shown_at = now
            self._show(done / total if total else 1, line)
        return not Worker.stopping()
