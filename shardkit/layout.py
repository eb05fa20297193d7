"""Which files of a folder are the weights, and which go with them.

The order is that of transformers (`modeling_utils._get_resolved_checkpoint_files`): a file named by the
config, then `model.safetensors`, its index, `pytorch_model.bin`, its index; then the stems of diffusers
and peft. A folder is hostile until checked: an index names files only inside it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from math import inf
from typing import Any

from shardkit.errors import CheckpointError, reading
from shardkit.files import Files, is_inside
from shardkit.record import listed
from shardkit.safetensors_file import load_json
from shardkit.sizes import format_size

CANONICAL_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
CONFIG_FILES = ("config.json", "adapter_config.json")

_MAX_INDEX_BYTES = 25_000_000
_MAX_CONFIG_BYTES = 3_000_000  # one that names 20,000 classes, twice, has half of that
_MAX_JSON_DEPTH = 100
_INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[^.]+)?\.json")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|tflite)")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def is_index(name: str) -> bool:
    """Whether a file name is that of an index: ``model.safetensors.index.json``."""
    return _INDEX.fullmatch(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file name is that of weights, in any format, or of their index."""
    return _WEIGHTS.fullmatch(name) is not None or is_index(name)


def output_stem(chosen: str) -> str:
    """Return what files made from `chosen` are called, so that plain `from_pretrained` finds them."""
    for stem in CANONICAL_STEMS[1:]:
        if chosen.startswith(stem):
            return stem
    return CANONICAL_STEMS[0]


def architecture(config: Mapping[str, Any] | None) -> str | None:
    """Return the model class that a config names, of transformers, diffusers or peft."""
    config = config or {}
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    found = first or config.get("_class_name") or config.get("peft_type")
    return str(found) if found else None


def config_dtype(config: Mapping[str, Any] | None) -> str | None:
    """Return the dtype that a config asks for ("bfloat16"), or None."""
    config = config or {}
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, dict):  # one for each part: that of the model itself, or torch's default
        said = said.get("", "float32")
    return said.removeprefix("torch.") if isinstance(said, str) else None


def quantisation(config: Mapping[str, Any]) -> str | None:
    """Return how the weights are quantised, as a config, or one nested in it, says; None if they are not."""
    if isinstance(found := config.get("quantization_config"), dict) and found:
        return str(found.get("quant_method", "quantization_config"))
    nested = (quantisation(value) for value in config.values() if isinstance(value, dict))
    return next(filter(None, nested), None)


def _read_json(files: Files, name: str, limit: int = _MAX_CONFIG_BYTES) -> Any:
    path = os.path.join(files.folder, name)
    with reading(path):
        if files.size(name) > limit:
            raise CheckpointError(f"is larger than {format_size(limit)}", file=path)
        document = load_json(files.read(name), path)
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(_MAX_JSON_DEPTH):
        children = [value.values() if isinstance(value, dict) else value for value in level]
        if any(inf in values or -inf in values for values in children):
            raise CheckpointError("has too large a number", file=path)
        level = [v for values in children for v in values if isinstance(v, (dict, list))]
        if not level:
            return document
    raise CheckpointError(f"is nested more than {_MAX_JSON_DEPTH} levels deep", file=path)


