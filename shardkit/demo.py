"""The embedded model: a Mistral-architecture checkpoint generated locally, with random weights.

What a load costs depends on a checkpoint's shapes, dtype and files, not on what the weights mean. So a
lesson about loading needs no download: it needs weights of the right shape, the same on every machine.
They are a `FileSet` whose bytes are drawn as they are read, each piece by a generator of its own, seeded by
(seed, tensor, offset). The engine writes them as it writes any checkpoint: with memory that does not grow
with the model, and into a folder that is absent or complete.

    make_demo_checkpoint("demo", size="512MB")             # two files, as the original has on the Hub
    make_demo_checkpoint("full", size="14.5GB", seed=1)    # the real shape of Mistral-7B-v0.1
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np

from shardkit.base.errors import CheckpointError, DestinationError, PlanError, SizeError
from shardkit.base.jobs import Crew, ProgressCallback, resumable
from shardkit.base.machine import Watch
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.tensor import CAST_DTYPES, DtypeLike, TensorInfo, dtype_name
from shardkit.plan.plan import Shard, ShardPlan, plan_shards
from shardkit.shard.destination import resolve
from shardkit.shard.engine import reshard
from shardkit.shard.folder_store import FolderStore
from shardkit.shard.store import Job
from shardkit.sources.fileset import CHUNK_BYTES, FileSet

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_SMALLEST_BYTES = 5_000_000
_LARGEST_PARAMETERS = 7_250_000_000  # the true 7,241,732,096, rounded as people do: 14.5 GB in bfloat16
_WIDTHS = (4096, 3072, 2048, 1536, 1024, 512, 256, 192, 128, 96)
_FEWEST_LAYERS = 7  # a true width of fewer could miss a size by more than 6%
_TRUE_VOCAB = 32_000
_TRUE_VOCAB_FROM = 200_000_000  # parameters; below, its two tables would be most of the model
_SMALL_VOCAB = 960  # the 936 tokens of the tokenizer, rounded up to a multiple of 64
# What lies beside the weights. The tokenizer is a byte-level BPE, which can spell any text, trained once; its
# merges are "a b", which every version reads: before 0.20 tokenizers did not know pairs.
_BESIDE = Path(__file__).with_name("static") / "demo"
_RECIPE = 2  # recorded beside the arguments: raise it when the same arguments give other bytes
_INITIALIZER_RANGE = 0.02


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


class DemoFiles(FileSet):
    """A file for each tensor, drawn as it is read, and the files of a folder beside them."""

    folder = None

    def __init__(self, shape: DemoShape, made_by: dict[str, Any], beside: Path) -> None:
        self.name, self._seed, self._beside = f"demo of {made_by}", made_by["seed"], beside
        self._dtype, dtype = np.dtype(_DTYPES[made_by["dtype"]]), CAST_DTYPES[made_by["dtype"]]
        self.weights = {
            name: TensorInfo(name, dtype, lengths, name, 0, prod(lengths) * self._dtype.itemsize)
            for name, lengths in shape.tensors()
        }

    def names(self) -> Iterable[str]:
        """Return the names of all files."""
        return [*self.weights, *os.listdir(self._beside)]

    def size(self, name: str) -> int:
        """Return its size in bytes."""
        return self.weights[name].nbytes if name in self.weights else os.path.getsize(self._beside / name)

    def state(self, name: str) -> tuple[int | str, ...]:
        """Return its size, and what all bytes follow from."""
        return self.size(name), self.name

    def read(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range of a tensor, at most `CHUNK_BYTES` at a time."""
        end = offset + nbytes
        for start in range(offset - offset % CHUNK_BYTES, end, CHUNK_BYTES):
            yield self._drawn(name, start)[max(0, offset - start) : end - start]

    def _drawn(self, name: str, start: int) -> memoryview:
        nbytes = min(CHUNK_BYTES, self.weights[name].nbytes - start)
        values = np.ones(nbytes // self._dtype.itemsize, np.float32)
        if "norm" not in name:  # norms are ones
            seeds = np.random.SeedSequence(self._seed, spawn_key=(*name.encode(), start))
            np.random.Generator(np.random.SFC64(seeds)).standard_normal(dtype=np.float32, out=values)
            values *= np.float32(_INITIALIZER_RANGE)
        return values.astype(self._dtype, copy=False).view(np.uint8).data

    def fetched(self, name: str) -> Path:
        """Return the path of a file that is no weights."""
        return self._beside / name


@resumable()
def make_demo_checkpoint(
    folder: str | os.PathLike[str],
    *,
    size: int | str = "512MB",
    dtype: DtypeLike = "bfloat16",
    shards: int = 2,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Checkpoint:
    """Make a Mistral-architecture checkpoint with random weights and a real tokenizer, without a network.

    It is streamed to disk, with memory that does not grow with `size`, and renamed into place: the folder is
    absent or complete. The same arguments give the same bytes (with the same version of numpy). A folder that
    already contains exactly this demo is returned as it is; an interrupted call resumes when it is repeated.

    Parameters
    ----------
    folder
        Where to write it: a new folder, or an empty one that is not the current directory.
    size
        Bytes of the weights in `dtype`, from 5 MB to the real shape of Mistral-7B-v0.1 ("14.5GB" in 16 bits,
        "29GB" in 32); met within 3% below 1 GB, within 6% above.
    dtype
        "bfloat16", "float16" or "float32".
    shards
        Number of weights files, of nearly equal size; the tensors keep their order.
    seed
        Seed of the weights, zero or more.
    progress
        Called with a `Progress`; returning False stops the job, which can be resumed.

    Returns
    -------
    Checkpoint
        What was made, or was there already.

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

    Examples
    --------
    >>> make_demo_checkpoint("tiny", size="5MB", dtype="float32").parameters
    1264416
    """
    dtype = dtype_name(dtype)
    shape = demo_shape(size, dtype)
    if seed < 0:
        raise PlanError(f"seed {seed} is negative, but must be zero or more")
    made_by = {"recipe": _RECIPE, "size": parse_size(size), "dtype": dtype, "shards": shards, "seed": seed}
    target, watch = resolve(folder), Watch()
    with TemporaryDirectory() as beside:
        checkpoint = _generated(shape, made_by, Path(beside))
        plan = _cut(plan_shards(checkpoint, max_shard_size="1TB"), shards)
        if (existing := _existing_demo(target, plan, made_by)) is not None:
            return existing
        crew = Crew(min(8, os.cpu_count() or 1), progress=progress)
        job = Job(checkpoint, plan, verify=False, allow_overflow=False, crew=crew)
        reshard(FolderStore(job, target, overwrite=False, resume=True), watch)
    return Checkpoint.open(target)


def demo_shape(size: int | str, dtype: str = "bfloat16") -> DemoShape:
    """Return the shape of the demo whose weights take about `size` bytes in `dtype`.

    The widest model of seven layers or more is chosen. The true width keeps the original's
    `intermediate`, only its layers vary; narrower models tune theirs to meet the size.
    """
    dtype = dtype_name(dtype)
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


def _generated(shape: DemoShape, made_by: dict[str, Any], beside: Path) -> Checkpoint:
    """Return the demo as a checkpoint to be sharded; what lies beside its weights is written to `beside`."""
    texts = {path.name: path.read_bytes() for path in sorted(_BESIDE.iterdir())}
    config = json.loads(texts["config.json"]) | {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads // 4,
        "num_hidden_layers": shape.layers, "vocab_size": shape.vocab,
        "torch_dtype": made_by["dtype"],  # transformers 4 reads only this word, 5 takes it for `dtype`
        "shardkit_demo": made_by,
    }  # fmt: skip
    texts["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    card = texts["README.md"].decode().format(parameters=shape.parameters, **made_by)
    texts["README.md"] = card.encode()
    for name, text in texts.items():
        (beside / name).write_bytes(text)
    files = DemoFiles(shape, made_by, beside)
    return Checkpoint(
        source=files.name,
        place=files,
        format="safetensors",
        stem="model",
        files=tuple(files.weights),
        tensors=files.weights,
        config=config,
        side_files={name: len(text) for name, text in texts.items()},
    )


def _cut(whole: ShardPlan, count: int) -> ShardPlan:
    """Cut the one file of a plan, tensors in order, where files come nearest to equal."""
    tensors = whole.shards[0].tensors
    if not 1 <= count <= len(tensors):
        raise PlanError(
            f"shards={count}: the {len(tensors)} tensors of this demo fill from 1 to {len(tensors)}"
        )
    begins, cuts = [tensor.begin for tensor in tensors], [0]
    for number in range(1, count):
        possible = range(cuts[-1] + 1, len(tensors) - count + number + 1)  # no file is left empty
        cuts.append(min(possible, key=lambda cut: abs(begins[cut] * count - whole.total_bytes * number)))
    shards = []
    for number, (first, end) in enumerate(pairwise([*cuts, len(tensors)]), start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        held = tuple(replace(tensor, begin=tensor.begin - begins[first]) for tensor in tensors[first:end])
        shards.append(Shard(file, held, len(whole.header(Shard(file, held, 0)))))
    largest = max(shard.nbytes for shard in shards)
    return replace(whole, strategy="balanced", max_shard_size=largest, shards=tuple(shards))


def _existing_demo(target: Path, plan: ShardPlan, made_by: dict[str, Any]) -> Checkpoint | None:
    """Return the demo that `target` holds already; None if there is room for it."""
    if not target.is_dir() or not any(target.iterdir()):
        return None
    with suppress(CheckpointError):
        found = Checkpoint.open(target)
        # The record alone is not enough: a resharded copy carries the config along.
        sizes = {file: state[0] for file, state in found.seen.items()}
        wanted = {shard.file: shard.nbytes for shard in plan.shards}
        if ((found.config or {}).get("shardkit_demo"), sizes) == (made_by, wanted):
            return found
    raise DestinationError(
        f"{target} is not empty, and not the requested demo: choose another folder, or delete this one"
    )
