"""Whether a copy gives a model what its source gives it: every key, as transformers itself reports them.

That names and bytes are equal does not prove it: a load also goes by file names, index and config, and ties
and initializes by rules of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardkit.base.record import listed, plural
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import DTYPE_NAMES, FLOAT_DTYPES
from shardkit.load.look import config_differences

_SCRIPT = Path(__file__).with_name("look.py")
_SECONDS = 120.0
_MEMORY_BYTES = 3_000_000_000  # of the process, beside files that it maps: some 600 MB are usual
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class ModelKeys:
    """What a model class gets from a source and from its copy.

    Attributes
    ----------
    model, stack
        Which class was asked, of which version of transformers; empty where it was not asked.
    keys
        How many keys the model has.
    missing
        Keys that neither source nor copy has, which transformers initializes.
    differences
        Keys that are missing, unexpected or of another shape on one side only.
    why_unchecked
        Why it was not asked; empty where it was.
    """

    model: str = ""
    stack: str = ""
    keys: int = 0
    missing: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    why_unchecked: str = ""

    def __str__(self) -> str:
        if self.why_unchecked:
            differs = f"; DIFFERENT: {listed(self.differences)}" * bool(self.differences)
            return f"not checked: {self.why_unchecked}{differs}"
        if self.differences:
            return f"DIFFERENT for {self.model} ({self.stack}): {listed(self.differences)}"
        neither = f"; {len(self.missing)} in neither ({listed(self.missing)})" * bool(self.missing)
        return f"{self.model} gets the same {plural(self.keys, 'key')}{neither} ({self.stack})"


@contextmanager
def model_keys(source: Checkpoint, copy: Checkpoint) -> Iterator[Any]:
    """Begin to ask, and give a function that waits for the answer: a `ModelKeys`."""
    if why := _why_not(source, copy):
        yield lambda: _unchecked(why, source, copy)
        return
    job: dict[str, Any] = {"source": _side(source), "copy": _side(copy)}
    job["memory_bytes"] = _MEMORY_BYTES + source.total_bytes + copy.total_bytes
    with asked(job) as answer:
        yield lambda: _model_keys(answer(), source, copy)


def _why_not(source: Checkpoint, copy: Checkpoint) -> str:
    if source.config is None or copy.config is None:
        return "no config.json"
    if source.config_file != "config.json":
        return "an adapter alone is no model"
    if not source.config.get("architectures"):
        return "config.json names no model class"
    if find_spec("transformers") is None:
        return "transformers is not installed"
    return ""


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say what is loaded: a folder here as it is, and what cannot be loaded as it is by its tensors.

    Asked for the dtype that most weights have, transformers converts none of those, and reads none.
    """
    is_folder = checkpoint.place.folder is not None and not os.path.isfile(checkpoint.source)
    dtype = next((DTYPE_NAMES[d] for d in checkpoint.dtypes if d in FLOAT_DTYPES), None)
    tensors = {name: (DTYPE_NAMES[t.dtype], t.shape) for name, t in checkpoint.tensors.items()}
    return {
        "folder": checkpoint.folder if is_folder else None,
        "config": checkpoint.config,
        "tensors": tensors,
        "dtype": dtype,
    }


@contextmanager
def asked(job: dict[str, Any]) -> Iterator[Any]:
    """Hand a job to a process of its own, and give a function that waits for its answer."""
    process = subprocess.Popen(  # noqa: S603  our own script
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **_ENVIRONMENT},
    )

    def answer() -> dict[str, Any]:
        try:
            said, _ = process.communicate(json.dumps(job).encode(), timeout=_SECONDS)
            found: dict[str, Any] = json.loads(said)
        except subprocess.TimeoutExpired:
            return {"why": f"transformers gave no answer within {_SECONDS:.0f} s"}
        except ValueError:
            return {"why": f"the process that asks transformers ended with status {process.wait()}"}
        return found

    try:
        yield answer
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _unchecked(why: str, source: Checkpoint, copy: Checkpoint) -> ModelKeys:
    """Say why nobody was asked; entries of the configs can be compared all the same."""
    if source.config is None or copy.config is None:
        return ModelKeys(why_unchecked=why)
    differences = tuple(config_differences(source.config, copy.config))
    return ModelKeys(why_unchecked=why, differences=differences)


def _model_keys(found: dict[str, Any], source: Checkpoint, copy: Checkpoint) -> ModelKeys:
    if "why" in found:
        return _unchecked(found["why"], source, copy)
    missing, differences = (tuple(found[name]) for name in ("missing", "differences"))
    return ModelKeys(found["model"], found["stack"], found["keys"], missing, differences)
