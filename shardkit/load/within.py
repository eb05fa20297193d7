"""Loading within a memory budget: what can be, and a decoder of transformers that has no weights yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import transformers

from shardkit.base.errors import CheckpointError, PlanError
from shardkit.base.record import listed
from shardkit.checkpoint.adapter import is_adapter
from shardkit.checkpoint.budget import STATEFUL, Workload
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.config import architecture
from shardkit.checkpoint.estimate import RUNTIME_BYTES
from shardkit.checkpoint.quantized import quantized
from shardkit.load.blocks import dtype_name, fill_within, needs_of
from shardkit.load.recipes import Described

# Options by which other weights would be loaded than those of the folder, or more than a model returned.
_NOT_WITHIN = (
    "adapter_kwargs", "distributed_config", "gguf_file", "key_mapping", "output_loading_info",
    "quantization_config", "revision", "state_dict", "subfolder", "tp_plan", "variant",
)  # fmt: skip


def load_streaming(checkpoint: Checkpoint, dtype: object, work: Workload, options: dict[str, Any]) -> Any:
    """Return a model that streams what does not fit; None if all fits, so that a plain load will do.

    Takes, and raises, what `load_model` does; `options` are for `from_pretrained`.
    """
    _check_options(checkpoint, options)
    name = dtype_name(dtype)
    name = (checkpoint.auto_dtype or "float32") if name == "auto" else name
    trusted = bool(options.get("trust_remote_code"))
    # As for a plain load, options may be entries of the config; what is left is for the model.
    config, options = options.get("config"), {key: options[key] for key in options if key != "config"}
    if config is None:
        read = transformers.AutoConfig.from_pretrained
        config, options = read(checkpoint.folder, return_unused_kwargs=True, **options)
    estimate = checkpoint.estimate(name)
    needs = needs_of(config, name, work)
    # What a load imports may not be there yet.
    if max(0, RUNTIME_BYTES - needs.process_bytes) + sum(needs) + estimate.model_bytes <= work.max_memory:
        return None
    _check_streamable(checkpoint, trusted)
    model = _empty_decoder(checkpoint, config, name, options)
    model.memory_plan = fill_within(model, checkpoint, work, estimate.peak_anonymous_bytes)
    return model


def check_complete(found: Mapping[str, Any], model: str, checkpoint: Checkpoint) -> None:
    """Refuse a load whose info, as transformers gives it, says that weights were made at random."""
    if missing := sorted(map(str, found["missing_keys"])):
        raise CheckpointError(f"lacks weights that {model} needs: {listed(missing)}", file=checkpoint.source)
    for name, stored, expected in sorted(found["mismatched_keys"], key=str):
        one = checkpoint.tensors.get(name)
        raise CheckpointError(
            f"has shape {tuple(stored)}, but {model} with this config.json needs {tuple(expected)}",
            file=checkpoint.path(one.file) if one else checkpoint.source,
            tensor=name,
        )


def _check_options(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Refuse what cannot be loaded within a budget, whether it fits or not."""
    has_adapter = transformers.utils.is_peft_available() and "adapter_config.json" in checkpoint.place.names()
    if has_adapter or is_adapter(checkpoint.stem, checkpoint.config, checkpoint.tensors):
        why = "is an adapter, or has one, which max_memory does not support: merge it into its base model"
        raise CheckpointError(why, file=checkpoint.source)
    if checkpoint.config is None:
        raise CheckpointError("has no config.json, so it is not a model", file=checkpoint.source)
    place = options.get("device_map")
    if str(place.get("") if isinstance(place, dict) else place) not in ("None", "cpu"):
        raise PlanError(f"max_memory is for the CPU, not for device_map={place!r}")
    is_safe = checkpoint.format == "safetensors"
    chosen = {name for name in _NOT_WITHIN if options.get(name)}
    if options.get("use_safetensors") not in (None, is_safe):
        chosen.add("use_safetensors")
    if chosen:
        raise PlanError(f"max_memory cannot be combined with {listed(sorted(chosen))}: leave one of them out")


def _check_streamable(checkpoint: Checkpoint, trusted: bool) -> None:
    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"does not fit max_memory, and {why}", file=checkpoint.source)

    config, version = checkpoint.config or {}, transformers.__version__
    if int(version.split(".")[0]) < 5:
        refuse(f"only transformers 5 can stream it: {version} is installed")
    if why := quantized(checkpoint.config, checkpoint.tensors):
        refuse(f"quantized weights cannot be streamed: {why}")
    named, model_type = architecture(config), str(config.get("model_type"))
    decoders = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = decoders.get(model_type, ())
    is_decoder = named in ((found,) if isinstance(found, str) else found)
    if not named:
        refuse("its config.json names no model class in 'architectures'")
    if not is_decoder or config.get("is_encoder_decoder"):
        refuse(f"{named} is not a decoder that can be streamed: only causal language models of transformers")
    # RWKV also divides weights in place, which those read again do not survive.
    if getattr(transformers, named)._is_stateful and model_type not in STATEFUL:
        refuse(f"{named} cannot be streamed: how much memory its recurrent states need is not known")
    if trusted and config.get("auto_map"):
        refuse("a model with its own code cannot be streamed")


def _empty_decoder(checkpoint: Checkpoint, config: Any, dtype: str, options: dict[str, Any]) -> Any:
    """Return the model that `from_pretrained` would load, its weights on the meta device."""
    ours = ("device_map", "trust_remote_code", "use_safetensors", *_NOT_WITHIN)
    options = {name: options[name] for name in options if name not in ours}
    kind = getattr(transformers, architecture(checkpoint.config) or "")
    described = {name: Described(tensor) for name, tensor in checkpoint.tensors.items()}
    made = {"config": config, "state_dict": described, "dtype": dtype, "output_loading_info": True, **options}
    # First with everything on the meta device: else, what is missing would be made at random, in memory.
    _, found = kind.from_pretrained(None, **{**made, "device_map": "meta", "ignore_mismatched_sizes": True})
    check_complete(found, kind.__name__, checkpoint)
    model, _ = kind.from_pretrained(None, **made)
    model.name_or_path = model.config._name_or_path = checkpoint.folder
    hub = dict.fromkeys(("cache_dir", "proxies", "token")) | {"revision": "main", "subfolder": ""}
    hub |= {"force_download": False, "local_files_only": True, "trust_remote_code": False}
    model.adjust_generation_fn(options.get("generation_config"), False, False, checkpoint.folder, **hub)
    return model
