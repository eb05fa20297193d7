"""Step 1: which checkpoint, and where it fits."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets

from shardkit.app import page
from shardkit.app.advice import Loads
from shardkit.app.step import Step, box, text_field
from shardkit.base.errors import ShardkitError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo import make_demo_checkpoint
from shardkit.sources.resolve import known_sources

_DEMOS = {"mistral-demo-64MB": "64MB", "mistral-demo-512MB": "512MB"}
# Buttons that open something at once; the Hub's are small enough for Binder.
_EXAMPLES = {
    "demo, 64 MB": "mistral-demo-64MB",
    "demo, 512 MB": "mistral-demo-512MB",
    "MiniLM (Hub)": "sentence-transformers/all-MiniLM-L6-v2",
    "SmolLM2 (Hub)": "HuggingFaceTB/SmolLM2-135M",
}
_LARGE = ("mistralai/Mistral-7B-v0.1", "tiiuae/falcon-7b-instruct")


class Choose(Step):
    """Names a checkpoint, opens it and shows what it holds."""

    number, title, button, working = 1, "Choose", "Open", "Opening…"
    hint = "Opening reads only headers, not weights. The demos are generated here, with random weights."

    def __init__(self, source: str) -> None:
        super().__init__()
        self.checkpoint: Checkpoint | None = None
        known = dict.fromkeys((*known_sources(), *_EXAMPLES.values(), *_LARGE))
        example = "folder, weights file, Hub id (org/name) or Hub URL"
        self.source = text_field(
            "Checkpoint", source, widgets.Combobox, options=tuple(known), placeholder=example
        )
        self.entered: Callable[[], object] = lambda: None
        self.opened: Callable[[Checkpoint], object] = lambda _: None
        self._asked = ""
        self.source.observe(lambda _: self.entered(), "value")
        examples = [widgets.Button(description=label, tooltip=name) for label, name in _EXAMPLES.items()]
        for example in examples:
            example.on_click(self._take)
        self._fits = widgets.HTML()
        entry = box("entry", self.source, self.start)
        tries = box("examples", widgets.HTML(page.hint("Or try")), *examples)
        self._body.children = (entry, tries, self._message, self._fits)

    def _take(self, example: widgets.Button) -> None:
        if self.source.value == example.tooltip:
            self.entered()
        self.source.value = example.tooltip  # which, if it is another, is entered by that

    def run(self) -> None:
        """Open the checkpoint; a demo is made first."""
        self._asked = source = self.source.value.strip()  # it may change meanwhile
        if not source:
            raise ShardkitError("nothing is selected: enter a folder, a file or a Hub id, or try a demo")
        if size := _DEMOS.get(source):
            self.say(page.status(f"Generating a demo model of {size} in {source} …"))
            self.checkpoint = make_demo_checkpoint(source, size=size)
        else:
            self.say(page.status(f"Opening {source} …"))
            self.checkpoint = Checkpoint.open(source)
        self.opened(self.checkpoint)
        self.say(page.done(f"{source} is open."))

    def in_words(self, error: Exception) -> str:
        """Return what the page says of an error: what was open before a typing error stays open."""
        words = super().in_words(error)
        return words + page.status(f"{self.checkpoint.source} stays open.") if self.checkpoint else words

    def tell(self, loads: Loads | None) -> None:
        """Show what to do, where each way to load fits, and what the checkpoint contains."""
        if self.checkpoint is not None:
            facts = page.details("What it contains", self.checkpoint.summary().html(), name="contents")
            self._fits.value = (loads.html() if loads else "") + facts

    @property
    def is_open(self) -> bool:
        """Whether what the text says was opened."""
        return self.is_done and self.error is None and self._asked == self.source.value.strip()

    @property
    def is_done(self) -> bool:
        """Whether a checkpoint is open."""
        return self.checkpoint is not None
