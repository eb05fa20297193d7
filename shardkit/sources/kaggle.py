"""Models of Kaggle: those attached to the notebook here; otherwise kagglehub downloads or attaches them."""

from __future__ import annotations

import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

from shardkit.base.errors import CheckpointError, SourceError
from shardkit.base.extras import require
from shardkit.formats.names import is_weights
from shardkit.sources.fileset import Found
from shardkit.sources.local import LocalFiles

_PART = r"(\w[\w.-]*)"
_HANDLE = re.compile(rf"kaggle://{_PART}/{_PART}/{_PART}/{_PART}(?:/(\d+))?/?", re.ASCII | re.IGNORECASE)
# Below the folder of attached data: models since 2025 and before, with their versions; data sets likewise.
_WEIGHTS = ("models/*/*/*/*/[0-9]*/*", "*/*/*/[0-9]*/*", "datasets/*/*/*", "*/*")


def find_model(text: str, *_needed: object, revision: str | None = None, **_how: object) -> Found:
    """Return the files of ``kaggle://owner/model/framework/variation``: of its latest, or ``/version``."""
    if (handle := _HANDLE.fullmatch(text)) is None:
        raise SourceError(
            f"{text[:200]!r} is not kaggle://owner/model/framework/variation, nor that with /version after it"
        )
    if revision is not None:
        raise CheckpointError(f"has versions, not revisions: {text.rstrip('/')}/{revision}", file=text)
    parts = [part for part in handle.groups() if part]
    if folder := _attached(*parts):
        return Found(LocalFiles(folder), str(folder), (f"{text} is attached to this notebook",))
    folder = _downloaded(text, "/".join(parts))
    return Found(LocalFiles(folder), str(folder))


def _input() -> Path:
    """Return where Kaggle shows what is attached to a notebook; kagglehub reads the same variable."""
    return Path(os.environ.get("KAGGLE_CACHE_MOUNT_FOLDER", "/kaggle/input"))


def _attached(owner: str, model: str, framework: str, variation: str, version: str = "*") -> Path | None:
    """Return the folder of the version, or the latest one, of an attached model; None where there is none."""
    for base in (_input() / "models" / owner / model, _input() / model):
        found = base.glob(f"{framework.lower()}/{variation}/{version}")
        if numbered := {int(path.name): path for path in found if path.name.isdigit()}:
            return numbered[max(numbered)]
    return None


def _downloaded(text: str, handle: str) -> Path:
    require("kaggle", f"{text}, which is not attached here,", "kagglehub")
    try:
        with redirect_stdout(sys.stderr):  # it says there what it does
            import kagglehub

            return Path(kagglehub.model_download(handle))
    except Exception as error:  # what it is made of raises what it likes
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot be downloaded: {why}", file=text) from None


def attached_models() -> list[str]:
    """Return the folders with weights among what is attached to a notebook on Kaggle."""
    files = (path for pattern in _WEIGHTS for path in _input().glob(pattern))
    return sorted({str(path.parent) for path in files if is_weights(path.name)})
