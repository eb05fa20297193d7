"""The embedded model: a checkpoint of Mistral's or falcon's architecture, with random weights, made here.

What a load costs depends on a checkpoint's shapes, dtype and files, not on what the weights mean. So a
lesson about loading needs no download: it needs weights of the right shape, the same on every machine.
They are a `FileSet` whose bytes are drawn as they are read, each piece by a generator of its own, seeded by
(seed, tensor, offset). The engine writes them as it writes any checkpoint: with memory that does not grow
with the model, and into a folder that is absent or complete.

    make_demo_checkpoint("demo", size="512MB")             # two files, as the original has on the Hub
    make_demo_checkpoint("full", size="14.5GB", seed=1)    # the real shape of Mistral-7B-v0.1
    make_demo_checkpoint("demo", architecture="falcon")    # two .bin files, as falcon-7b-instruct has
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from shardkit.base.errors import CheckpointError, DestinationError, PlanError
from shardkit.base.jobs import Crew, ProgressCallback, resumable
from shardkit.base.machine import Watch
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo.bins import bin_name, write_bins
from shardkit.demo.shapes import DTYPES, Architecture, DemoShape, demo_shape
from shardkit.formats.tensor import CAST_DTYPES, DtypeLike, TensorInfo, dtype_name
from shardkit.plan.plan import ShardPlan, plan_shards
from shardkit.shard.destination import resolve
from shardkit.shard.engine import reshard
from shardkit.shard.folder_store import FolderStore
from shardkit.shard.store import Job
from shardkit.sources.fileset import CHUNK_BYTES, FileSet

# What lies beside the weights. The tokenizer is a byte-level BPE, which can spell any text, trained once; its
# merges are "a b", which every version reads: before 0.20 tokenizers did not know pairs.
_BESIDE = Path(__file__).parents[1] / "static" / "demo"
_RECIPE = 2  # recorded beside the arguments: raise it when the same arguments give other bytes
_INITIALIZER_RANGE = 0.02


class DemoFiles(FileSet):
    """A file for each tensor, drawn as it is read, and the files of a folder beside them."""

    folder, is_fixed = None, True

    def __init__(self, shape: DemoShape, made_by: dict[str, Any], beside: Path) -> None:
        self.name, self._seed, self._beside = f"demo of {made_by}", made_by["seed"], beside
        self._drawn_as = shape.drawn_as
        self._dtype, dtype = np.dtype(DTYPES[made_by["dtype"]]), CAST_DTYPES[made_by["dtype"]]
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
        values = np.empty(nbytes // self._dtype.itemsize, np.float32)
        if isinstance(drawn_as := self._drawn_as(name), float):
            values[:] = drawn_as
        else:
            seeds = np.random.SeedSequence(self._seed, spawn_key=(*drawn_as.encode(), start))
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
    architecture: Architecture = "mistral",
    progress: ProgressCallback | None = None,
) -> Checkpoint:
    """Make a checkpoint with random weights and a real tokenizer, without a network.

    It is streamed to disk, with memory that does not grow with `size`, and renamed into place: the folder is
    absent or complete. The same arguments give the same bytes (with the same version of numpy). A folder that
    already contains exactly this demo is returned as it is; an interrupted call resumes when it is repeated.

    Parameters
    ----------
    folder
        Where to write it: a new folder, or an empty one that is not the current directory.
    size
        Bytes of the weights in `dtype`, from 5 MB to the real shape of Mistral-7B-v0.1 or falcon-7b ("14.5GB"
        in 16 bits, "29GB" in 32); met within 3% (a falcon's within 4%) below 1 GB, within 6% above.
    dtype
        "bfloat16", "float16" or "float32".
    shards
        Number of weights files, of nearly equal size; the tensors keep their order.
    seed
        Seed of the weights, zero or more.
    architecture
        "mistral"; or "falcon", after falcon-7b-instruct: one matrix for queries, keys and values, one head
        for the latter two, an output head that is tied and yet stored, and weights that torch saved (`.bin`).
        Making it needs torch, and twice the disk meanwhile; an interrupted call starts over.
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
        If `dtype` or `architecture` is unknown, `shards` is below 1 or above the number of tensors, or
        `seed` is negative.
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
    shape = demo_shape(size, dtype, architecture)
    if seed < 0:
        raise PlanError(f"seed {seed} is negative, but must be zero or more")
    made_by = {"recipe": _RECIPE, "size": parse_size(size), "dtype": dtype, "shards": shards, "seed": seed}
    made_by |= {} if architecture == "mistral" else {"architecture": architecture}
    target, watch = resolve(folder), Watch()
    with TemporaryDirectory() as beside:
        checkpoint = _generated(shape, made_by, Path(beside))
        most = len(checkpoint.tensors)
        if not 1 <= shards <= most:
            raise PlanError(f"shards={shards}: the {most} tensors of this demo fill from 1 to {most}")
        plan = plan_shards(checkpoint, files=shards)
        if (existing := _existing_demo(target, plan, made_by)) is not None:
            return existing
        crew = Crew(min(8, os.cpu_count() or 1), progress=progress)
        job = Job(checkpoint, plan, verify=False, allow_overflow=False, crew=crew)
        if architecture == "falcon":
            _put_bins(job, target, watch)
        else:
            reshard(FolderStore(job, target, overwrite=False, resume=True), watch)
    return Checkpoint.open(target)


def _generated(shape: DemoShape, made_by: dict[str, Any], beside: Path) -> Checkpoint:
    """Return the demo as a checkpoint to be sharded; what lies beside its weights is written to `beside`."""
    texts = {path.name: path.read_bytes() for path in sorted(_BESIDE.iterdir())}
    base = {} if "architecture" in made_by else json.loads(texts["config.json"])
    # transformers 4 reads only the word `torch_dtype`, 5 takes it for `dtype`.
    config = base | shape.config | {"torch_dtype": made_by["dtype"], "shardkit_demo": made_by}
    texts["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    facts = {"architecture": "Mistral", "parameters": shape.parameters} | made_by
    texts["README.md"] = texts["README.md"].decode().format(**facts).encode()
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


def _put_bins(job: Job, target: Path, watch: Watch) -> None:
    """Write the files that torch saves, from safetensors that are gone then, and rename them into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        made = Path(scratch, "safetensors")
        reshard(FolderStore(job, made, overwrite=False, resume=False), watch)
        write_bins(made, Path(scratch, "bins")).rename(target)


def _existing_demo(target: Path, plan: ShardPlan, made_by: dict[str, Any]) -> Checkpoint | None:
    """Return the demo that `target` holds already; None if there is room for it."""
    if not target.is_dir() or not any(target.iterdir()):
        return None
    with suppress(CheckpointError):
        found = Checkpoint.open(target)
        # The record alone is not enough: a resharded or cast copy carries the config along.
        held = {tensor.name: (tensor.file, tensor.dtype) for tensor in found.tensors.values()}
        file = bin_name if "architecture" in made_by else str
        wanted = {t.source.name: (file(shard.file), t.dtype) for shard in plan.shards for t in shard.tensors}
        if ((found.config or {}).get("shardkit_demo"), held) == (made_by, wanted):
            return found
    raise DestinationError(
        f"{target} is not empty, and not the requested demo: choose another folder, or delete this one"
    )
