"""What transformers says of a model, on the meta device: no weights are read.

Stands alone: `shardkit.checkpoint.asking` runs it by path, in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A config is a stranger's: these keys would run code of the Hub, or make loops as long as it likes.
_CODE = re.compile(r"auto_map|.*implementation(_internal)?|_?fusion_config|use_pretrained_backbone")
_MOST_LAYERS, _MODULES_PER_TENSOR, _MODULES_AT_LEAST = 10_000, 20, 20_000

# The dtype is said by the cast; the rest says who wrote the config, and where the files lay.
_MAY_DIFFER = {"dtype", "torch_dtype", "transformers_version", "_diffusers_version", "_name_or_path"}
_MAY_DIFFER |= {"transformers_weights"}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Answer the "question" of a job, "keys", "kept" or "columns"; or say "why" it cannot be asked."""
    answers = {"keys": model_keys, "kept": kept_tensors, "columns": cut_by_columns}
    try:
        return answers[job["question"]](job)
    except Exception as error:  # ImportError, or whatever a class raises that makes no sense of its config
        return {"why": _one_line(error)}


def model_keys(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the model class of a config gets from source and copy, and where the two differ.

    The job has the "model" class; of "source" and "copy" their "config", and "folder" or "tensors" (dtype and
    shape by name). The answer is "why" it cannot be asked; or "model", "stack", "keys", "missing" (from both)
    and "differences".
    """
    import transformers

    stack = f"transformers {transformers.__version__}"
    name = job["model"] or ""
    kind = getattr(transformers, name, None)
    if not hasattr(kind, "from_pretrained"):
        return {"why": f"{name or 'the model'} is not a class of {stack}"}
    transformers.logging.set_verbosity_error()
    try:
        source, is_loadable = _keys(transformers, kind, job["source"])
    except Exception as error:
        return {"why": f"{stack} does not load the source: {_one_line(error)}"}
    try:
        copy, _ = _keys(transformers, kind, job["copy"], must_load=is_loadable)
        differences = _differences(source, copy)
    except Exception as error:
        if "allocate memory" in str(error):
            return {"why": f"not enough memory here to map the copy: {_one_line(error)}"}
        copy, differences = source, [f"{stack} loads the source but not the copy: {_one_line(error)}"]
    if job["source"].get("must_fit"):  # of a file of pieces that is missing, nothing else may say so
        differences += [
            f"{key} has another shape than config.json gives: is a file missing?"
            for key in sorted(source["mismatched"])
        ]
    found = {"model": name, "stack": stack, "keys": len(source["keys"]), "differences": differences}
    return {**found, "missing": sorted(source["missing"] & copy["missing"])}


def _keys(
    transformers: Any, kind: Any, side: dict[str, Any], *, must_load: bool = False
) -> tuple[dict[str, Any], bool]:
    """Load one side; return what the model got, and whether a load as users make it works.

    A folder that transformers cannot load as it is (an index is lost, a file larger than memory) is loaded
    by its tensors, unless it must load; and so is what is not on this disk.
    """
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"device_map": "meta", "local_files_only": True}
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options[name] = side["dtype"] or "auto"
    if side["folder"]:
        with suppress(*(() if must_load else (Exception,))):
            found = _told(*kind.from_pretrained(side["folder"], **options))
            if must_load or found["missing"] < found["keys"].keys():
                return found, True
    import torch

    config = kind.config_class.from_dict(side["config"])
    tensors = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (dtype, shape) in side["tensors"].items()
    }
    found = _told(*kind.from_pretrained(None, config=config, state_dict=tensors, **options))
    return found, not side["folder"]


def _told(model: Any, info: dict[str, Any]) -> dict[str, Any]:
    keys = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {kind: set(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    return {"keys": keys, "config": _comparable(model.config.to_dict()), **problems}


def _comparable(value: Any) -> Any:
    """Return a config without what may differ between copies of a model."""
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items() if key not in _MAY_DIFFER}
    return [_comparable(part) for part in value] if isinstance(value, list) else value


def config_differences(source: dict[str, Any], copy: dict[str, Any]) -> list[str]:
    """Return which entries of two configs differ, but for dtype, version and where they lie."""
    ours, theirs = _comparable(source), _comparable(copy)
    differ = (key for key in sorted({*ours, *theirs}) if repr(ours.get(key)) != repr(theirs.get(key)))
    return [
        f"config {key} is {ours.get(key)!r:.80}, but {theirs.get(key)!r:.80} in the copy" for key in differ
    ]


def _differences(source: dict[str, Any], copy: dict[str, Any]) -> list[str]:
    found = []
    for kind in ("missing", "unexpected", "mismatched"):
        found += [f"{key} is {kind} in the copy only" for key in sorted(copy[kind] - source[kind])]
        if kind != "unexpected":  # what no model expects of the source may be no tensor, and stays behind
            found += [f"{key} is {kind} in the source only" for key in sorted(source[kind] - copy[kind])]
    ours, theirs = source["keys"], copy["keys"]
    found += [
        f"{key} is {ours.get(key)} from the source, {theirs.get(key)} from the copy"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    return found + config_differences(source["config"], copy["config"])


def kept_tensors(job: dict[str, Any]) -> dict[str, Any]:
    """Return which of the "names" transformers does not load in a "dtype" when that is requested: "kept".

    Does, without data, as transformers 5 does in `convert_and_load_state_dict_in_model`.
    """
    import torch
    from transformers.core_model_loading import build_glob_alternation

    names, wanted = job["names"], getattr(torch, job["dtype"])
    model = _empty_model(job["config"], wanted, names)
    plan, state = model._get_dtype_plan(wanted), model.state_dict()
    pattern = build_glob_alternation(list(plan))[0] if plan else re.compile(r"(?!)")
    others = {name for name, value in state.items() if value.dtype != wanted or pattern.search(name)}
    named = naming(model)
    return {"kept": [name for name in names if others and named(name)[0] in others]}


def cut_by_columns(job: dict[str, Any]) -> dict[str, Any]:
    """Return which of the "names" of matrices tensor parallelism divides by columns: "columns"."""
    import torch
    from transformers.distributed.parallel_utils import _get_parameter_plan

    names = job["names"]
    model = _empty_model(job["config"], torch.float32, names)
    if not model.tp_plan:
        return {"why": f"{type(model).__name__} has none"}
    named = naming(model)
    styles = {name: _get_parameter_plan(named(name)[0], model.tp_plan) or "" for name in names}
    return {"columns": [name for name, style in styles.items() if style.startswith("rowwise")]}


def naming(model: Any) -> Callable[[str], tuple[str, str | None]]:
    """Return what says which parameter of a model a tensor of its files becomes, and by which pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, state, prefix = get_model_conversion_mapping(model), model.state_dict(), model.base_model_prefix
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def named(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, state)
        if found[0] not in state and name in state:
            found = rename_source_key(name, [], [], prefix, state)
        return found

    return named


def _empty_model(config: dict[str, Any], dtype: torch.dtype, names: list[str]) -> Any:
    import transformers
    from torch.nn.modules.module import register_module_module_registration_hook
    from transformers.utils import ContextManagers, logging

    created = iter(range(max(_MODULES_AT_LEAST, _MODULES_PER_TENSOR * len(names))))

    def count(*_: object) -> None:
        if next(created, None) is None:
            raise ValueError("the config describes more modules than the tensors can fill")

    made = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(_harmless(config))
    model_class = _model_class(config, type(made))
    made.dtype = dtype
    for part in filter(None, (getattr(made, key, None) for key in made.sub_configs)):
        part.dtype = dtype
    shown = logging.get_verbosity()
    hook = register_module_module_registration_hook(count)
    try:
        logging.set_verbosity_error()
        with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
            return model_class(made)
    finally:
        logging.set_verbosity(shown)
        hook.remove()


def _model_class(config: dict[str, Any], config_class: type) -> Any:
    import transformers

    if named := config.get("architectures"):
        found = getattr(transformers, named[0])
    else:
        found = transformers.MODEL_MAPPING[config_class]
    if not issubclass(found, transformers.PreTrainedModel):
        raise TypeError(f"{found} is not a model class")
    return found


def _harmless(value: Any) -> Any:
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    if not isinstance(value, dict):
        return value
    if any(isinstance(v, int) and "layer" in key and v > _MOST_LAYERS for key, v in value.items()):
        raise ValueError("has too many layers")
    return {key: _harmless(item) for key, item in value.items() if not _CODE.fullmatch(key)}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _limit_memory(nbytes: int) -> None:
    """Bound what a hostile config can take, which may ask for any number of layers."""
    with suppress(ImportError, ValueError, OSError):  # not on this system, or less is allowed already
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def _read_job(jobs: SimpleQueue[str]) -> None:
    """Read a job, a line; then nothing comes until whoever asks is gone, which may be killed at any time."""
    jobs.put(sys.stdin.readline())
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Read a job from standard input, and write the answer to standard output."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of it
    gc.disable()  # which would take a fifth of the imports, and find nothing
    jobs: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read_job, args=(jobs,), daemon=True).start()
    with suppress(ImportError):  # then the answer is that
        from transformers import PreTrainedModel  # noqa: F401  and torch with it, while bytes are compared
    job = json.loads(jobs.get())
    _limit_memory(job["memory_bytes"])
    found = answer(job)
    with os.fdopen(out, "w", encoding="utf-8") as pipe:
        json.dump(found, pipe)
    os._exit(0)  # at once: to take torch apart takes most of a second


if __name__ == "__main__":
    main()
