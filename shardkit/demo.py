"""The embedded model: a Mistral-architecture checkpoint made on the spot, with random weights.

What a load costs depends on a checkpoint's shapes, dtype and files, not on what the weights mean. So a
lesson about loading needs no download: it needs weights of the right shape, the same on every machine.
Each tensor is drawn from a generator of its own, seeded by (seed, place in the model), so its bytes depend
neither on threads nor on the number of files; it is written as it is drawn, so memory holds one chunk a
thread, however large the model.

    make_demo_checkpoint("demo", size="512MB")             # two files, as the original has on the Hub
    make_demo_checkpoint("full", size="14.5GB", seed=1)    # the real shape of Mistral-7B-v0.1
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import ml_dtypes
import numpy as np

from shardkit.base.errors import CheckpointError, DestinationError, PlanError, SizeError, SpaceError
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.safetensors import Entry, build_header, tensor_bytes
from shardkit.formats.tensor import CAST_DTYPES
from shardkit.shard.destination import put_in_place, resolve, sync

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_SMALLEST_BYTES = 5_000_000
_LARGEST_PARAMETERS = 7_250_000_000  # the true 7,241,732,096, rounded as people do: 14.5 GB in bfloat16
_WIDTHS = (4096, 3072, 2048, 1536, 1024, 512, 256, 192, 128, 96)
_FEWEST_LAYERS = 7  # a true width of fewer could miss a size by more than 6%
_TRUE_VOCAB = 32_000
_TRUE_VOCAB_FROM = 200_000_000  # parameters; below, its two tables would be most of the model
_SMALL_VOCAB = 960  # the 936 tokens of the tokenizer, rounded up to a multiple of 64
_INITIALIZER_RANGE = 0.02
_CHUNK_ELEMENTS = 1 << 18
_MOST_THREADS = 8
# A byte-level BPE, which can spell any text: trained once, so that a demo needs no tokenizers. Its merges
# are "a b", which every version reads; before 0.20 tokenizers did not know pairs.
_TOKENIZER = files("shardkit").joinpath("static/demo_tokenizer.json")
_RECIPE = 1  # recorded beside the arguments: raise it when the same arguments give other bytes
_OTHER_BYTES = 1_000_000  # at most, of headers and all that is not weights
_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [shardkit, demo, random-weights]
---

# A demo checkpoint

Made by shardkit (`make_demo_checkpoint`), to try out how checkpoints are stored, sharded and loaded.
The architecture is Mistral; the weights are random, and the text it generates means nothing.

| parameters | requested size | dtype | files | seed |
|---|---|---|---|---|
| {parameters:,} | {size:,} bytes | {dtype} | {shards} | {seed} |
"""


@dataclass(frozen=True, slots=True)
class DemoShape:
    """The shape of a Mistral model; the other dimensions follow from these as in the original."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int

    @property
    def heads(self) -> int:
        """Number of attention heads, each 128 wide but in the small widths; a quarter as many for keys."""
        return max(4, self.hidden // 128)

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(prod(shape) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each tensor, in the order of the model."""
        hidden, inner, keys = self.hidden, self.intermediate, self.hidden // 4
        layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for number in range(self.layers):
            for name, shape in layer.items():
                yield f"model.layers.{number}.{name}.weight", shape
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)


