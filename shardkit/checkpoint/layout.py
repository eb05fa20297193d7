"""Which files of a folder are the weights that a load reads, and what the config says of them.

The order is that of transformers (`modeling_utils._get_resolved_checkpoint_files`): a file named by the
config, then `model.safetensors`, its index, `pytorch_model.bin`, its index; then the stems of diffusers
and peft. A folder is hostile until checked: an index names files only inside it. Untidy it may be:
what transformers loads is taken, with a note.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from math import isfinite, isnan
from typing import Any, NamedTuple

from shardkit.base.errors import CheckpointError, reading
from shardkit.base.record import listed, plural
from shardkit.base.sizes import format_size
from shardkit.checkpoint.quantized import quantisation as quantisation
from shardkit.formats.names import is_index, is_weights
from shardkit.formats.safetensors import JsonBounds, reading_json
from shardkit.sources.fileset import FileSet, is_inside

CANONICAL_STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
CONFIG_FILES = ("config.json", "adapter_config.json")
# Names that another loader looks for, and the config by which that loader is known.
_OTHER_LOADERS = {"consolidated": "params.json", "open_clip_model": "open_clip_config.json"}

# Quantizers write their calibration data into configs, and an index of 200,000 tensors has 25 MB.
_MAX_JSON_BYTES = 100_000_000
_JSON_BOUNDS = JsonBounds(structure=8_000_000, colons=4_000_000, unquoted=_MAX_JSON_BYTES)
_MAX_JSON_DEPTH = 100
_MAX_MISSING = 100_000  # shards to look for that are not there: a name may claim any number
_SHARD = re.compile(r"(.+?)[-_.](\d+)[-_]of[-_](\d+)(\.[^.]+)?\.(safetensors|bin)")
_VARIANT = re.compile(r"\.(?:(?:fp|bf|int|nf)\d+|\d+bit)")


class Weights(NamedTuple):
    """The weights that a load reads.

    Attributes
    ----------
    chosen
        The file or index that decides.
    files
        Files that hold tensors, in the order in which transformers reads them.
    weight_map
        Which file holds which tensor, as the index says; empty without an index.
    notes
        What a person should be told.
    dtype
        What the index says its tensors have, which transformers believes; None where it does not say.
    """

    chosen: str
    files: tuple[str, ...]
    weight_map: dict[str, str]
    notes: tuple[str, ...] = ()
    dtype: str | None = None


def family(name: str) -> str:
    """Return what weights are called without number, variant and ending: "model" of ``model.fp16.bin``."""
    stem = re.sub(r"\.index(\.[^.]+)?\.json$", "", name)
    if shard := _SHARD.fullmatch(stem):
        return _VARIANT.sub("", shard[1])
    return _VARIANT.sub("", stem.rpartition(".")[0])


def shard_set(name: str) -> tuple[str | None, ...] | None:
    """Return what names of shards that belong together have in common; None for other names."""
    shard = _SHARD.fullmatch(name)
    return shard and shard.group(1, 3, 4, 5)


def output_stem(files: FileSet, chosen: str, config: Mapping[str, Any] | None) -> str:
    """Return what files made from `chosen` are called, so that whoever loads the source finds them."""
    found = family(chosen)
    if config is None and files.is_file(_OTHER_LOADERS.get(found, "")):
        return found
    return next((stem for stem in CANONICAL_STEMS[1:] if chosen.startswith(stem)), CANONICAL_STEMS[0])


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


def read_json(files: FileSet, name: str) -> Any:
    """Return a JSON document as Python reads it (`Infinity` and `NaN` included), within bounds.

    Raises
    ------
    CheckpointError
        If it cannot be read, or takes too much.
    """
    path = files.where(name)
    with reading(path):
        if (size := files.size(name)) > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"has {format_size(size)}, at most {format_size(_MAX_JSON_BYTES)} are read", file=path
            )
        raw = files.content(name)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(
            "begins with a byte order mark, which no loader reads: save it without", file=path
        )
    with reading_json(raw, path, _JSON_BOUNDS):
        document = json.loads(raw.decode("utf-8"))
    level = [document]
    for _ in range(_MAX_JSON_DEPTH):
        children = (value.values() if isinstance(value, dict) else value for value in level)
        level = [v for values in children if isinstance(values, Iterable) for v in values]
        level = [value for value in level if isinstance(value, (dict, list))]
        if not level:
            return document
    raise CheckpointError(f"is nested more than {_MAX_JSON_DEPTH} levels deep", file=path)


def _object(value: Any) -> dict[str, Any]:
    """Return a JSON object; an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def read_config(files: FileSet) -> dict[str, Any] | None:
    """Return the config of transformers, diffusers or peft among `files`; None where there is none."""
    for name in CONFIG_FILES:
        if files.is_file(name):
            config = read_json(files, name)
            if not isinstance(config, dict):
                raise CheckpointError("is not a JSON object", file=files.where(name))
            return config
    return None