def _object(value: Any) -> dict[str, Any]:
    """Return a JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def read_config(files: Files) -> dict[str, Any] | None:
    """Return the config of transformers, diffusers or peft among `files`; None where there is none."""
    for name in CONFIG_FILES:
        if files.is_file(name):
            config = _read_json(files, name)
            if not isinstance(config, dict):
                raise CheckpointError("is not a JSON object", file=os.path.join(files.folder, name))
            return config
    return None


def adapted_config(config: Mapping[str, Any], dtype: str | None) -> str | None:
    """Return the JSON of a config that fits the new files; None where it fits as it is.

    A cast is followed by every dtype that the config names, those of its parts included; and a file name
    of weights (`transformers_weights`) would name one that is gone.
    """
    adapted = {key: value for key, value in config.items() if key != "transformers_weights"}
    if dtype is not None:
        adapted = _with_dtype(adapted, dtype)
        if config_dtype(adapted) is None and "architectures" in adapted:
            adapted["dtype"] = dtype
    return json.dumps(adapted, indent=2, ensure_ascii=False) + "\n" if adapted != config else None


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def ties_weights(config: Mapping[str, Any] | None) -> bool:
    """Whether a load will tie weights again; only a config that says no is believed to mean it."""
    config = config or {}
    nested = _object(config.get("text_config")).get("tie_word_embeddings")
    return config.get("tie_word_embeddings", nested) is not False


def find_weights(files: Files, config: Mapping[str, Any] | None) -> str:
    """Return the name of the weights file, or of the index, that a load of `files` would read.

    Raises
    ------
    CheckpointError
        If there is none, or several of equal right.
    """
    if isinstance(named := (config or {}).get("transformers_weights"), str):
        _check_inside(files, named, CONFIG_FILES[0])
        return named
    stems = (("model", "pytorch_model"), ("diffusion_pytorch_model",) * 2, ("adapter_model",) * 2)
    for safetensors, pickle in stems:
        for name in (f"{safetensors}.safetensors", f"{pickle}.bin"):
            for candidate in (name, f"{name}.index.json"):
                if files.is_file(candidate):
                    return candidate
    return _find_only_candidate(files)


def _find_only_candidate(files: Files) -> str:
    """Choose weights of another name (a variant, an original release) where there is just one."""
    everything = sorted(files.names())
    names = [name for name in everything if "/" not in name]
    for pattern in (r".*\.safetensors\.index(\.[^.]+)?\.json", r".*\.safetensors", r".*\.bin"):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if len(found) == 1:
            return found[0]
        if found and all(_SHARD.fullmatch(name.rsplit(".", 1)[0]) for name in found):
            raise CheckpointError(
                f"holds shards ({listed(found)}) but no index that says what is in them: "
                "the download may have been cut",
                file=files.folder,
            )
        if found:
            raise CheckpointError(
                f"holds several checkpoints ({listed(found)}): give the path of the one you mean",
                file=files.folder,
            )
    inside = {
        os.path.dirname(name)
        for name in everything
        if "/" in name and _WEIGHTS.fullmatch(os.path.basename(name))
    }
    hint = f"; its folders {listed(sorted(inside))} do: give the path of one" if inside else ""
    raise CheckpointError(f"holds no weights (no .safetensors, no .bin){hint}", file=files.folder)


def read_weight_map(files: Files, index: str) -> dict[str, str]:
    """Return which file holds which tensor, every file checked to be one of `files`.

    Raises
    ------
    CheckpointError
        If the index is damaged, or names files that are missing or outside.
    """
    where = os.path.join(files.folder, index)
    weight_map = _object(_read_json(files, index, _MAX_INDEX_BYTES)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("has no weight_map of tensor names to file names", file=where)
    if not weight_map:
        raise CheckpointError("its weight_map is empty", file=where)
    named = set(weight_map.values())
    for file in sorted(named):
        _check_inside(files, file, index)
    kinds = {os.path.splitext(file)[1] for file in named}
    if len(kinds) > 1:
        raise CheckpointError(f"mixes formats: {', '.join(sorted(kinds))}", file=where)
    return weight_map


def index_dtype(files: Files, index: str) -> str | None:
    """Return the dtype that an index says its tensors have, or None; transformers believes it."""
    said = _object(_object(_read_json(files, index, _MAX_INDEX_BYTES)).get("metadata")).get("dtype")
    return said if isinstance(said, str) else None


def read_made(files: Files, index: str) -> dict[str, object]:
    """Return what an index of ours says of how its files came about; nothing where another tool wrote it."""
    metadata = _object(_object(_read_json(files, index, _MAX_INDEX_BYTES)).get("metadata"))
    return _object(metadata.get("shardkit"))


def _check_inside(files: Files, file: str, named_in: str) -> None:
    """Refuse a file name that leaves the folder, by itself or through a link."""
    where = os.path.join(files.folder, named_in)
    if not is_inside(file):
        raise CheckpointError(f"names a file outside the folder: {file!r}", file=where)
    if os.path.normpath(file) != file:  # one file by many names would be read many times
        raise CheckpointError(f"names {file!r} instead of {os.path.normpath(file)!r}", file=where)
    if not files.is_file(file):
        if os.path.exists(os.path.join(files.folder, file)):
            raise CheckpointError(f"names {file!r}, which is not a regular file", file=where)
        raise CheckpointError(
            f"names {file!r}, which is not there: the download may have been cut", file=where
        )
    if (real := files.leaves(file)) is not None:
        raise CheckpointError(f"names {file!r}, a link that leaves the folder, to {real}", file=where)


def sort_out(files: Files, weights: set[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Tell what goes with the model, with sizes in bytes, from weights that do not."""
    side_files: dict[str, int] = {}
    left_out: list[str] = []
    modules = _modules(files)
    for file in files.belonging():
        if file in weights:
            continue
        if is_weights(os.path.basename(file)) and os.path.dirname(file) not in modules:
            left_out.append(file)
        elif not files.is_file(file):
            path = os.path.join(files.folder, file)
            raise CheckpointError(
                f"is a link to {os.readlink(path)}, which is not there: the download was cut", file=path
            )
        elif (real := files.leaves(file)) is not None:
            raise CheckpointError(
                f"is a link that leaves the folder, to {real}: put a copy in its place, so that what goes "
                "with the model is what you mean",
                file=os.path.join(files.folder, file),
            )
        else:
            side_files[file] = files.size(file)
    return side_files, tuple(left_out)


def _modules(files: Files) -> set[str]:
    """Return the subfolders whose weights are part of the model: sentence-transformers lists them."""
    if not files.is_file("modules.json"):
        return set()
    listed_modules = _read_json(files, "modules.json")
    modules = listed_modules if isinstance(listed_modules, list) else []
    paths = {os.path.normpath(str(module.get("path"))) for module in modules if isinstance(module, dict)}
    return paths - {"."}
