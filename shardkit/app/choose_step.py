"""Step 1: which checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.step import Area, Step, field
from shardkit.base.errors import ShardkitError
from shardkit.base.record import Summary, Table
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.estimate import Estimate
from shardkit.demo import make_demo_checkpoint

_DEMOS = {"mistral-demo-64MB": "64MB", "mistral-demo-512MB": "512MB"}
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_SUGGESTIONS = (
    ("type a folder, a file or a Hub id below", ""),
    ("demo model, 64 MB, generated locally: fits anywhere", "mistral-demo-64MB"),
    ("demo model, 512 MB, generated locally", "mistral-demo-512MB"),
    (f"Hub: {_MINILM} (small: fits Binder)", _MINILM),
    ("Hub: HuggingFaceTB/SmolLM2-135M (small: fits Binder)", "HuggingFaceTB/SmolLM2-135M"),
    ("Hub: mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
    ("Hub: tiiuae/falcon-7b-instruct", "tiiuae/falcon-7b-instruct"),
)


class Choose(Step):
    """Names a checkpoint, opens it and shows what it holds."""

    title, button, working = "1. Choose", "Open", "Opening…"
    hint = "Any safetensors or PyTorch checkpoint. Opening it reads only the headers, not the weights."

    def __init__(self, source: str) -> None:
        super().__init__()
        self.checkpoint: Checkpoint | None = None
        self.suggestion = field(widgets.Dropdown, "Suggestions", options=_SUGGESTIONS)
        self.source = field(
            widgets.Text,
            "Checkpoint",
            value=source,
            placeholder="folder, weights file or Hub id",
            continuous_update=False,
        )
        self.entered: Callable[[], object] = lambda: None
        self.opened: Callable[[], object] = lambda: None
        self._taking, self._asked = False, ""
        self.suggestion.observe(self._take_suggestion, "value")
        self.source.observe(self._typed, "value")
        self.controls = [self.suggestion]  # the text keeps its focus while what was entered is opened
        empty = "Its contents, and where it fits, are shown here."
        self._held = Area("held", "checkpoint contents", empty)
        self.place(self.suggestion, self.source, self.start, self._message, self._held)

    def _take_suggestion(self, change: Any) -> None:
        if change["new"]:
            self._taking = True
            self.source.value = change["new"]
            self._taking = False
            self.say(page.status("Click Open to see what it contains."))

    def _typed(self, _: Any) -> None:
        if not self._taking:
            self.entered()

    def run(self) -> None:
        """Open the checkpoint; a demo is made first."""
        self._asked = source = self.source.value.strip()  # it may change meanwhile
        self.checkpoint = None
        self._held.clear()
        self.opened()
        if not source:
            raise ShardkitError(
                "nothing is selected: pick a suggestion, or enter a folder, a file or a Hub id"
            )
        if size := _DEMOS.get(source):
            self.say(page.status(f"Generating a demo model of {size} in {source} …"))
            self.checkpoint = make_demo_checkpoint(source, size=size)
        else:
            self.say(page.status(f"Opening {source} …"))
            self.checkpoint = Checkpoint.open(source)
        self.opened()
        self.say(page.done(f"{source} is open. Continue with the plan."))

    def tell(self, estimates: tuple[Estimate, Estimate] | None) -> None:
        """Show checkpoint contents, and where it fits as it is and sharded as planned."""
        if self.checkpoint is not None:
            fits = _fits(*(estimates or [self.checkpoint.estimate(None)] * 2))
            self._held.fill(page.columns(self.checkpoint.summary().html(), fits.html()))

    @property
    def is_open(self) -> bool:
        """Whether what the text says was opened."""
        return bool(self.checkpoint) and self.error is None and self._asked == self.source.value.strip()

    @property
    def beside(self) -> str:
        """Where the shards of what is open go if nobody says: into this folder, but not into the source."""
        if self.checkpoint is None or not os.path.exists(os.path.expanduser(self._asked)):  # of the Hub
            return os.path.basename(self._asked.partition("@")[0].rstrip("/")) + "-sharded"
        beside = os.path.realpath(self.checkpoint.folder) + "-sharded"
        within = Path.cwd().is_relative_to(beside.removesuffix("-sharded"))
        return os.path.relpath(beside) if within else os.path.basename(beside)


def _fits(now: Estimate, shards: Estimate) -> Summary:
    """Return whether a load fits this machine and the free hosts, as it is and from planned shards."""
    rows = [
        ("memory needed", "", now.needed, shards.needed),
        ("mapped from files", "", *(format_size(e.mapped_bytes) for e in (now, shards))),
    ]
    for host, with_shards in zip(now.hosts, shards.hosts, strict=True):
        rows.append((host.name, format_size(host.memory_bytes), host.verdict, with_shards.verdict))
    title = f"Does it fit, loaded as {now.dtype or 'stored'}?"
    advice = tuple(f"{host.name}: {host.advice}" for host in shards.hosts if host.advice)
    table = Table(("", "memory", "as it is", "as planned"), tuple(rows))
    return Summary(title, (), (table,), (*now.notes, *advice))
