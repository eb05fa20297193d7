"""The article's clock: `%%time` around `from_pretrained` of a Hub id, which includes the download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from shardkit.base import pages
from shardkit.base.errors import MeasurementError
from shardkit.formats.tensor import DtypeLike, dtype_name
from shardkit.measure.quantities import format_seconds

if TYPE_CHECKING:
    import pandas as pd

# Wall and CPU seconds that the article reports: 3min 30s and 1min 25s, then 1min 49s and 1min 11s.
_ARTICLE = {"original": (210.0, 85.0), "sharded": (109.0, 71.0)}
_CLOCKED = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
place, cache, dtype = sys.argv[1:]
wall, cpu = time.perf_counter(), time.process_time()
AutoModelForCausalLM.from_pretrained(place, cache_dir=cache, torch_dtype=getattr(torch, dtype))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


@dataclass(frozen=True)
class HubLoad:
    """Seconds of a `from_pretrained` that downloads, and of the same once all is there (`load_`)."""

    wall_seconds: float
    cpu_seconds: float
    load_wall_seconds: float
    load_cpu_seconds: float

    @property
    def download_share(self) -> float:
        """The part of the wall time that a load without a download does not take."""
        return max(0.0, 1 - self.load_wall_seconds / self.wall_seconds)


def clock_from_hub(
    repo_id: str, *, dtype: DtypeLike, python: str | os.PathLike[str] | None = None
) -> HubLoad:
    """Load a model of the Hub as the article did, into an empty cache, and then again from there, cold.

    Each in a fresh process, which has imported transformers before its clock starts, by `python` (the current
    one). The Hub is that of the environment (`HF_ENDPOINT`). The cache is temporary, as large as the model.

    Raises
    ------
    MeasurementError
        If a process does not load the model; says what it said.
    """
    with TemporaryDirectory() as cache:
        first = _seconds(python, repo_id, cache, dtype_name(dtype))
        pages.drop([str(path) for path in Path(cache).rglob("*") if path.is_file()])
        again = _seconds(python, repo_id, cache, dtype_name(dtype), HF_HUB_OFFLINE="1")
    return HubLoad(*first, *again)


def article_table(clocked: Mapping[str, HubLoad]) -> pd.DataFrame:
    """Return the article's figures beside those of its two versions, "original" and "sharded", from here."""
    import pandas as pd

    rows = {"the article": _ARTICLE}
    if clocked:
        rows["here"] = {name: (one.wall_seconds, one.cpu_seconds) for name, one in clocked.items()}
        rows["here, without the download"] = {
            name: (one.load_wall_seconds, one.load_cpu_seconds) for name, one in clocked.items()
        }
    table = {}
    for row, seconds in rows.items():
        for clock, *both in zip(("wall", "CPU"), seconds["original"], seconds["sharded"], strict=True):
            before, after = map(format_seconds, both)
            table[f"{row}, {clock} time"] = [before, after, f"{both[0] / both[1]:.2f}"]
    return pd.DataFrame.from_dict(table, orient="index", columns=[*_ARTICLE, "ratio"])


def _seconds(python: str | os.PathLike[str] | None, *words: str, **environment: str) -> list[float]:
    command = [python or sys.executable, "-c", _CLOCKED, *words]
    given = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)  # noqa: S603
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise MeasurementError(f"{words[0]} could not be loaded from the Hub: {why}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds
