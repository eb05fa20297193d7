"""Step 3: carry out the plan."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from shardkit.app import page
from shardkit.app.choose_step import Choose
from shardkit.app.job_thread import Worker
from shardkit.app.plan_step import Plan
from shardkit.app.step import Step, box, checkbox, text_field
from shardkit.base.errors import DestinationError, ShardkitError
from shardkit.base.jobs import Progress
from shardkit.base.record import plural, shown_path
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import DTYPE_NAMES
from shardkit.measure.quantities import format_seconds
from shardkit.shard.destination import check_destination, leftovers, resolve
from shardkit.shard.engine import shard_checkpoint
from shardkit.shard.report import ShardReport
from shardkit.show.progress import STAGES

_SHOW_EVERY_SECONDS = 0.15  # a page that is told more often than that falls behind
_GOES_ON = "Shard resumes where it stopped"
_ALREADY = "holds these files already: compare them in step 4."
_FREES = "The weights of the source are removed while shards are written and verified. It cannot be undone."


class Shard(Step):
    """Writes the shards and proves them."""

    number, title, button, working = 3, "Shard", "Shard", "Sharding…"
    hint = "Copies byte ranges, loads nothing, compares all. The source is not changed, unless you free it."
    later = "writes the shards and verifies them: once there is a plan"
    stopped = f"Finished shards are kept: {_GOES_ON}."

    def __init__(self, choose: Choose, plan: Plan, destination: str, overwrite: bool) -> None:
        super().__init__()
        self._choose, self._plan = choose, plan
        self.report: ShardReport | None = None
        self.written: Callable[[], None] = lambda: None
        self.destination = text_field("Destination folder", destination)
        self.overwrite, self.free_source = checkbox(page.REPLACE, overwrite), checkbox(page.FREE, False)
        for control in (self.overwrite, self.free_source):
            control.observe(self.look, "value")
        self.controls = [self.destination, self.overwrite, self.free_source]
        self._body.children = (box("fields", *self.controls), self.buttons, self._bar, self._message)

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

    @property
    def there(self) -> Checkpoint | None:
        """The checkpoint in the destination folder; None if there is none, or none that can be opened."""
        folder = os.path.abspath(os.path.expanduser(self.folder))
        return _opened(folder, os.stat(folder).st_mtime_ns) if self.folder and os.path.isdir(folder) else None

    @property
    def is_done(self) -> bool:
        """Whether the destination has the files that the plan above describes."""
        plan, there = self._plan.plan, self.there
        if plan is None or there is None:
            return False
        planned = {t.source.name: (shard.file, t.dtype) for shard in plan.shards for t in shard.tensors}
        return planned == {t.name: (t.file, t.dtype) for t in there.tensors.values()}

    @property
    def found(self) -> str:
        """What the destination holds where that is another plan's; empty otherwise."""
        plan, there = self._plan.plan, self.there
        if plan is None or there is None or self.is_done:
            return ""
        held = f"{plural(len(there.files), 'file')} ({', '.join(DTYPE_NAMES[d] for d in there.dtypes)})"
        planned = f"{plural(len(plan.shards), 'file')} ({plan.dtype or 'as stored'})"
        return f"{self.folder} holds {held}, not the plan above, {planned}"

    def clear(self) -> None:
        """Forget what was written."""
        super().clear()
        self.report, self.free_source.value = None, False

    def look(self, _: Any = None) -> None:
        """Say what a click would meet: an interrupted run, a folder that exists, one that cannot be."""
        if self.missing or self._may_cancel:  # or it would overwrite what the job says
            return
        try:
            self.say(self._met() + page.warning(_FREES) * bool(self.free_source.value))
        except DestinationError as error:
            self.refuse(self.in_words(error))

    def in_words(self, error: Exception) -> str:
        """Return what the page says of an error; a second click on what is done is none."""
        if isinstance(error, DestinationError) and self.is_done and not self.overwrite.value:
            return page.done(f'{self.folder} {_ALREADY} To write them again, check "{page.REPLACE}".')
        return super().in_words(error)

    def _met(self) -> str:
        if self.unfinished:
            return page.status(f"A run was interrupted here. With the same plan, {_GOES_ON}.")
        if self.found:
            check = f'Check "{page.REPLACE}", or choose another.'
            how = "Shard replaces it." if self.overwrite.value else check
            return page.warning(f"{self.found}. {how}")
        if self.is_done and not self.overwrite.value:
            return page.done(f"{self.folder} {_ALREADY}")
        checkpoint = self._choose.checkpoint
        if checkpoint is not None and self.folder:
            try:
                check_destination(checkpoint, resolve(self.folder), self.overwrite.value)
            except DestinationError as error:
                return page.warning(str(error))
        return ""

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
        self._stage, self._began, self._shown_at = "", 0.0, 0.0
        self.say(page.status("Resuming …" if self.unfinished else "Starting …"))
        self.report = shard_checkpoint(
            plan.source,
            folder,
            max_shard_size=plan.max_shard_size,
            strategy=plan.strategy,
            dtype=plan.dtype,
            overwrite=self.overwrite.value,
            free_source=self.free_source.value,
            progress=self._progress,
        )
        self.written()
        self.say(_told(self.report))

    def _progress(self, progress: Progress) -> bool:
        """Show in bytes how much of a stage is done, how fast, how long yet; False asks the job to stop."""
        now, done, total = time.monotonic(), progress.done_bytes, progress.total_bytes
        if progress.stage != self._stage:
            self._stage, self._began = progress.stage, now
        if now - self._shown_at >= _SHOW_EVERY_SECONDS or done == total:
            words = STAGES.get(progress.stage, progress.stage).capitalize()
            line = f"{words}: {format_size(done)} of {format_size(total)}" if total else words
            if done and now > self._began:
                rate = done / (now - self._began)
                line += f", {format_size(rate)}/s, {page.whole_seconds((total - done) / rate)} left"
            self._shown_at = now
            self.show_progress(done / total if total else None, line)
        return not Worker.to_stop.is_set()


@lru_cache(maxsize=1)
def _opened(folder: str, _changed_at: int) -> Checkpoint | None:
    with suppress(ShardkitError):
        return Checkpoint.open(folder)
    return None


def _told(report: ShardReport) -> str:
    proof = report.verification
    path = shown_path(report.destination)
    words = f"{plural(len(report.files), 'file')} in {path}, in {format_seconds(report.seconds)}"
    if proof is not None:
        to_what = " to the cast of the source" * bool(proof.cast)
        words += f"; verified: all {plural(proof.tensors, 'tensor')} equal{to_what}"
    if report.reused:
        words += f"; {plural(len(report.reused), 'file')} of the interrupted run checked and kept"
    load = f"AutoModelForCausalLM.from_pretrained({path!r}, dtype={report.dtype or 'auto'!r})"
    details = page.details("Details", report.summary().html(), name="report")
    following = "" if report.freed else ", or compare the loads in step 4"
    return page.done(f"{words}. Load it like any model{following}.", load) + details
