"""What a source means: the one place where text becomes files, here, on the Hub or in a bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardkit.base.errors import CheckpointError, SourceError, meant, reading
from shardkit.base.record import as_text
from shardkit.formats.names import is_index, is_weights
from shardkit.sources.fileset import FileSet, Found, Needed
from shardkit.sources.local import LocalFiles

_SCHEME = "hf://"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_OF_HUB = re.compile(r"hf:/|https?://(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)  # or a page there
_COMMIT = re.compile(r"hf://((?:[\w.-]+/)?[\w.-]+)@([0-9a-f]{40})")


def resolve(
    source: str | os.PathLike[str],
    needed_files: Needed,
    *,
    revision: str | None = None,
    token: str | None = None,
    download: bool = False,
) -> Found:
    """Return what a source means: a folder or file here comes first, then an address, then the Hub."""
    text = os.fspath(source)
    if not text:
        raise SourceError("an empty name is no checkpoint: give the path of one, or an id on the Hub")
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if revision is not None and os.path.exists(path):
        raise CheckpointError(
            "is a local path, which has no revisions: leave out revision, or use hf://org/name",
            file=str(path),
        )
    if os.path.isdir(path):  # which, unlike Path, takes any text for an answer
        return Found(LocalFiles(path), str(path))
    if os.path.isfile(path):
        if path.suffix in (".json", ".py", ".txt", ".md") and not is_index(path.name):
            raise CheckpointError("is not a weights file: give its folder", file=str(path))
        return Found(LocalFiles(path.parent), str(path), chosen=path.name)
    try:
        with reading(text):
            return _finder(text)(text, needed_files, revision=revision, token=token, download=download)
    except CheckpointError as error:
        if not (hint := _near(text)):
            raise
        raise SourceError(f"{error.message}{hint}", file=error.file) from None


def _near(text: str) -> str:
    """Ask whether a folder or weights file is meant whose name looks like a source that there is not."""
    folder, name = os.path.split(text.rstrip("/"))
    with suppress(OSError, ValueError):  # there is no such folder, or no text that could name one
        paths = Path(os.path.expanduser(folder)).glob("[!.]*")
        near = [path.name for path in paths if path.is_dir() or is_weights(path.name)]
        return meant(os.path.join(folder, name), [os.path.join(folder, one) for one in near])
    return ""


def _finder(text: str) -> Callable[..., Found]:
    usual = _in_a_bucket if is_address(text) else _on_the_hub
    return next((find for scheme, find in SOURCES.items() if text.lower().startswith(scheme)), usual)


def _on_the_hub(text: str, needed_files: Needed, **how: Any) -> Found:
    from shardkit.sources.hub_cache import find_model  # whose client takes half a second to import

    return find_model(text, needed_files, **how)


def _in_a_bucket(text: str, needed_files: Needed, **how: Any) -> Found:
    from shardkit.sources.bucket import find_in_bucket

    return find_in_bucket(text, needed_files, **how)


def _on_kaggle(text: str, needed_files: Needed, **how: Any) -> Found:
    from shardkit.sources.kaggle import find_model

    return find_model(text, needed_files, **how)


# By what the name of a source begins with: what finds its files, as `resolve` does.
SOURCES: dict[str, Callable[..., Found]] = {_SCHEME: _on_the_hub, "kaggle://": _on_kaggle}


def known_sources() -> list[str]:
    """Return checkpoints that need no download: what is here, attached on Kaggle, or in the Hub's cache."""
    from shardkit.sources.hub_cache import cached_models
    from shardkit.sources.kaggle import attached_models

    here = []
    for path in sorted(Path().glob("[!.]*")):
        with suppress(OSError):  # a folder that may not be read
            files = path.iterdir() if path.is_dir() else [path]
            here += [path.name] * any(is_weights(file.name) for file in files)
    return [*here, *attached_models(), *cached_models()]


def is_on_hub(name: str | os.PathLike[str]) -> bool:
    """Whether a name is of the Hub, not of a folder here; pathlib leaves one "/" of two."""
    return os.fspath(name)[:4].lower() == "hf:/"


def is_elsewhere(name: str | os.PathLike[str]) -> bool:
    """Whether a name is of no folder here: of the Hub, of a page there, or an address."""
    return is_on_hub(name) or "://" in os.fspath(name)


def is_address(name: str | os.PathLike[str]) -> bool:
    """Whether a name is an address that is not the Hub's: of a bucket, or whatever else fsspec reaches."""
    text = os.fspath(name)
    return _ADDRESS.match(text) is not None and _OF_HUB.match(text) is None


def hub_name(repo_id: str) -> str:
    """Return what a repository of the Hub is called where folders have names, too."""
    return f"{_SCHEME}{repo_id.removeprefix(_SCHEME)}"


def commit_of(name: str) -> tuple[str, str] | None:
    """Return repository and commit of a name on the Hub; None of another, or without a commit."""
    return (found[1], found[2]) if (found := _COMMIT.fullmatch(name)) else None


def reopen(name: str) -> FileSet:
    """Return the files that a saved result names: those of a folder here, of a commit, of another source."""
    if (commit := commit_of(name)) is None:
        return _finder(name)(name, lambda _: []).files if is_elsewhere(name) else LocalFiles(name)
    from shardkit.sources.hub import reopened

    return reopened(*commit)


as_text(FileSet, reopen)
