"""What every step of the app has in common."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.job_thread import Worker
from shardkit.base.errors import Cancelled, ShardkitError


def field(kind: Any, label: str, **options: Any) -> Any:
    """Return a control whose label a screen reader finds, as wide as there is room for."""
    made = kind(description=label, style={"description_width": "initial"}, **options)
    if made.has_trait("tooltip"):  # or a label says "null" under a pointer
        made.tooltip = ""
    return made


def checkbox(label: str, is_checked: bool) -> Any:
    """Return a box to be checked."""
    return field(widgets.Checkbox, label, value=bool(is_checked), indent=False)


def text_field(label: str, text: str = "", kind: Any = widgets.Text, **options: Any) -> Any:
    """Return a field whose text counts once it is entered."""
    return field(kind, label, value=text, continuous_update=False, **options)


def box(name: str, *children: Any) -> Any:
    """Return a box that the stylesheet lays out by its name."""
    made = widgets.Box(children)
    made.add_class(f"sk-{name}")
    return made


class Step:
    """A heading, controls that are fixed while a job runs, a button that starts it, and how it went.

    As long as something has to be done first, there is the heading alone.
    """

    number = 0
    title = hint = later = ""  # `later` stands for the hint where the step cannot be reached yet
    button = working = ""  # what the button says, and what it says while the job runs
    stopped = ""  # what is left of a job that was asked to stop

    def __init__(self) -> None:
        self.controls: list[Any] = []
        self.error: Exception | None = None
        self.start, self.cancel = widgets.Button(description=self.button), widgets.Button()
        self.cancel.on_click(self._cancel)
        self.buttons = box("buttons", self.start, self.cancel)
        self._may_cancel, self._refusal = False, ""
        self._bar = widgets.FloatProgress(max=1.0)
        self._bar.add_class("sk-bar")
        self._message, self._heading, self._body = widgets.HTML(), widgets.HTML(), box("body")
        self._message.add_class("sk-message")
        self.box = box("step", self._heading, self._body)

    def run(self) -> None:
        """Do the step's job; raises what fails."""
        raise NotImplementedError

    @property
    def missing(self) -> str:
        """What has to be done first; empty if nothing."""
        return ""

    @property
    def is_done(self) -> bool:
        """Whether there is what the step is for."""
        raise NotImplementedError

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
        """Return what the page says of an error; a stop is none."""
        if isinstance(error, Cancelled):
            return page.status(f"Stopped. {self.stopped}")
        return page.error(_plain_words(error))

    def say(self, html: str) -> None:
        """Show a line of HTML under the buttons."""
        self._message.value = html

    def show_progress(self, done: float | None, line: str) -> None:
        """Show how far a job is: the share of it that is done, None where nobody knows; and in words."""
        (self._bar.add_class if done is None else self._bar.remove_class)("sk-waits")
        self._bar.value = 1 if done is None else done
        self.say(page.status(line))

    def refuse(self, html: str) -> None:
        """Say why not now; it goes as soon as anything changes."""
        self._refusal = html
        self.say(html)

    def show(self, *, working: bool, busy: bool, is_next: bool) -> None:
        """Let heading, buttons and controls say what can be done now, and what was done."""
        if self._message.value == self._refusal:
            self.say("")
        missing, done = bool(self.missing), self.is_done and not working
        self._heading.value = page.heading(
            self.number, self.title, self.later if missing else self.hint, later=missing, done=done
        )
        self._body.layout.display = "none" if missing else None
        self._bar.layout.display = None if working else "none"
        self.start.description = self.working if working else self.button
        self.start.button_style = "primary" if is_next else ""
        _dim(self.start, busy or missing)
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
            Worker.to_stop.set()


def _dim(button: Any, dim: bool) -> None:
    """Show that a button does nothing now. A disabled one would lose the focus, and with it the keyboard."""
    (button.add_class if dim else button.remove_class)("sk-dim")


def _plain_words(error: Exception) -> str:
    """Say what went wrong as a person would, whatever was raised."""
    if isinstance(error, ShardkitError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'system'}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "this machine's memory ran out: restart the kernel, or choose a smaller model"
    return f"unexpected {type(error).__name__}: {error}. This is a bug in shardkit: please report it"
