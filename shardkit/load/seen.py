"""Whether a copy gives a model what its source gives it: every key, as transformers itself reports them.

That names and bytes are equal does not prove it: a load also goes by file names, index and config, and ties
and initializes by rules of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

from shardkit.base.record import listed, plural
from shardkit.checkpoint import asking
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.ranks import is_for_ranks
from shardkit.formats.names import is_of_rank
from shardkit.formats.tensor import DTYPE_NAMES, stored_dtype
from shardkit.load.look import config_differences

_NO_CONFIG = "no config.json"


@dataclass(frozen=True)
class ModelKeys:
    """What a model class, of a version of transformers, gets from a source and from its copy.

    It has so many keys; some may be missing in both, which transformers initializes; those that are missing,
    unexpected or of another shape on one side only are differences. `why_unchecked` is empty if it was asked.
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


Ask: TypeAlias = Callable[[Checkpoint], Callable[[], ModelKeys]]


@contextmanager
def model_keys(source: Checkpoint) -> Iterator[Ask]:
    """Start whom to ask, and give a function that asks about a copy; what it returns waits for the answer."""
    why = _why_not(source)
    with nullcontext() if why else asking.asked() as asked:

        def ask(copy: Checkpoint) -> Callable[[], ModelKeys]:
            if asked is None or copy.config is None:
                return partial(_model_keys, {"why": why or _NO_CONFIG}, source, copy)
            sides = {"source": _side(source), "copy": _side(copy)}
            job = {"question": "keys", "model": source.architecture, **sides}
            answer = asked(job, source.total_bytes + copy.total_bytes)
            return lambda: _model_keys(answer(), source, copy)

        yield ask


def _why_not(source: Checkpoint) -> str:
    if source.config is None:
        return _NO_CONFIG
    if source.config_file != "config.json":
        return "an adapter alone is not a model"
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
    is_folder = is_folder and not is_for_ranks(checkpoint)
    dtype = stored_dtype(checkpoint.dtypes)
    tensors = {name: (DTYPE_NAMES[t.dtype], t.shape) for name, t in checkpoint.tensors.items()}
    return {
        "folder": checkpoint.folder if is_folder else None,
        "config": checkpoint.config,
        "tensors": tensors,
        "must_fit": any(map(is_of_rank, checkpoint.files)),
        "dtype": dtype,
    }


def _model_keys(found: dict[str, Any], source: Checkpoint, copy: Checkpoint) -> ModelKeys:
    if why := found.get("why"):
        if source.config is None or copy.config is None:
            return ModelKeys(why_unchecked=why)
        return ModelKeys(why_unchecked=why, differences=tuple(config_differences(source.config, copy.config)))
    missing, differences = (tuple(found[name]) for name in ("missing", "differences"))
    return ModelKeys(found["model"], found["stack"], found["keys"], missing, differences)
