"""What every step of the app has in common."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import ipywidgets as widgets

from shardkit.display.app import page
from shardkit.display.app.worker import Worker, plain_words
from shardkit.measure.measurement import format_seconds
from shardkit.run import Progress
from shardkit.sizes import format_size

_SHOW_EVERY_SECONDS = 0.15  # a page that is told more often than that falls behind
_RATE_OVER_SECONDS = 5.0
# Messages name what to write in Python or a shell; the app has controls for it.
_IN_THE_APP = {
    "replace it (overwrite=True, --overwrite)": 'tick "Replace a checkpoint that is there"',
    "leave out dtype": 'set "Write as" to "as it is stored" (step 2)',
    "let it be (allow_overflow=True, --allow-overflow)": '"as it is stored" (step 2)',
    "lower max_shard_size": "take a smaller shard size (step 2)",
    "same_model=False compares them all the same": "shard this one into another folder (step 3)",
}
_WIDE = {"width": "100%", "max_width": "46rem", "margin": "2px 0"}


def field(kind: Any, label: str, **options: Any) -> Any:
    """Return a control whose label a screen reader finds, as wide as there is room for."""
    return kind(description=label, style={"description_width": "9rem"}, layout=_WIDE, **options)


class Step:
    """A heading, controls, a button that starts, and a line that says how it went.

    Attributes
    ----------
    box
        The widget that shows it.
    controls
        What a person sets; not while a job runs.
    start
        The button.
    error
        What the last attempt raised; None if it went well.
    """

    def __init__(self, number: int, title: str, hint: str, *, button: str, working: str) -> None:
        self.controls: list[Any] = []
        self.error: Exception | None = None
        self._button, self._working = button, working
        self.start = widgets.Button(description=button, button_style="primary", layout={"width": "11rem"})
        self.cancel = widgets.Button(description="Cancel", layout={"width": "9rem"})
        self.cancel.on_click(self._cancel)
        self._may_cancel, self._refusal = False, ""
        self._bar = widgets.FloatProgress(max=1.0, layout=_WIDE)
        self._heading, self._message = widgets.HTML(page.heading(number, title, hint)), widgets.HTML()
        self._message.add_class("sk-message")
        self.box = widgets.VBox()
        self.box.add_class("sk-step")

    def place(self, *rows: Any) -> None:
        """Put the step together: the heading, then `rows`."""
        self.box.children = (self._heading, *rows)

    def run(self) -> None:
        """Do the step's job; raises what fails."""
        raise NotImplementedError

    @property
    def missing(self) -> str:
        """What has to be done first; empty if nothing."""
        return ""

    def clear(self) -> None:
        """Forget how the last attempt ended."""
        self.error, self._bar.value, self._bar.bar_style = None, 0.0, ""
        self.refuse("")

    def attempt(self) -> None:
        """Do the step's job and show how it ended."""
        Step.clear(self)
        try:
            self.run()
        except Exception as error:
            self.error, self._bar.bar_style = error, "danger"
            self.say(self.in_words(error))
        else:
            self._bar.value, self._bar.bar_style = self._bar.max, "success"

    def in_words(self, error: Exception) -> str:
        """Return what the page says of an error."""
        told = plain_words(error)
        for words, here in _IN_THE_APP.items():
            told = told.replace(words, here)
        return page.error(told)

    def say(self, html: str) -> None:
        """Show a line of HTML under the buttons."""
        self._message.value = html

    def refuse(self, html: str) -> None:
        """Say why not now; it goes as soon as anything changes."""
        self._refusal = html
        self.say(html)

    def show(self, *, working: bool, busy: bool) -> None:
        """Let the buttons and controls say what can be done now."""
        if self._message.value == self._refusal:
            self.say("")
        self.start.description = self._working if working else self._button
        _dim(self.start, busy or bool(self.missing))
        self.let_cancel(working)
        for control in self.controls:
            control.disabled = busy

    def let_cancel(self, allowed: bool) -> None:
        """Let the cancel button stop what runs, or nothing."""
        self._may_cancel = allowed
        self.cancel.description = "Cancel"
        _dim(self.cancel, not allowed)

    def _cancel(self, _: Any) -> None:
        if self._may_cancel:
            self.let_cancel(False)
            self.cancel.description = "Stopping…"
            Worker.stop()


def _dim(button: Any, dim: bool) -> None:
    """Show that a button does nothing now. A disabled one would lose the focus, and with it the keyboard."""
    (button.add_class if dim else button.remove_class)("sk-dim")


class ByteProgress:
    """Shows the progress of a job in bytes: a bar, and in words how much, how fast, how long yet."""

    def __init__(self, step: Step, bar: Any, words: dict[str, str]) -> None:
        self._step, self._bar, self._words = step, bar, words
        self._stage, self._shown_at = "", 0.0
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, progress: Progress) -> bool:
        """Show where the job stands; False asks it to stop."""
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._seen.clear()
        self._seen.append((now, progress.done_bytes))
        while now - self._seen[0][0] > _RATE_OVER_SECONDS:
            self._seen.popleft()
        if now - self._shown_at >= _SHOW_EVERY_SECONDS or progress.done_bytes == progress.total_bytes:
            self._shown_at = now
            self._bar.value = progress.done_bytes / (progress.total_bytes or 1)
            self._step.say(page.status(self._line(progress)))
        return not Worker.stopping()

    def _line(self, progress: Progress) -> str:
        words = self._words.get(progress.stage, progress.stage)
        line = f"{words}: {format_size(progress.done_bytes)} of {format_size(progress.total_bytes)}"
        (began, before), (now, done) = self._seen[0], self._seen[-1]
        if done == before or now == began:
            return line
        rate = (done - before) / (now - began)
        left = format_seconds((progress.total_bytes - done) / rate)
        return f"{line}, {format_size(rate)}/s, {left} left"
