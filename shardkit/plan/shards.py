"""The files of a plan: which tensors each has, and where in it they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardkit.formats.tensor import TensorInfo
from shardkit.plan.packing import Item, layout


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the source, and what becomes of it in a shard, where `begin` is in its data section."""

    source: TensorInfo
    dtype: str
    begin: int
    nbytes: int

    @property
    def is_cast(self) -> bool:
        """Whether its bytes change."""
        return self.dtype != self.source.dtype


@dataclass(frozen=True)
class Shard:
    """One file to write: its tensors in order of their offsets, and its exact size."""

    file: str
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    header_bytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes of its tensors."""
        return self.tensors[-1].begin + self.tensors[-1].nbytes if self.tensors else 0

    @property
    def nbytes(self) -> int:
        """Size of the file: header and tensors."""
        return self.header_bytes + self.data_bytes


def shards_of(packed: Sequence[Sequence[Item]], stem: str, empty: int) -> tuple[Shard, ...]:
    """Return the files that hold packed items, in which a header without entries takes `empty` bytes."""
    shards = []
    for number, items in enumerate(packed, start=1):
        place = f"-{number:05d}-of-{len(packed):05d}" if len(packed) > 1 else ""
        placed, header = layout(items, empty)
        tensors = tuple(PlannedTensor(item.tensor, item.dtype, begin, item.nbytes) for item, begin in placed)
        shards.append(Shard(f"{stem}{place}.safetensors", tensors, header))
    return tuple(shards)
