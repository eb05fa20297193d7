"""Which tensor goes into which shard. Pure: reads no file, takes no lock, knows no disk.

Sizes are those of the files, headers included, so `max_shard_size` bounds what lies on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardkit.base.errors import PlanError
from shardkit.base.record import Record, Summary, Table, listed, plural, shown_path
from shardkit.base.sizes import format_size, parse_size
from shardkit.checkpoint.adapter import estimate_with_base
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.estimate import Estimate
from shardkit.checkpoint.kept import kept_tensors
from shardkit.checkpoint.loaded import load_dtype
from shardkit.checkpoint.quantized import quantized
from shardkit.checkpoint.ranks import for_ranks
from shardkit.checkpoint.scan import GGUF, NO_GGUF
from shardkit.formats.columns import COLUMN_BLOCKS, IN_BLOCKS
from shardkit.formats.safetensors import (
    FORMAT_METADATA,
    MAX_HEADER_BYTES,
    Entry,
    build_header,
    empty_header_chars,
)
from shardkit.formats.tensor import (
    DTYPE_NAMES,
    FLOAT_DTYPES,
    DtypeLike,
    LoadDtypeLike,
    TensorInfo,
    collector_paused,
    parse_dtype,
)
from shardkit.plan.packing import Item, pack_in_files, packing
from shardkit.plan.packing import Strategy as Strategy
from shardkit.plan.shards import PlannedTensor as PlannedTensor
from shardkit.plan.shards import Shard as Shard
from shardkit.plan.shards import shards_of
from shardkit.sources.resolve import is_on_hub

USUAL: tuple[int | str, Strategy] = "2GB", "size"
_SHOWN_SHARDS = 12


@dataclass(frozen=True)
class ShardPlan(Record):
    """How a checkpoint would be sharded.

    Attributes
    ----------
    source
        What it was planned for.
    stem
        What its files are called: "model" for ``model-00001-of-00008.safetensors``.
    strategy, max_shard_size, dtype
        As requested; the size in bytes, dtype None where nothing is cast.
    shards
        The files, in order.
    oversized
        Names of tensors too large for `max_shard_size`, each in a file of its own.
    side_bytes
        Bytes of all other files, which are also copied.
    metadata
        ``__metadata__`` of every file: that of the source, but for what describes single files of it.
    file_metadata
        Names of what does, and is not copied.
    kept
        Tensors that the cast leaves as they are, because transformers does not load them in its dtype (see
        `shardkit.checkpoint.kept`), with the dtype they are stored in.
    """

    source: str
    stem: str
    strategy: Strategy
    max_shard_size: int
    dtype: str | None
    shards: tuple[Shard, ...]
    oversized: tuple[str, ...]
    side_bytes: int
    metadata: dict[str, str]
    file_metadata: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return self.source  # as of a `Checkpoint`

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data, with sizes and notes; as `Record.to_dict`."""
        sizes = {"total_bytes": self.total_bytes, "disk_bytes": self.disk_bytes}
        files = {shard.file: shard.nbytes for shard in self.shards}
        return {**super().to_dict(), **sizes, "files": files, "notes": list(self._notes())}

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def largest_file(self) -> Shard:
        """The largest shard."""
        return max(self.shards, key=lambda shard: shard.nbytes)

    @property
    def auto_dtype(self) -> str | None:
        """The dtype that transformers chooses for the shards where neither config nor index says one."""
        floats = (t for t in self.shards[0].tensors if t.dtype in FLOAT_DTYPES)
        first = min(floats, key=lambda tensor: tensor.source.name, default=None)
        return DTYPE_NAMES[first.dtype] if first else None

    @property
    def index_file(self) -> str | None:
        """Name of the index; None where there is one file, which needs none."""
        return f"{self.stem}.safetensors.index.json" if len(self.shards) > 1 else None

    @cached_property
    def index(self) -> str | None:
        """The index as the Hub's conventions have it, in JSON."""
        if self.index_file is None:
            return None
        weight_map = {t.source.name: shard.file for shard in self.shards for t in shard.tensors}
        metadata = {"total_size": self.total_bytes, "shardkit": self.made}
        document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @property
    def made(self) -> dict[str, str]:
        """What the index says of how its files came about; a path on this machine it keeps to itself."""
        source = self.source if is_on_hub(self.source) else None
        known = {"source": source, "strategy": self.strategy, "max_shard_size": str(self.max_shard_size)}
        return {name: said for name, said in (*known.items(), ("cast_to", self.dtype)) if said}

    @property
    def disk_bytes(self) -> int:
        """Bytes that the destination will take, all files included; nothing more is needed on the way."""
        index = len(self.index.encode()) if self.index else 0
        return sum(shard.nbytes for shard in self.shards) + index + self.side_bytes

    def estimate(
        self,
        dtype: LoadDtypeLike | None,
        *,
        config: Mapping[str, Any] | None,
        side_files: Mapping[str, int] | None = None,
    ) -> Estimate:
        """Return how much memory loading the shards will take; see `Checkpoint.estimate`.

        Parameters
        ----------
        dtype
            Requested of `from_pretrained`; None: each tensor as the shards hold it.
        config, side_files
            Of the model: see `Checkpoint`.
        """
        stored = (
            TensorInfo(t.source.name, t.dtype, t.source.shape, s.file, s.header_bytes + t.begin, t.nbytes)
            for s in self.shards
            for t in s.tensors
        )
        target = load_dtype(dtype)
        return estimate_with_base(
            self.source, stored, target, Checkpoint.open, stem=self.stem, config=config, side_files=side_files
        )

    def header(self, shard: Shard) -> bytes:
        """Return what the file of one of the shards begins with."""
        entries = (
            Entry(t.source.name, t.dtype, t.source.shape, t.begin, t.begin + t.nbytes) for t in shard.tensors
        )
        return build_header(entries, self.metadata)

    def summary(self) -> Summary:
        """Return the plan as a person reads it; of many files, the first and the last."""
        if len(self.shards) <= _SHOWN_SHARDS:
            return self._summary(self.shards)
        return self._summary((*self.shards[: _SHOWN_SHARDS - 2], None, self.shards[-1]))

    def complete_summary(self) -> Summary:
        """Return the plan with all its files."""
        return self._summary(self.shards)

    def _summary(self, shards: Sequence[Shard | None]) -> Summary:
        facts = (
            ("source", shown_path(self.source)),
            ("strategy", f"{self.strategy}, at most {format_size(self.max_shard_size)} a file"),
            ("dtype", f"cast to {self.dtype}" if self.dtype else "as in the source"),
            ("files", f"{len(self.shards):,}, the largest {format_size(self.largest_file.nbytes)}"),
            ("weights", format_size(self.total_bytes)),
            ("disk needed", format_size(self.disk_bytes)),
        )
        hidden = (f"... {len(self.shards) - len(shards) + 1:,} more", "", "")
        rows = ((s.file, f"{len(s.tensors):,}", format_size(s.nbytes)) if s else hidden for s in shards)
        return Summary("Shard plan", facts, (Table(("file", "tensors", "size"), tuple(rows)),), self._notes())

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if len(self.shards) == 1 and self.max_shard_size == parse_size(USUAL[0]):
            notes.append(f"one file, as all of it is under {USUAL[0]}: for more files, lower max_shard_size")
        if self.oversized:
            larger = f"{plural(len(self.oversized), 'tensor')} larger than {format_size(self.max_shard_size)}"
            notes.append(f"{larger}, each in a file of its own: {listed(self.oversized)}")
        for dtype in dict.fromkeys(self.kept.values()):
            kept = [name for name, stored in self.kept.items() if stored == dtype]
            notes.append(
                f"{plural(len(kept), 'tensor')} kept in {dtype}, because transformers does not load them in "
                f"{self.dtype}: {listed(kept)}"
            )
        if self.file_metadata:
            left = listed(self.file_metadata)
            notes.append(f"metadata that describes individual files of the source is not copied: {left}")
        if self.stem == "adapter_model" and len(self.shards) > 1:
            notes.append("peft loads an adapter from one file only: raise max_shard_size until it fits")
        if COLUMN_BLOCKS in self.metadata:
            notes.append(IN_BLOCKS)
        return tuple(notes)


