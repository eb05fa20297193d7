"""A progress bar with bytes, rate and time left: text in a terminal, a widget in a notebook."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

from shardkit.base.jobs import Progress

STAGES = {
    "check": "checking finished shards",
    "copy": "writing shards",
    "verify": "verifying every byte",
    "hash": "hashing",
    "upload": "uploading",
    "stream": "received and sent",
}


class ProgressBar:
    """Shows the `progress` of a job: ``with ProgressBar() as bar: shard_checkpoint(..., progress=bar)``.

    Options are passed on to `tqdm`.
    """

    def __init__(self, **options: Any) -> None:
        self._options, self._stage = options, ""
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Show where the job stands; a new stage begins a new bar."""
        if progress.stage != self._stage:
            self.close()
            self._stage = progress.stage
            self._bar = _bar_class()(
                total=progress.total_bytes,
                desc=STAGES.get(progress.stage, progress.stage),
                unit="B",
                unit_scale=True,
                **self._options,
            )
        self._bar.update(progress.done_bytes - self._bar.n)

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

        return tqdm
    from tqdm import auto

    return auto.tqdm
