"""A progress bar with bytes or runs, and time left: text in a terminal, a widget in a notebook."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

from shardkit.base.jobs import Progress

STAGES = {
    "check": "checking finished shards",
    "cast": "trying the cast",
    "copy": "writing shards",
    "verify": "verifying every byte",
    "model": "asking transformers what a model gets",
    "hash": "hashing",
    "upload": "uploading",
    "stream": "received and sent",
}


class ProgressBar:
    """Shows the `progress` of a job, in bytes, or of `compare_loads`, in runs; options are those of `tqdm`.

    Examples
    --------
    >>> with ProgressBar(disable=True) as bar:
    ...     report = shard_checkpoint("mistral-demo", "with-a-bar", progress=bar)
    """

    def __init__(self, **options: Any) -> None:
        self._options, self._stage = options, ""
        self._bar: Any = None

    def __call__(self, progress: Progress | int, total: int = 0, label: str = "") -> None:
        """Show where the job stands; a new stage begins a new bar."""
        if isinstance(progress, int):
            self._show("runs", progress, total, unit="run")
            self._bar.set_description(label)
        else:
            size: dict[str, Any] = {"unit": "B", "unit_scale": True}
            if not progress.total_bytes:  # nothing that could be counted
                size = {"bar_format": "{desc} ({elapsed})"}
            self._show(progress.stage, progress.done_bytes, progress.total_bytes, **size)

    def _show(self, stage: str, done: int, total: int, **look: Any) -> None:
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = _bar_class()(total=total, desc=STAGES.get(stage, stage), **look, **self._options)
        if total < self._bar.total:  # fewer runs than there might have been
            began = getattr(self._bar, "start_t", None)
            self._bar.reset(total)  # which begins from scratch
            self._bar.start_t = began
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar where it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bar_class() -> Any:
    """Return the class of a widget in a notebook, of text elsewhere, or where ipywidgets is not there."""
    if find_spec("ipywidgets") is None:  # which `tqdm.auto` complains of
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    return tqdm
