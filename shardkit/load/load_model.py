"""Loading a model as fast as its disk allows: its files are read while everything else is got ready."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import metadata
from typing import Any, Literal

from shardkit.base.errors import CheckpointError
from shardkit.base.extras import require
from shardkit.base.machine import is_slow_to_map, usable_memory
from shardkit.base.pages import resident_bytes
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.adapter import is_adapter
from shardkit.checkpoint.belonging import needed_files
from shardkit.checkpoint.budget import CONTEXT_TOKENS, Sequences
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.config import architecture
from shardkit.checkpoint.estimate import Estimate
from shardkit.checkpoint.layout import find_weights, read_config
from shardkit.checkpoint.ranks import check_ranks, is_for_ranks, is_shared, tensor_parallel_size
from shardkit.checkpoint.scan import GGUF, format_of, refuse_gguf
from shardkit.formats.names import is_of_rank
from shardkit.formats.tensor import CAST_DTYPES, LoadDtypeLike, dtype_name
from shardkit.load.into_memory import WeightsInMemory
from shardkit.load.prefetch import prefetch as start_prefetch
from shardkit.load.ranges import Ranges
from shardkit.sources.resolve import resolve

# Pages beyond this share of the memory that is free would push out others that were just read.
_CACHE_SHARE = 0.9
# From this share of the weights on that a load leaves as they are, they are read ahead into memory.
_MOSTLY = 0.9
# Options with which other files may be loaded.
FILE_OPTIONS = ("use_safetensors", "variant", "subfolder", "gguf_file", "revision")
_CAUSAL = "AutoModelForCausalLM"


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: LoadDtypeLike = "auto",
    prefetch: bool = True,
    max_memory: int | str | dict[Any, Any] | None = None,
    context_tokens: int = CONTEXT_TOKENS,
    batch_size: int = 1,
    **from_pretrained_options: Any,
) -> Any:
    """Load a model with transformers: with its files prefetched, or such that it runs within `max_memory`.

    Prefetched: threads start before torch and transformers are imported, and continue during the first
    forward pass, which would otherwise wait for the disk page by page. They use a few megabytes. On a network
    or FUSE mount, safetensors that fit are read into memory, in large requests, instead of mapped: that takes
    the memory of the weights, once. It needs transformers 5.

    Within `max_memory`: a model that does not fit keeps as many of its weights in memory as it may, and reads
    the others for every pass, while it computes. Its logits are those of the plain load, bit for bit. Its
    `memory_plan` shows what stays and what is read. Deleting the model ends its thread and frees its buffers.

    Parameters
    ----------
    source
        A checkpoint's folder, or the weights or index file in it that transformers loads; or a model on
        the Hub, which is downloaded first.
    dtype
        Passed to `from_pretrained`. Shards in this dtype are mapped, not copied, so the source must stay
        where it is as long as the model is used; not those that were read from a slow mount.
    prefetch
        Whether to prefetch the files; without `max_memory`, and unless several processes share the model,
        each of which reads what it needs of safetensors, and no more, into memory.
    max_memory
        The most memory that the process may need on this model's account, all else in it included: "2GB", or
        bytes. None, or enough for all of the model: it is loaded as transformers does. A dict is passed on to
        `from_pretrained`.
    context_tokens, batch_size
        The longest sequence and the most sequences at a time, whose KV cache and activations are part of
        `max_memory`. A model that streams refuses more.
    **from_pretrained_options
        Passed on: ``device_map``, ``attn_implementation``, ``distributed_config={"tp_size": 2}``, ...

    Returns
    -------
    The model: what ``AutoModelForCausalLM`` gives for a causal language model, else the class that the
    config names, else what ``AutoModel`` gives; with ``trust_remote_code=True`` the checkpoint's own class.

    Raises
    ------
    CheckpointError
        If the source is not a valid checkpoint, or is a file that transformers would not load.
        With `max_memory`, also if it does not fit and is not a decoder of transformers, or is quantized. As
        the model runs, if a file is truncated, changed, or cannot be read.
    PlanError
        If `dtype` is text, but not a dtype, or a count is not a whole number above zero; or `max_memory` is
        too small: names the smallest that is not. Or if options ask for another device, or other weights than
        the folder's, with `max_memory`; or if the processes of tensor parallelism cannot share the heads.
    SizeError
        If `max_memory` is not a size.
    MissingPackageError
        If torch or transformers is not installed.

    Examples
    --------
    >>> load_model("sharded").dtype
    torch.bfloat16
    """
    require("load", "loading a model", "torch", "transformers")
    former = from_pretrained_options.pop("torch_dtype", None)  # what transformers 4 calls it
    dtype = former or "auto" if dtype in (None, "auto") else dtype
    if isinstance(dtype, str) and dtype != "auto":
        dtype = dtype_name(dtype)
    if isinstance(max_memory, dict):  # for each device, as transformers has it
        from_pretrained_options["max_memory"], max_memory = max_memory, None
    budget = None if max_memory is None else parse_size(max_memory)
    sequences = Sequences(context_tokens, batch_size)
    options, where = from_pretrained_options, {}
    if not os.path.exists(os.path.expanduser(source)):  # from the folder, transformers would ignore them
        where = {name: options.pop(name) for name in ("revision", "token") if name in options}
    folder, files = loaded_files(source, **where)
    checkpoint = Checkpoint.open(folder)
    check_ranks(checkpoint.config, tensor_parallel_size(options))
    if budget is not None:
        from shardkit.load.within import check_complete, load_streaming  # with torch and transformers

        model = load_streaming(checkpoint, dtype, sequences.within(budget), options)
        if model is not None:
            return model
    with _reading(checkpoint, files, dtype, options, prefetch):
        import transformers

        names = loader_names(checkpoint.config, bool(options.get("trust_remote_code")))
        loader = next(found for name in names if (found := getattr(transformers, name, None)))
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        load = partial(loader.from_pretrained, folder, **{name: dtype}, **options)
        if budget is None:
            return load()
        model, found = load(output_loading_info=True, ignore_mismatched_sizes=True)
        check_complete(found, type(model).__name__, checkpoint)
        return model


def _reading(
    checkpoint: Checkpoint, files: list[str], dtype: object, options: Mapping[str, Any], prefetch: bool
) -> AbstractContextManager[None]:
    """Return what a load is done in: how it reads files, or what reads them while all else is got ready."""
    if is_for_ranks(checkpoint) or is_shared(checkpoint, options):
        return Ranges(checkpoint).in_transformers()
    if not prefetch:
        return nullcontext()
    if when := read_into_memory(checkpoint, dtype, options):
        return WeightsInMemory(checkpoint, is_ahead=when == "ahead").in_transformers()
    return _prefetched(files, prefetch_bytes(checkpoint, dtype))


@contextmanager
def _prefetched(files: list[str], limit_bytes: int) -> Iterator[None]:
    stop = start_prefetch(files, limit_bytes)
    try:
        yield
    except BaseException:  # else it continues during the first forward pass
        stop()
        raise


def loaded_files(source: str | os.PathLike[str], **where: Any) -> tuple[str, list[str]]:
    """Return the folder that transformers is given, and the paths of the weights that it loads from there.

    `where` are a `revision` and a `token` of the Hub.

    Raises
    ------
    CheckpointError
        If `source` holds no checkpoint, or is a file beside the one that transformers chooses.
    """
    found = resolve(source, needed_files, download=True, **where)
    if found.files.folder is None:
        raise CheckpointError(
            "is not on this machine: shard it to a folder, and load that", file=found.source
        )
    config = read_config(found.files)
    is_gguf = format_of(found.chosen or "").name == GGUF
    if found.chosen and config is None and not is_gguf:
        raise CheckpointError(
            "has no config.json next to it, so it cannot be loaded as a model", file=found.source
        )
    weights = find_weights(found.files, config, found.chosen if is_gguf else None)
    refuse_gguf(format_of(weights.chosen).name, found.source)
    if is_of_rank(weights.chosen):
        raise CheckpointError(
            "contains pieces of tensors, which transformers does not load: shard it, and load that",
            file=found.source,
        )
    if found.chosen not in (None, weights.chosen):
        raise CheckpointError(
            f"transformers loads {weights.chosen} from this folder, not this file", file=found.source
        )
    return found.files.name, [found.files.where(name) for name in weights.files]


def loader_names(config: Mapping[str, Any] | None, trusted: bool) -> list[str]:
    """Return names of classes of transformers, of which the first that is there loads a model."""
    named, own = architecture(config) or "", (config or {}).get("auto_map")
    if trusted and isinstance(own, dict):
        # Its own code may offer one class for many tasks, or under another name than the config's.
        classes = {auto: str(own[auto]).rpartition(".")[2] for auto in own if auto.startswith("AutoModel")}
        autos = sorted(classes, key=lambda auto: (classes[auto] != named, auto != _CAUSAL, auto))
    else:
        autos = []
    return [*autos, *([_CAUSAL] if named.endswith("ForCausalLM") else [named, "AutoModel"])]


def read_into_memory(
    checkpoint: Checkpoint, dtype: object, options: Mapping[str, Any], memory_limit: int | None = None
) -> Literal["ahead", "on request"] | None:
    """Return when to read the weights into memory; None where mapping their files is better, or has to be.

    Reading is better on a slow mount if all of them fit and most are not in the page cache: ahead of the
    load if what is read stays in memory, else as the load requests it, so that there are no two copies.
    """
    if (
        not any(map(is_slow_to_map, checkpoint.folders))
        or checkpoint.format != "safetensors"
        or is_adapter(checkpoint.stem, checkpoint.config, checkpoint.tensors)
        or is_for_ranks(checkpoint)
        or any(name in options for name in FILE_OPTIONS)
        or int(metadata.version("transformers").split(".")[0]) < 5
        or prefetch_bytes(checkpoint, dtype, memory_limit) < checkpoint.total_bytes
        or (resident_bytes(map(checkpoint.path, checkpoint.files)) or 0) > checkpoint.total_bytes // 2
    ):
        return None
    stays_here = options.get("device_map") in (None, "cpu", {"": "cpu"})
    is_stored = _estimate(checkpoint, dtype).mapped_bytes >= _MOSTLY * checkpoint.total_bytes
    return "ahead" if stays_here and is_stored else "on request"


def prefetch_bytes(checkpoint: Checkpoint, dtype: object, memory_limit: int | None = None) -> int:
    """Return how many bytes of the files the page cache can keep beside what the load itself takes."""
    free = min((left for left in (usable_memory(), memory_limit) if left is not None), default=0)
    return max(0, int(_CACHE_SHARE * (free - _estimate(checkpoint, dtype).peak_anonymous_bytes)))


def _estimate(checkpoint: Checkpoint, dtype: object) -> Estimate:
    asked = str(dtype).removeprefix("torch.")
    return checkpoint.estimate(asked if asked in CAST_DTYPES else None)
