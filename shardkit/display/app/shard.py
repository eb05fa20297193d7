"""Step 3: carry out the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from shardkit.destination import leftovers
from shardkit.display.app import page
from shardkit.display.app.step import ByteProgress, Step, field
from shardkit.errors import Cancelled, DestinationError, ShardkitError
from shardkit.plan import ShardPlan
from shardkit.record import plural, shown_path
from shardkit.write import ShardReport, shard_checkpoint

_WORDS = {"check": "Checking what is there", "copy": "Writing shards", "verify": "Verifying every byte"}
_GOES_ON = "Shard goes on where it stopped"


class Shard(Step):
    """Writes the shards and proves them.

    Attributes
    ----------
    plan
        What to carry out, of `source`.
    report
        What was written; None until it is.
    """

    def __init__(self, destination: str, overwrite: bool) -> None:
        super().__init__(
            3,
            "Shard",
            "Copies byte ranges, loads nothing, then compares every tensor. The source is never changed.",
            button="Shard",
            working="Sharding…",
        )
        self.source, self.plan = "", None
        self.report: ShardReport | None = None
        self.written: Callable[[], None] = lambda: None
        self.destination = field(widgets.Text, "Into the folder", value=destination, continuous_update=False)
        self.overwrite = field(widgets.Checkbox, "Replace a checkpoint that is there", value=overwrite)
        self.controls = [self.destination, self.overwrite]
        self.box.add_class("sk-runs")
        buttons = widgets.HBox([self.start, self.cancel])
        self.place(self.destination, self.overwrite, buttons, self._bar, self._message)

    plan: ShardPlan | None

    @property
    def missing(self) -> str:
        """What has to be done before: a plan."""
        if self.plan is not None:
            return ""
        why = "it cannot be made (step 2)" if self.source else "open a checkpoint (step 1)"
        return f"there is no plan to carry out: {why}"

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
        destination = self.destination.value.strip()
        try:
            return bool(leftovers(destination))
        except ValueError:  # of a NUL, or half a character
            raise DestinationError(f"{destination!r}: no folder can be called that") from None

    def run(self) -> None:
        """Write, verify, publish."""
        assert self.plan is not None  # noqa: S101 - or it would be `missing`
        destination = self.destination.value.strip()
        if not destination:
            raise ShardkitError("no folder is named: say where the shards are to be written")
        self.report = None
        self.say(page.status("Going on where it stopped …" if self.unfinished else "Starting …"))
        self.report = shard_checkpoint(
            self.source,
            destination,
            max_shard_size=self.plan.max_shard_size,
            strategy=self.plan.strategy,
            dtype=self.plan.dtype,
            overwrite=self.overwrite.value,
            progress=ByteProgress(self, self._bar, _WORDS),
        )
        self.written()
        self.say(_told(self.report))

    def in_words(self, error: Exception) -> str:
        """Return what the page says of an error; a stop is none."""
        if isinstance(error, Cancelled):
            return page.status(f"Stopped as asked. What is finished is kept: {_GOES_ON}.")
        return super().in_words(error)


def _told(report: ShardReport) -> str:
    proof = report.verification
    path = shown_path(report.destination)
    words = f"{plural(len(report.files), 'file')} in {path}, written in {report.copy_seconds:.2f} s"
    if proof is not None:
        words += f"; verified: all {plural(proof.tensors, 'tensor')} equal"
    if report.reused:
        words += f"; {plural(len(report.reused), 'file')} of the interrupted run checked and kept"
    return page.done(
        f"{words}. Load it as any model, or compare the loads below.",
        f"AutoModelForCausalLM.from_pretrained({path!r}, dtype={report.dtype or 'auto'!r})",
    )