def plan_shards(
    checkpoint: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "2GB",
    strategy: Strategy = "size",
    dtype: DtypeLike | None = None,
    files: int | None = None,
    ranks: int | None = None,
) -> ShardPlan:
    """Plan how to shard a checkpoint; `files=1` merges it into one file.

    Parameters
    ----------
    checkpoint
        What `Checkpoint.open` returned, or anything that it opens.
    max_shard_size
        Maximum size of a file, header included: "500MB", "1.5GiB", or a number of bytes. A tensor larger than
        that gets a file of its own.
    strategy
        "size" fills one file after the other in the order of the source. For sizes [6, 6, 2, 6, 2, 2] and a
        limit of 10 it gives [6], [6, 2], [6, 2, 2]. "layer" writes one file for each decoder block,
        embeddings and head separately; a block above the limit is split. "balanced" writes a few files of
        nearly equal size, never more than "size" does: the largest is rarely more than 3 % above the optimum.
    dtype
        "float16", "bfloat16" or "float32" (or the torch dtype): what floating-point tensors are cast to,
        except those that transformers would load in another (see `ShardPlan.kept`).
    files
        Instead of size and strategy: so many files of nearly equal size, tensors in the order of the source.
    ranks
        For so many processes of tensor parallelism: what each of them needs of a matrix lies together, so
        that it reads nothing else. `load_model` reads such files, plain `from_pretrained` refuses them.

    Returns
    -------
    ShardPlan
        The files that would be written; `shard_checkpoint` carries it out.

    Raises
    ------
    SizeError
        If `max_shard_size` is not a size.
    PlanError
        If the strategy or dtype is unknown, or a cast of quantized weights is requested; if there are fewer
        tensors than `files`, or a size or strategy is given with it; if `ranks` do not divide the heads; of
        GGUF.
    CheckpointError
        If `ranks` are requested of a model for which transformers has no plan.

    Examples
    --------
    >>> plan = plan_shards("mistral-demo", max_shard_size="2MB")
    >>> [shard.file for shard in plan.shards][-1]
    'model-00003-of-00003.safetensors'
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    if checkpoint.format == GGUF:
        raise PlanError(f"{checkpoint.source} is GGUF: {NO_GGUF}")
    checkpoint = checkpoint if ranks is None else for_ranks(checkpoint, ranks)
    limit = parse_size(max_shard_size)
    pack = packing(strategy).pack
    if files is not None and (max_shard_size, strategy) != USUAL:
        raise PlanError("files divides a checkpoint by itself: leave out max_shard_size and strategy")
    target = parse_dtype(dtype)
    kept = _kept_by_cast(checkpoint, target) if target else {}
    metadata = {**FORMAT_METADATA, **checkpoint.metadata}
    empty = empty_header_chars(metadata)
    with collector_paused():
        items = [Item.of(t, None if t.name in kept else target) for t in checkpoint.tensors.values()]
        packed = pack(items, limit, empty) if files is None else pack_in_files(items, files)
        shards = shards_of([file for file in packed if file] or [[]], checkpoint.stem, empty)
    if files is not None:
        limit = max(shard.nbytes for shard in shards)
    _check_headers(checkpoint, shards)
    return ShardPlan(
        source=checkpoint.source,
        stem=checkpoint.stem,
        strategy=strategy,
        max_shard_size=limit,
        dtype=DTYPE_NAMES[target] if target else None,
        shards=shards,
        metadata=metadata,
        oversized=tuple(s.tensors[0].source.name for s in shards if s.tensors and s.nbytes > limit),
        side_bytes=sum(checkpoint.side_files.values()),
        file_metadata=checkpoint.file_metadata,
        kept=kept,
    )


def _kept_by_cast(checkpoint: Checkpoint, target: str) -> dict[str, str]:
    """Return which tensors a cast leaves as they are, with their dtype; refuse one of quantized weights."""
    if why := quantized(checkpoint.config, checkpoint.tensors):
        raise PlanError(f"{checkpoint.source}: {why}; a cast would destroy the weights: leave out dtype")
    others = {*FLOAT_DTYPES} - {target}
    castable = {t.name: t.dtype for t in checkpoint.tensors.values() if t.dtype in others}
    kept = kept_tensors(castable, checkpoint.config, target)
    return {name: DTYPE_NAMES[dtype] for name, dtype in castable.items() if name in kept}


def _check_headers(checkpoint: Checkpoint, shards: Sequence[Shard]) -> None:
    longest = max(shard.header_bytes for shard in shards)
    if longest > MAX_HEADER_BYTES:
        raise PlanError(
            f"{checkpoint.source}: {plural(len(shards), 'file')} for this many tensors need a header of "
            f"{longest:,} bytes, but readers accept {MAX_HEADER_BYTES:,}: lower max_shard_size"
        )
