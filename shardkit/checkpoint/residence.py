"""Which weights stay in memory, and which are read again for every token: pure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

# Memory to read ahead into, by the largest unit that is streamed: that one, and the beginning of the next.
_AHEAD_SHARE = 5 / 4
# Reading anything smaller than this share of the largest costs more time than its memory is worth.
_SMALL_SHARE = 1 / 64


class Residence(NamedTuple):
    """Whether each unit stays, in order of execution; bytes of those; bytes to read the others into."""

    stays: tuple[bool, ...]
    resident_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory for all of it."""
        return self.resident_bytes + self.buffer_bytes


def choose_residence(sizes: Sequence[int], budget: int, must_stay: Container[int] = ()) -> Residence | None:
    """Choose what stays: as many bytes as `budget` allows, spread evenly over the order of execution.

    What is read ahead takes as much memory as the largest unit that is streamed, and more, so that keeping
    the largest units may leave room for more. `sizes` are bytes of the units in order of execution,
    `must_stay` places of those that cannot be streamed; None if `budget` is less than `smallest_budget`.
    """
    found = [_fill(sizes, limit, budget, must_stay) for limit in (0, *sorted({*sizes}))]
    fitting = (plan for plan in found if plan.total_bytes <= budget)
    return max(fitting, key=lambda plan: plan.resident_bytes, default=None)


def smallest_budget(sizes: Sequence[int], must_stay: Container[int] = ()) -> int:
    """Return the smallest budget that `choose_residence` takes, in bytes."""
    return min(_fill(sizes, limit, 0, must_stay).total_bytes for limit in (0, *sorted({*sizes})))


def _fill(sizes: Sequence[int], limit: int, budget: int, must_stay: Container[int]) -> Residence:
    """Stream no unit above a limit, nor a small one, and as few others as the budget allows."""
    small = _SMALL_SHARE * max(sizes, default=0)
    may_leave = [n for n, size in enumerate(sizes) if small < size <= limit and n not in must_stay]
    largest = max((sizes[place] for place in may_leave), default=0)
    buffer = math.ceil(largest * _AHEAD_SHARE) if len(may_leave) > 1 else largest
    resident = sum(sizes) - sum(sizes[place] for place in may_leave)
    staying = {*_evenly(sizes, may_leave, budget - buffer - resident)}
    resident += sum(sizes[place] for place in staying)
    # What is left is too little for any unit: more can be read ahead.
    buffer += max(0, min(budget - buffer - resident, largest))
    leaving = {*may_leave} - staying
    return Residence(tuple(place not in leaving for place in range(len(sizes))), resident, buffer)


def _evenly(sizes: Sequence[int], places: Sequence[int], room: int) -> Iterator[int]:
    """Yield which of some units stay: of each size the same share, then what still fits, largest first."""
    alike: dict[int, list[int]] = {}
    for place in sorted(places, key=lambda place: (-sizes[place], place)):
        alike.setdefault(sizes[place], []).append(place)
    share = max(0, room) / max(1, sum(size * len(group) for size, group in alike.items()))
    counts = {size: min(len(group), int(share * len(group))) for size, group in alike.items()}
    room -= sum(size * count for size, count in counts.items())
    for size, group in alike.items():
        more = min(len(group) - counts[size], max(0, room) // max(1, size))
        room -= more * size
        count = counts[size] + more
        yield from (group[number * len(group) // count] for number in range(count))
