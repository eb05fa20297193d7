"""What comes along with the weights, and what stays behind: only what is known not to be needed does.

A model may need any file: voices, further adapters, heads of its own, normalizer states. So everything comes
along but what is known to be the same weights in another format, for another runtime, a trainer's state, or
a download that was cut; and of a config and its weights neither goes without the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from shardkit.checkpoint.config import parts_of
from shardkit.checkpoint.layout import (
    family,
    find_weights,
    output_stem,
    read_config,
    read_json,
    shard_set,
)
from shardkit.formats.names import is_of_rank, is_weights
from shardkit.sources.fileset import FileSet

OTHER_FORMAT = "the same weights in another format"
UNREAD = "shards that the index does not list"
OTHER_RUNTIME = "weights for other runtimes"
TRAINING = "training state"
PARTIAL = "partial downloads and backups"

_ENDINGS = r"(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf)"
_RUNTIME_FOLDERS = re.compile(r"original|onnx|openvino|coreml|metal|.*\.mlpackage")
_RUNTIMES = re.compile(
    r".*\.(?:gguf|ggml|onnx|onnx[_.]data(?:_\d+)?|ot|tflite|nemo|mlmodel|pdparams|pdmodel|pdiparams|pte)"
    r"|(?:.*_)?model(?:-\d+-of-\d+)?\.(?:h5|keras|msgpack)(?:\.index\.json)?"
    r"|.*\.ckpt\.(?:index|meta|data-\d+-of-\d+)|saved_model\.pb|openvino_.*\.(?:bin|xml)"
)
_TRAINING_FOLDERS = re.compile(r"checkpoint-\d+|global_step\d+|optimizer_\d+|pytorch_model_fsdp_\d+")
_TRAINING = re.compile(
    r".*\.distcp|(?:.*_)?(?:optim_states|model_states)\.pt"
    r"|(?:optimizer|(?:lr_)?scheduler|rng_state|random_states|training_args)[\w-]*"
    r"\.(?:pt|pth|bin|pkl|safetensors)"
)
_PARTIAL = re.compile(
    r".*\.(?:part|partial|incomplete|crdownload|aria2|opdownload)"
    rf"|.*\.{_ENDINGS}(?:\.(?:bak|backup|old|orig|tmp|temp|download|lock)|~)"
)
# Mistral's own format, and Meta's.
_CONSOLIDATED = re.compile(r"consolidated[^/]*\.(?:safetensors|pth)(?:\.index\.json)?")
# What tells a model, a tokenizer or a processor which files it is made of.
_NAMING = ("modules.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_LOOKED_FOR = re.compile(
    r".*config\.json|modules\.json|tokenizer\.(?:json|model)|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(?:json|txt)|merges\.txt|.*\.jinja|chat_template\.json|.*\.py"
)
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


class Beside(NamedTuple):
    """What lies beside the weights: files that come along, with sizes in bytes; others with the reason."""

    side_files: dict[str, int]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()


def sort_out(
    files: FileSet, weights: Iterable[str], stem: str, config: Mapping[str, Any] | None = None
) -> Beside:
    """Tell what comes along with `weights`, of which files called `stem` are made, from what does not."""
    weights = set(weights)
    others = [file for file in files.belonging() if file not in weights]
    stays = _rule(others, weights, {stem, *map(family, weights)})
    named = named_files(files, config, ["modules.json"])
    left_out = {
        file: why
        for file in others
        if (why := stays(file))
        and (why in (PARTIAL, OTHER_FORMAT, UNREAD) or named.isdisjoint(path_parts(file)))
    }
    side_files = {}
    for file in others:
        if file not in left_out:
            files.check(file)
            side_files[file] = files.size(file)
    pointers = [file for file, size in side_files.items() if _is_pointer(files, file, size)]
    notes = tuple(f"{file} is a Git LFS pointer, not the file: run `git lfs pull`" for file in pointers)
    return Beside(side_files, left_out, notes)


def _rule(others: Iterable[str], weights: set[str], stems: set[str]) -> Callable[[str], str | None]:
    original = {file for file in others if _CONSOLIDATED.fullmatch(file) and "consolidated" not in stems}
    original |= {"params.json"} if original else set()  # a config stays with its weights
    if "model" in stems:
        stems = {*stems, "pytorch_model"}
    runtimes = {folder for file in others for folder in _runtime_folders(file)}
    sets = set(filter(None, map(shard_set, weights)))
    same = re.compile(rf".*\.{_ENDINGS}(?:\.index(?:\.[^.]+)?\.json)?")

    def stays(file: str) -> str | None:
        *folders, name = file.split("/")
        if _PARTIAL.fullmatch(name):
            return PARTIAL
        if _TRAINING.fullmatch(name) or any(map(_TRAINING_FOLDERS.fullmatch, folders)):
            return TRAINING
        if _RUNTIMES.fullmatch(name) or not runtimes.isdisjoint(path_parts(file)):
            return OTHER_RUNTIME
        if shard_set(file) in sets:
            return UNREAD
        if is_of_rank(name) or file in original:
            return OTHER_FORMAT
        if not folders and same.fullmatch(name) and family(name) in stems:
            return OTHER_FORMAT
        return None

    return stays


def _runtime_folders(file: str) -> Iterable[str]:
    path = PurePosixPath(file)
    if is_weights(path.name) or _RUNTIMES.fullmatch(path.name):
        for folder in path.parents:
            if _RUNTIME_FOLDERS.fullmatch(folder.name):
                yield str(folder)


def named_files(
    files: FileSet, config: Mapping[str, Any] | None, documents: Iterable[str] = _NAMING
) -> set[str]:
    """Return all that a config and JSON documents name, files and folders among it; code by its module."""
    values = [dict(config or {}), *(read_json(files, name) for name in documents if files.is_file(name))]
    texts = {os.path.normpath(text) for text in _texts(values) if text} - {"."}
    return texts | {f"{text.partition('.')[0]}.py" for text in texts if "." in text and "/" not in text}


def is_needed(file: str, named: set[str]) -> bool:
    """Whether a load needs a file beside the weights: it is named, or of a kind that loads look for."""
    name = os.path.basename(file)
    return bool(_LOOKED_FOR.fullmatch(name)) or is_weights(name) or not named.isdisjoint(path_parts(file))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    for part in parts_of(value):
        yield from _texts(part)


def path_parts(file: str) -> list[str]:
    """Return a file's name and those of the folders that it lies in."""
    return [file, *map(str, PurePosixPath(file).parents)]


def _is_pointer(files: FileSet, file: str, size: int) -> bool:
    return size < _POINTER_BYTES and files.folder is not None and files.content(file).startswith(_POINTER)


def needed_files(files: FileSet) -> list[str]:
    """Return the names of all that makes up a checkpoint: weights in one format, index, side files."""
    config = read_config(files)
    found = find_weights(files, config)
    weights = dict.fromkeys((found.chosen, *found.files))
    beside = sort_out(files, weights, output_stem(files, found.chosen, config), config)
    return [*weights, *beside.side_files]
