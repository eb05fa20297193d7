"""The three ways to pack tensors into files: pure functions of sizes.

A file's size includes its header, whose length depends on the digits of the offsets in it; a draft file
therefore counts its header as it grows.

`empty` is what a header takes before its first entry, in bytes.

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
_SEARCHED_ITEMS, _SEARCH_STEPS, _COUNTS_TRIED = 40, 5_000, 8


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

    def __init__(self, empty: int) -> None:
        self.items: list[Item] = []
        self._empty = empty
        self._data = self._chars = self._digits = 0
        self._widths: set[int] = set()

    def size_with(self, item: Item) -> int:
        """Size of the file with one more tensor: exact, or a few bytes above where order may change."""
        data, count = self._data + item.nbytes, len(self.items) + 1
        if self._widths <= {item.width}:
            offsets = self._digits + digits(self._data) + digits(data)
        else:
            offsets = 2 * digits(data) * count
        return header_bytes(self._empty, self._chars + item.chars + offsets, count) + data

    def add(self, item: Item) -> None:
        self._digits += digits(self._data) + digits(self._data + item.nbytes)
        self._data += item.nbytes
        self._chars += item.chars
        self._widths.add(item.width)
        self.items.append(item)


def digits(number: int) -> int:
    """Return how many characters a number takes in JSON."""
    return len(str(number))


def layout(items: Sequence[Item], empty: int) -> tuple[list[tuple[Item, int]], int]:
    """Place items in one file: each with its first byte in the data section, and the header's size."""
    if len({item.width for item in items}) > 1:
        items = sorted(items, key=lambda item: -item.width)
    placed = []
    begin = chars = 0
    for item in items:
        placed.append((item, begin))
        chars += item.chars + digits(begin) + digits(begin + item.nbytes)
        begin += item.nbytes
    return placed, header_bytes(empty, chars, len(items))


def pack_by_size(items: Sequence[Item], limit: int, empty: int) -> list[list[Item]]:
    """Fill one file after the other, in order."""
    if (data := sum(item.nbytes for item in items)) <= limit and data + layout(items, empty)[1] <= limit:
        return [list(items)]
    drafts = [_Draft(empty)]
    for item in items:
        if drafts[-1].items and drafts[-1].size_with(item) > limit:
            drafts.append(_Draft(empty))
        drafts[-1].add(item)
    return [draft.items for draft in drafts]


def pack_by_layer(items: Sequence[Item], limit: int, empty: int) -> list[list[Item]]:
    """Write a file for each decoder block, embeddings and head apart; split those above the limit."""
    ordered = sorted(items, key=lambda item: _layer(item.tensor.name))
    groups = (list(group) for _, group in groupby(ordered, key=lambda item: _layer(item.tensor.name)))
    return [shard for group in groups for shard in pack_by_size(group, limit, empty)] or [[]]


_BLOCK = re.compile(r"(?:(.*?)\.)??(\d+)\.")
_EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b|\bshared\b")


def _layer(name: str) -> tuple[int, str, int, str]:
    """Sort key of a tensor's layer: embeddings, then each block by its first number, then the head."""
    if block := _BLOCK.match(name):
        return 1, block[1] or "", len(block[2]), block[2]  # sorts as numbers do, of any length
    return (0, "", 0, "") if _EMBEDDING.search(name) else (2, "", 0, "")


def pack_balanced(items: Sequence[Item], limit: int, empty: int) -> list[list[Item]]:
    """Write the fewest files within the limit, as equal as can be.

    The fewest are sought by best-fit decreasing, and for few tensors by trying what there is to try.
    """
    in_order = pack_by_size(items, limit, empty)
    if len(in_order) == 1:
        return in_order
    position = {item.tensor.name: place for place, item in enumerate(items)}

    def file_bytes(bin_: Iterable[Item]) -> int:
        ordered = sorted(bin_, key=lambda item: position[item.tensor.name])
        return sum(item.nbytes for item in ordered) + layout(ordered, empty)[1]

    apart = {item.tensor.name: [item] for item in items if file_bytes([item]) > limit}
    rest = sorted((i for i in items if i.tensor.name not in apart), key=lambda item: -item.nbytes)
    in_order = [bin_ for bin_ in in_order if bin_[0].tensor.name not in apart]
    found = min(_best_fit(rest, limit, empty), in_order, key=len)
    fewest = max(1, -(-sum(item.nbytes for item in rest) // limit))
    for count in [*range(fewest, len(found))[:_COUNTS_TRIED], len(found)]:
        spread = _spread(rest, count)
        if all(file_bytes(bin_) <= limit for bin_ in spread):
            found = spread
            break
        if count < len(found) and (packed := _search(rest, count, limit, file_bytes)):
            found = packed
            break
    bins = [
        sorted(bin_, key=lambda item: position[item.tensor.name])
        for bin_ in [*apart.values(), *found]
        if bin_
    ]
    return sorted(bins, key=lambda bin_: position[bin_[0].tensor.name])


def _best_fit(items: Iterable[Item], limit: int, empty: int) -> list[list[Item]]:
    """Put each item into the fullest bin that still has room (best-fit, on items in decreasing order)."""
    capacity = limit - header_bytes(empty, 0, 0) - _PADDING
    room: list[tuple[int, int]] = []  # bytes left and number of the bin, ascending
    bins: list[list[Item]] = []
    for item in items:
        cost = item.nbytes + item.chars + 2 * digits(limit) + 1  # at most
        place = bisect_left(room, (cost, -1))
        if place == len(room):
            bins.append([])
            left, number = capacity, len(bins) - 1
        else:
            left, number = room.pop(place)
        bins[number].append(item)
        insort(room, (left - cost, number))
    return bins


def _spread(items: Iterable[Item], count: int) -> list[list[Item]]:
    """Put each item into the emptiest of `count` bins (longest processing time first)."""
    bins: list[list[Item]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item in items:
        size, number = heapq.heappop(heap)
        bins[number].append(item)
        heapq.heappush(heap, (size + item.nbytes + item.chars, number))
    return [bin_ for bin_ in bins if bin_]


def _search(
    items: Sequence[Item], count: int, limit: int, file_bytes: Callable[[Iterable[Item]], int]
) -> list[list[Item]] | None:
    """Try to put the items into `count` bins in every way, as long as that takes few steps."""
    if len(items) > _SEARCHED_ITEMS:
        return None
    bins: list[list[Item]] = [[] for _ in range(count)]
    steps = iter(range(_SEARCH_STEPS))

    def place(number: int) -> bool:
        if number == len(items):
            return True
        for bin_ in bins:
            if next(steps, None) is None:
                return False
            if file_bytes([*bin_, items[number]]) <= limit:
                bin_.append(items[number])
                if place(number + 1):
                    return True
                bin_.pop()
            if not bin_:
                return False  # one empty bin is as good as the next
        return False

    return bins if place(0) else None