def make_demo_checkpoint(
    folder: str | os.PathLike[str],
    *,
    size: int | str = "512MB",
    dtype: str = "bfloat16",
    shards: int = 2,
    seed: int = 0,
) -> Checkpoint:
    """Make a Mistral-architecture checkpoint with random weights and a real tokenizer, without a network.

    It is streamed to disk, with memory that does not grow with `size`, and renamed into place: the folder is
    absent or complete. The same arguments give the same bytes (with the same version of numpy). A folder that
    already contains exactly this demo is returned as it is.

    Parameters
    ----------
    folder
        Where to write it: a new or empty folder.
    size
        Bytes of the weights in `dtype`, from 5 MB to the real shape of Mistral-7B-v0.1 ("14.5GB" in 16 bits,
        "29GB" in 32); met within 3% below 1 GB, within 6% above.
    dtype
        "bfloat16", "float16" or "float32".
    shards
        Number of weights files, of nearly equal size; the tensors keep their order.
    seed
        Seed of the weights, zero or more.

    Raises
    ------
    SizeError
        If `size` is not understood or out of range.
    PlanError
        If `dtype` is unknown, `shards` is below 1 or above the number of tensors, or `seed` is negative.
    DestinationError
        If `folder` is a file, contains anything else, or cannot be written.
    SpaceError
        If the disk is too small (a `DestinationError`).
    """
    shape = demo_shape(size, dtype)
    weights = _plan_files(shape, dtype, shards)
    if seed < 0:
        raise PlanError(f"seed {seed} is negative, but must be zero or more")
    made_by = {"recipe": _RECIPE, "size": parse_size(size), "dtype": dtype, "shards": shards, "seed": seed}
    target = resolve(folder)
    index = _index(weights)
    if (existing := _existing_demo(target, index, made_by)) is not None:
        return existing
    _check_space(target, index["metadata"]["total_size"] + _OTHER_BYTES)
    staging = target.with_name(f".{target.name}.shardkit-demo-{uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        _write_weights(staging, weights, dtype, seed)
        documents = _side_files(shape, dtype, made_by)
        if shards > 1:
            documents["model.safetensors.index.json"] = index
        _write_side_files(staging, documents)
        put_in_place(staging, target, overwrite=False)  # fails if another process has filled the folder since
    except OSError as error:
        raise DestinationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Checkpoint.open(target)


def demo_shape(size: int | str, dtype: str = "bfloat16") -> DemoShape:
    """Return the shape of the demo whose weights take about `size` bytes in `dtype`.

    The widest model of seven layers or more is chosen. The true width keeps the original's
    `intermediate`, only its layers vary; narrower models tune theirs to meet the size.

    Raises
    ------
    SizeError, PlanError
        As `make_demo_checkpoint`.
    """
    if dtype not in _DTYPES:
        raise PlanError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    asked, itemsize = parse_size(size), np.dtype(_DTYPES[dtype]).itemsize
    largest = _LARGEST_PARAMETERS * itemsize
    if not _SMALLEST_BYTES <= asked <= largest:
        raise SizeError(
            f"size {size!r} is {asked:,} bytes: a demo in {dtype} can have from {_SMALLEST_BYTES:,} "
            f"({format_size(_SMALLEST_BYTES)}) to {largest:,} ({format_size(largest)})"
        )
    wanted = asked / itemsize
    vocab = _TRUE_VOCAB if wanted >= _TRUE_VOCAB_FROM else _SMALL_VOCAB
    for hidden in _WIDTHS:
        outside, one = (DemoShape(hidden, hidden * 7 // 2, layers, vocab).parameters for layers in (0, 1))
        layers = (wanted - outside) / (one - outside)
        if layers >= _FEWEST_LAYERS:
            break
    whole = DemoShape(hidden, hidden * 7 // 2, round(layers), vocab)
    if hidden == _WIDTHS[0]:
        return whole
    # By so much is `intermediate` too large: it is a side of three matrices in each layer.
    excess = (whole.parameters - wanted) / (3 * hidden * whole.layers)
    return replace(whole, intermediate=round((whole.intermediate - excess) / 16) * 16)


def _plan_files(shape: DemoShape, dtype: str, shards: int) -> dict[str, list[Entry]]:
    """Cut the tensors, in order, where the files come nearest to equal; return them by file name."""
    word, tensors = CAST_DTYPES[dtype], list(shape.tensors())
    if not 1 <= shards <= len(tensors):
        raise PlanError(
            f"shards={shards}: the {len(tensors)} tensors of this demo fill from 1 to {len(tensors)}"
        )
    ends = [0, *accumulate(tensor_bytes(word, lengths) for _, lengths in tensors)]
    spans, cuts = list(zip(tensors, pairwise(ends), strict=True)), [0]
    for number in range(1, shards):
        possible = range(cuts[-1] + 1, len(tensors) - shards + number + 1)  # no file is left empty
        cuts.append(min(possible, key=lambda cut: abs(ends[cut] * shards - ends[-1] * number)))
    planned = {}
    for number, (first, last) in enumerate(pairwise([*cuts, len(tensors)]), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        planned[file] = [
            Entry(name, word, lengths, begin - ends[first], end - ends[first])
            for (name, lengths), (begin, end) in spans[first:last]
        ]
    return planned


def _index(weights: dict[str, list[Entry]]) -> dict[str, Any]:
    weight_map = {entry.name: file for file, entries in weights.items() for entry in entries}
    total = sum(entries[-1].end for entries in weights.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _existing_demo(target: Path, index: dict[str, Any], made_by: dict[str, Any]) -> Checkpoint | None:
    """Return the demo that `target` holds already; None if there is room for it."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise DestinationError(f"{target}: is a file: choose a new or empty folder")
    if not any(target.iterdir()):
        return None
    with suppress(CheckpointError):
        found = Checkpoint.open(target)
        recorded = (found.config or {}).get("shardkit_demo")
        # The record alone is not enough: a resharded copy carries the config along.
        held = {name: tensor.file for name, tensor in found.tensors.items()}
        total = index["metadata"]["total_size"]
        if (recorded, held, found.total_bytes) == (made_by, index["weight_map"], total):
            return found
    raise DestinationError(
        f"{target}: is not empty, and not the requested demo: choose another folder, or delete this one"
    )


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(next(parent for parent in target.parents if parent.exists())).free
    if free < needed:
        raise SpaceError(
            f"{target}: the demo needs {needed:,} bytes ({format_size(needed)}), but the disk has only "
            f"{free:,} ({format_size(free)}) free: choose a smaller size, or a folder on another disk"
        )


def _write_weights(folder: Path, weights: dict[str, list[Entry]], dtype: str, seed: int) -> None:
    places = []
    for file, entries in weights.items():
        header = build_header(entries)
        (folder / file).write_bytes(header)
        places += [(folder / file, len(header) + entry.begin, entry) for entry in entries]
    seeds = np.random.SeedSequence(seed).spawn(len(places))
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(partial(_draw_tensor, _DTYPES[dtype]), *zip(*places, strict=True), seeds))
    for file in weights:
        sync(folder / file)


def _draw_tensor(dtype: type, path: Path, start: int, entry: Entry, seed: np.random.SeedSequence) -> None:
    """Draw one tensor and write it to its place, chunk by chunk."""
    generator = np.random.Generator(np.random.SFC64(seed))
    buffer, elements = np.ones(_CHUNK_ELEMENTS, np.float32), prod(entry.shape)
    with open(path, "r+b") as handle:
        handle.seek(start)
        for done in range(0, elements, _CHUNK_ELEMENTS):
            values = buffer[: elements - done]
            if "norm" not in entry.name:  # norms are ones
                generator.standard_normal(dtype=np.float32, out=values)
                values *= np.float32(_INITIALIZER_RANGE)
            handle.write(values.astype(dtype, copy=False).view(np.uint8).data)


def _write_side_files(folder: Path, documents: dict[str, Any]) -> None:
    for name, content in documents.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text.rstrip() + "\n", encoding="utf-8", newline="\n")
        sync(folder / name)
    sync(folder)


def _side_files(shape: DemoShape, dtype: str, made_by: dict[str, Any]) -> dict[str, Any]:
    """Return what goes beside the weights, by file name: text, or what becomes JSON."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = {
        "architectures": ["MistralForCausalLM"], **ends, "hidden_act": "silu", "hidden_size": shape.hidden,
        "initializer_range": _INITIALIZER_RANGE, "intermediate_size": shape.intermediate,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers, "num_key_value_heads": shape.heads // 4, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": dtype,  # as on the Hub: transformers 4 reads only this word, 5 takes it for `dtype`
        "use_cache": True, "vocab_size": shape.vocab, "shardkit_demo": made_by,
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768,
        "clean_up_tokenization_spaces": False, **special,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
    }  # fmt: skip
    return {
        "config.json": config,
        "generation_config.json": ends,
        "README.md": _CARD.format(parameters=shape.parameters, **made_by),
        "tokenizer.json": _TOKENIZER.read_text(encoding="utf-8"),
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special,
    }