def adapted_config(config: Mapping[str, Any], dtype: str | None, auto: str | None = None) -> str | None:
    """Return the JSON of a config that fits the new files; None where it fits as it is.

    `auto` is what a load chooses for the source and would not for the new files: then the config says it.

    A cast is followed by every dtype that the config names, those of its parts included; and a file name
    of weights (`transformers_weights`) would name one that is gone.
    """
    adapted = {key: value for key, value in config.items() if key != "transformers_weights"}
    if dtype is not None:
        adapted = _with_dtype(adapted, dtype)
        if config_dtype(adapted) is None and adapted.keys() & {"architectures", "model_type"}:
            adapted["dtype"] = dtype
    elif auto is not None:
        adapted["dtype"] = auto
    # A number that is not a number equals no other, nor itself.
    return json.dumps(adapted, indent=2) + "\n" if repr(adapted) != repr(config) else None


def plain_json(value: Any) -> Any:
    """Return what strict JSON can hold, numbers that are none tagged as transformers writes them."""
    if isinstance(value, dict):
        return {key: plain_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_json(part) for part in value]
    if isinstance(value, float) and not isfinite(value):
        return {"__float__": "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {key: _cast_value(key, value, dtype) for key, value in config.items()}


def _cast_value(key: str, value: Any, dtype: str) -> Any:
    is_dtype = key in ("dtype", "torch_dtype")
    if is_dtype and isinstance(value, str):
        return dtype
    if isinstance(value, dict):  # a dtype may be one for each part
        return {name: _cast_value(key if is_dtype else name, part, dtype) for name, part in value.items()}
    return [_cast_value("", part, dtype) for part in value] if isinstance(value, list) else value


def find_weights(files: FileSet, config: Mapping[str, Any] | None, chosen: str | None = None) -> Weights:
    """Return the weights that a load of `files` reads; or those that `chosen`, a file or an index, is of.

    Raises
    ------
    CheckpointError
        If there are none, several of equal right, or some are missing.
    """
    if chosen is None:
        chosen = _choose(files, config)
    if is_index(chosen):
        return _by_index(files, chosen)
    if (shard := _SHARD.fullmatch(chosen)) is None or int(shard[3]) < 2:
        return Weights(chosen, (chosen,), {})
    for index in sorted(name for name in files.names() if "/" not in name and is_index(name)):
        if family(index) == family(chosen) and chosen in (found := _by_index(files, index)).files:
            note = f"{chosen} is one of {plural(len(found.files), 'shard')}: all that {index} names are meant"
            return found._replace(notes=(*found.notes, note))
    return _by_number(files, chosen)


def _choose(files: FileSet, config: Mapping[str, Any] | None) -> str:
    if isinstance(named := (config or {}).get("transformers_weights"), str):
        _check_inside(files, named, CONFIG_FILES[0])
        return named
    stems = (("model", "pytorch_model"), ("diffusion_pytorch_model",) * 2, ("adapter_model",) * 2)
    for safetensors, pickle in stems:
        for name in (f"{safetensors}.safetensors", f"{pickle}.bin"):
            for candidate in (name, f"{name}.index.json"):
                if files.is_file(candidate):
                    return candidate
    return _choose_only_candidate(files)


def _choose_only_candidate(files: FileSet) -> str:
    """Choose weights of another name (a variant, an original release) where there is just one."""
    everything = sorted(files.names())
    inside = {os.path.dirname(name) for name in everything if "/" in name and is_weights(name)}
    folders = listed(sorted(inside))
    if "model_index.json" in everything and inside:
        raise CheckpointError(
            f"is a pipeline of several models: give the path of one of its folders ({folders}), "
            "or of a single weights file",
            file=files.name,
        )
    names = [name for name in everything if "/" not in name]
    for pattern in (r".*\.safetensors\.index(\.[^.]+)?\.json", r".*\.safetensors", r".*\.bin"):
        if found := _by_checkpoint(name for name in names if re.fullmatch(pattern, name)):
            canonical = [name for name in found if family(name) in (*CANONICAL_STEMS, "pytorch_model")]
            if len(canonical or found) == 1:
                return (canonical or found)[0]
            raise CheckpointError(
                f"holds several checkpoints ({listed(found)}): give the path of the one you mean",
                file=files.name,
            )
    hint = f"; its folders {folders} do: give the path of one" if inside else ""
    raise CheckpointError(f"holds no weights (no .safetensors, no .bin){hint}", file=files.name)


def _by_checkpoint(names: Iterable[str]) -> list[str]:
    """Return the first file of each checkpoint among files of weights: shards of one count together."""
    first: dict[object, str] = {}
    for name in names:
        first.setdefault(shard_set(name) or name, name)
    return list(first.values())


def _by_number(files: FileSet, chosen: str) -> Weights:
    """Return all shards that the name of one of them says there are: no index lists them."""
    count = _SHARD.fullmatch(chosen)[3]  # type: ignore[index]
    shards = filter(None, map(_SHARD.fullmatch, files.names()))
    found = {int(shard[2]): shard[0] for shard in shards if shard_set(shard[0]) == shard_set(chosen)}
    first = 0 if 0 in found and int(count) not in found else 1
    expected = range(first, first + int(count)) if int(count) <= len(found) + _MAX_MISSING else ()
    missing = [number for number in expected if number not in found]
    if missing or not expected:
        which = f"number {listed(map(str, missing))} of {count} is missing" if missing else "most are missing"
        raise CheckpointError(
            f"its name says that it is one of {int(count)} shards, of which {plural(len(found), 'file')} "
            f"can be found: {which}. Download the rest; to shard this file by itself, rename it",
            file=files.where(chosen),
        )
    note = f"{plural(len(found), 'shard')} without an index: the files themselves say what is in them"
    names = tuple(found[number] for number in sorted(found))
    return Weights(names[0], names, {}, (note,))


def _by_index(files: FileSet, index: str) -> Weights:
    """Return the weights that an index names, every file checked to be one of `files`.

    Raises
    ------
    CheckpointError
        If the index is damaged, or names files that are missing or outside.
    """
    where = files.where(index)
    document = _object(read_json(files, index))
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("has no weight_map of tensor names to file names", file=where)
    if not weight_map:
        raise CheckpointError("its weight_map is empty", file=where)
    for file in sorted(set(weight_map.values())):
        _check_inside(files, file, index)
    # One file by several names would be read several times.
    weight_map = {name: os.path.normpath(file) for name, file in weight_map.items()}
    named = tuple(sorted(set(weight_map.values())))
    kinds = {os.path.splitext(file)[1] for file in named}
    if len(kinds) > 1:
        raise CheckpointError(f"mixes formats: {', '.join(sorted(kinds))}", file=where)
    dtype = _object(document.get("metadata")).get("dtype")
    return Weights(index, named, weight_map, dtype=dtype if isinstance(dtype, str) else None)


def index_notes(weights: Weights, held: Mapping[str, str]) -> tuple[str, ...]:
    """Say where an index is not right about its files: transformers goes by the files, and so do we.

    Parameters
    ----------
    held
        Which file holds which tensor, in truth.
    """
    said, notes = weights.weight_map, []
    for problem, names in (
        ("that no file holds", [name for name in said if name not in held]),
        ("in another file than they are in", [n for n, file in said.items() if held.get(n, file) != file]),
        ("not at all, which its files hold", [name for name in held if said and name not in said]),
    ):
        if names:
            notes.append(f"{weights.chosen} lists {plural(len(names), 'tensor')} {problem}: {listed(names)}")
    return tuple(notes)


def naming_notes(chosen: str, stem: str) -> tuple[str, ...]:
    """Say that files made from `chosen` are called otherwise, where somebody might look for the name."""
    bare = re.sub(r"\.index(\.[^.]+)?\.json$", "", chosen)
    shard = _SHARD.fullmatch(bare)
    name = (shard[1] + (shard[4] or "")) if shard else bare.rpartition(".")[0]
    if name in (stem, "pytorch_model"):
        return ()
    return (f"shards of {name} are called {stem}, the name that from_pretrained looks for",)


def read_made(files: FileSet, index: str) -> dict[str, object]:
    """Return what an index of ours says of how its files came about; nothing where another tool wrote it."""
    metadata = _object(_object(read_json(files, index)).get("metadata"))
    return _object(metadata.get("shardkit"))


def _check_inside(files: FileSet, file: str, named_in: str) -> None:
    """Refuse a file name that leaves the folder, by itself or through a link."""
    where = files.where(named_in)
    if not is_inside(file):
        raise CheckpointError(f"names a file outside the folder: {file!r}", file=where)
    if not files.is_file(os.path.normpath(file)):
        if (path := files.path(file)) is not None and path.exists():
            raise CheckpointError(f"names {file!r}, which is not a regular file", file=where)
        raise CheckpointError(
            f"names {file!r}, which is not there: the download may have been cut", file=where
        )
    if (real := files.leaves(file)) is not None:
        raise CheckpointError(
            f"names {file!r}, a link that leaves the folder, to {real}: put the file itself in its place",
            file=where,
        )
