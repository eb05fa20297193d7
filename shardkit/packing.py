"""The three ways to pack tensors into files: pure functions of sizes.

A file's size includes its header, whose length depends on the digits of the offsets in it; a draft file
therefore counts its header as it grows.

Within a file, tensors keep the order of the source, so that a shard cut from one file is one contiguous
range. Only where dtypes of different width meet are the wide ones put first, as the reference writer does:
then every tensor starts at a multiple of its item size.
"""

from __future__ import annotations

import heapq
import re
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from shardkit.safetensors_file import DTYPE_BITS, entry_text, header_bytes, tensor_bytes
from shardkit.tensor import FLOAT_DTYPES, TensorInfo

_PADDING = 7  # the most that aligning a header to 8 bytes can add


class Item(NamedTuple):
    """A tensor to place: what it takes as data, and as a header entry without its offsets."""

    tensor: TensorInfo
    dtype: str
    nbytes: int
    chars: int
    width: int

    @classmethod
    def of(cls, tensor: TensorInfo, target: str | None) -> Item:
        """Measure a tensor, cast to `target` where it is floating-point."""
        dtype = target if target and tensor.dtype in FLOAT_DTYPES else tensor.dtype
        nbytes = tensor.nbytes if dtype == tensor.dtype else tensor_bytes(dtype, tensor.shape)
        chars = len(entry_text(tensor.name, dtype, tensor.shape, 0, 0).encode()) - 2
        return cls(tensor, dtype, nbytes, chars, max(1, DTYPE_BITS[dtype] // 8))


class _Draft:
    """A shard that is being filled, and the size that its file would have."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._data = self._chars = self._digits = 0
        self._widths: set[int] = set()

    def size_with(self, item: Item) -> int:
        """Size of the file with one more tensor: exact, or a few bytes above where order may change."""
        data, count = self._data + item.nbytes, len(self.items) + 1
        if self._widths <= {item.width}:
            offsets = self._digits + digits(self._data) + digits(data)
        else:
            offsets = 2 * digits(data) * count
        return header_bytes(self._chars + item.chars + offsets, count) + data

    def add(self, item: Item) -> None:
        self._digits += digits(self._data) + digits(self._data + item.nbytes)
        self._data += item.nbytes
        self._chars += item.chars
        self._widths.add(item.width)
        self.items.append(item)


def digits(number: int) -> int:
    """Return how many characters a number takes in JSON."""
    return len(str(number))


def layout(items: Sequence[Item]) -> tuple[list[tuple[Item, int]], int]:
    """Place items in one file: each with its first byte in the data section, and the header's size."""
    if len({item.width for item in items}) > 1:
        items = sorted(items, key=lambda item: -item.width)
    placed = []
    begin = chars = 0
    for item in items:
        placed.append((item, begin))
        chars += item.chars + digits(begin) + digits(begin + item.nbytes)
        begin += item.nbytes
    return placed, header_bytes(chars, len(items))


def pack_by_size(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Fill one file after the other, in order."""
    if (data := sum(item.nbytes for item in items)) <= limit and data + layout(items)[1] <= limit:
        return [list(items)]
    drafts = [_Draft()]
    for item in items:
        if drafts[-1].items and drafts[-1].size_with(item) > limit:
            drafts.append(_Draft())
        drafts[-1].add(item)
    return [draft.items for draft in drafts]


def pack_by_layer(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Write a file for each decoder block, embeddings and head apart; split those above the limit."""
    ordered = sorted(items, key=lambda item: _layer(item.tensor.name))
    groups = (list(group) for _, group in groupby(ordered, key=lambda item: _layer(item.tensor.name)))
    return [shard for group in groups for shard in pack_by_size(group, limit)] or [[]]


_BLOCK = re.compile(r"(?:(.*?)\.)??(\d+)\.")
_EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b|\bshared\b")


def _layer(name: str) -> tuple[int, str, int]:
    """Sort key of a tensor's layer: embeddings, then each block by its first number, then the head."""
    if block := _BLOCK.match(name):
        return 1, block[1] or "", int(block[2])
    return (0, "", 0) if _EMBEDDING.search(name) else (2, "", 0)


def pack_balanced(items: Sequence[Item], limit: int) -> list[list[Item]]:
    """Write the fewest files within the limit, as equal as can be."""
    if len(whole := pack_by_size(items, limit)) == 1:
        return whole
    capacity = limit - header_bytes(0, 0) - _PADDING

    def cost(item: Item) -> int:
        return item.nbytes + item.chars + 2 * digits(limit) + 1

    apart = [[item] for item in items if cost(item) > capacity]
    rest = sorted((item for item in items if cost(item) <= capacity), key=cost, reverse=True)
    fallback = _best_fit(rest, cost, capacity)
    fewest = -(-sum(map(cost, rest)) // capacity) if rest else 0
    spreads = (_spread(rest, cost, count) for count in range(fewest, len(fallback) + 1))
    fitting = (bins for bins in spreads if all(sum(map(cost, b)) <= capacity for b in bins))
    bins = apart + next(fitting, fallback)
    position = {item.tensor.name: place for place, item in enumerate(items)}
    for shard in bins:
        shard.sort(key=lambda item: position[item.tensor.name])
    return sorted(bins, key=lambda shard: position[shard[0].tensor.name])


def _best_fit(items: Iterable[Item], cost: Callable[[Item], int], capacity: int) -> list[list[Item]]:
    """Put each item into the fullest bin that still has room (best-fit, on items in decreasing order)."""
    room: list[tuple[int, int]] = []  # bytes left and number of the bin, ascending
    bins: list[list[Item]] = []
    for item in items:
        place = bisect_left(room, (cost(item), -1))
        if place == len(room):
            bins.append([])
            left, number = capacity, len(bins) - 1
        else:
            left, number = room.pop(place)
        bins[number].append(item)
        insort(room, (left - cost(item), number))
    return bins


def _spread(items: Iterable[Item], cost: Callable[[Item], int], count: int) -> list[list[Item]]:
    """Put each item into the emptiest of `count` bins (longest processing time first)."""
    bins: list[list[Item]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item in items:
        size, number = heapq.heappop(heap)
        bins[number].append(item)
        heapq.heappush(heap, (size + cost(item), number))
    return [shard for shard in bins if shard]
