"""Which files of a folder are the weights that a load reads.

The order is that of transformers (`modeling_utils._get_resolved_checkpoint_files`): a file named by the
config, then `model.safetensors`, its index, `pytorch_model.bin`, its index; then the stems of diffusers
and peft. A folder is hostile until checked: an index names files only inside it. Untidy it may be:
what transformers loads is taken, with a note.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from shardkit.base.errors import CheckpointError, reading
from shardkit.base.record import listed, plural
from shardkit.checkpoint.config import parts_of
from shardkit.formats.names import is_index, is_of_rank, is_weights
from shardkit.formats.safetensors import JsonBounds, reading_json
from shardkit.formats.tensor import TensorInfo
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
_SHARD = re.compile(r"(.+?)[-_.](\d+)[-_]of[-_](\d+)(\.[^.]+)?\.(safetensors|bin|gguf)")
_VARIANT = re.compile(r"\.(?:(?:fp|bf|int|nf)\d+|\d+bit)")


class Weights(NamedTuple):
    """The weights that a load reads: the file or index that decides, and files in transformers' order.

    What the index says of them is in `weight_map`, `dtype` and, of how they came about, `made`.
    """

    chosen: str
    files: tuple[str, ...]
    weight_map: dict[str, str]
    notes: tuple[str, ...] = ()
    dtype: str | None = None
    made: Mapping[str, str] = MappingProxyType({})


def _stem(name: str) -> tuple[str, str]:
    """Return what weights are called without number and ending, and what shards have after their number."""
    bare = re.sub(r"\.index(\.[^.]+)?\.json$", "", name)
    shard = _SHARD.fullmatch(bare)
    return (shard[1], shard[4] or "") if shard else (bare.rpartition(".")[0], "")


_DISTCP = (
    ".distcp is not read: save with torch's HuggingFaceStorageWriter, or convert it by `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin`"
)


def family(name: str) -> str:
    """Return what weights are called without number, variant and ending: "model" of ``model.fp16.bin``."""
    return _VARIANT.sub("", _stem(name)[0])


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


def read_json(files: FileSet, name: str) -> Any:
    """Return a JSON document as Python reads it (`Infinity` and `NaN` included), within bounds."""
    path = files.where(name)
    with reading(path):
        if (size := files.size(name)) > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"has {size:,} bytes, more than the limit of {_MAX_JSON_BYTES:,}", file=path
            )
        raw = files.content(name)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(
            "starts with a byte order mark, which no loader accepts: save it without one", file=path
        )
    with reading_json(raw, path, _JSON_BOUNDS):
        document = json.loads(raw.decode("utf-8"))
    level = [document]
    for _ in range(_MAX_JSON_DEPTH):
        level = [part for value in level for part in parts_of(value) if isinstance(part, (dict, list))]
        if not level:
            return document
    raise CheckpointError(f"is nested more than {_MAX_JSON_DEPTH} levels deep", file=path)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _strings(value: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name, text in value.items() if isinstance(text, str)}


def read_config(files: FileSet) -> dict[str, Any] | None:
    """Return the config of transformers, diffusers or peft among `files`; None where there is none."""
    for name in CONFIG_FILES:
        if files.is_file(name):
            config = read_json(files, name)
            if not isinstance(config, dict):
                raise CheckpointError("is not a JSON object", file=files.where(name))
            return config
    return None


def find_weights(files: FileSet, config: Mapping[str, Any] | None, chosen: str | None = None) -> Weights:
    """Return the weights that a load of `files` reads; or those that `chosen`, a file or an index, is of."""
    if chosen is None:
        chosen = _choose(files, config)
    if is_index(chosen):
        return _by_index(files, chosen)
    if is_of_rank(chosen):
        return Weights(chosen, tuple(_of_ranks(files)), {})
    if (shard := _SHARD.fullmatch(chosen)) is None or int(shard[3]) < 2:
        return Weights(chosen, (chosen,), {})
    for index in sorted(name for name in files.names() if "/" not in name and is_index(name)):
        if family(index) == family(chosen) and chosen in (found := _by_index(files, index)).files:
            note = f"{chosen} is one of {plural(len(found.files), 'shard')}: all that {index} lists are used"
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
    return next(iter(_of_ranks(files)), None) or _choose_only_candidate(files)


def _of_ranks(files: FileSet) -> list[str]:
    return sorted(filter(is_of_rank, files.names()))


def _choose_only_candidate(files: FileSet) -> str:
    """Choose weights of another name (a variant, an original release) where there is just one."""
    everything = sorted(files.names())
    inside = {os.path.dirname(name) for name in everything if "/" in name and is_weights(name)}
    inside = {folder for folder in inside if not folder.startswith(".")}  # an interrupted run's, a cache's
    folders = listed(sorted(inside))
    if "model_index.json" in everything and inside:
        raise CheckpointError(
            f"is a pipeline of several models: give the path of one of its folders ({folders}), "
            "or of a single weights file",
            file=files.name,
        )
    names = [name for name in everything if "/" not in name]
    for pattern in (r".*\.safetensors\.index(\.[^.]+)?\.json", r".*\.safetensors", r".*\.bin", r".*\.gguf"):
        matching = [name for name in reversed(names) if re.fullmatch(pattern, name)]
        # Shards of one count together, by their first.
        if found := sorted({shard_set(name) or name: name for name in matching}.values()):
            canonical = [name for name in found if family(name) in (*CANONICAL_STEMS, "pytorch_model")]
            if len(canonical or found) == 1:
                return (canonical or found)[0]
            raise CheckpointError(
                f"contains several checkpoints ({listed(found)}): give the path of one"
                + ", or the URL of its page on the Hub" * found[0].endswith(".gguf"),
                file=files.name,
            )
    hint = f"; its folders {folders} do: give the path of one" if inside else ""
    if any(name.endswith(".distcp") for name in names):
        hint = f"; {_DISTCP}"
    raise CheckpointError(f"contains no weights (no .safetensors, .bin or .gguf){hint}", file=files.name)


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
            f"is named as one of {int(count)} shards, but only {plural(len(found), 'file')} found: "
            f"{which}. Download the rest; to shard this file alone, rename it",
            file=files.where(chosen),
        )
    note = f"{plural(len(found), 'shard')} without an index: their headers list the tensors"
    names = tuple(found[number] for number in sorted(found))
    return Weights(names[0], names, {}, (note,))


def _by_index(files: FileSet, index: str) -> Weights:
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
    metadata = _object(document.get("metadata"))
    made = _strings(_object(metadata.get("shardkit")))
    return Weights(index, named, weight_map, dtype=_strings(metadata).get("dtype"), made=made)


def index_notes(weights: Weights, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return where an index is wrong about its files: transformers goes by the files, and so do we."""
    said, notes = weights.weight_map, []
    for problem, names in (
        ("lists {} that no file contains", said.keys() - tensors.keys()),
        ("lists {} in the wrong file", [n for n in said if n in tensors and tensors[n].file != said[n]]),
        ("omits {} that its files contain", tensors.keys() - said.keys() if said else ()),
    ):
        if names:
            found = problem.format(plural(len(names), "tensor"))
            notes.append(f"{weights.chosen} {found}: {listed(sorted(names))}")
    return tuple(notes)


def naming_notes(chosen: str, stem: str) -> tuple[str, ...]:
    """Return a note where files made from `chosen` get another name, for which somebody might look."""
    name = "".join(_stem(chosen))
    if name in (stem, "pytorch_model") or is_of_rank(chosen) or chosen.endswith(".gguf"):
        return ()
    return (f"shards of {name} are named {stem}, the name that from_pretrained looks for",)


def _check_inside(files: FileSet, file: str, named_in: str) -> None:
    """Refuse a file name that leaves the folder, by itself or through a link."""
    if not is_inside(file):
        raise CheckpointError(f"names a file outside the folder: {file!r}", file=files.where(named_in))
    try:
        files.check(os.path.normpath(file))
    except CheckpointError as error:
        raise CheckpointError(f"names {file!r}, which {error.message}", file=files.where(named_in)) from error
