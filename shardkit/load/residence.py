"""Which weights stay in memory, and which are read again for every token: pure, no I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardkit.base.errors import ShardkitError
from shardkit.base.sizes import format_size

# Memory to read ahead into, by the largest unit that is streamed: that one, and the beginning of the next.
_AHEAD_SHARE = 5 / 4
# Reading anything smaller than this share of the largest costs more time than its memory is worth.
_SMALL_SHARE = 1 / 64


class UnitSize(NamedTuple):
    """What a unit, the weights of one module, takes.

    Attributes
    ----------
    resident
        Bytes in memory where it stays there.
    read
        Bytes to read for it.
    converted
        Bytes beside those while it is used, if what is read is cast or rearranged.
    must_stay
        Whether it cannot be streamed.
    """

    resident: int
    read: int
    converted: int = 0
    must_stay: bool = False


@dataclass(frozen=True)
class Residence:
    """Which units stay in memory.

    Attributes
    ----------
    stays
        For each unit, in order of execution, whether it does.
    resident_bytes
        Memory of those that stay.
    buffer_bytes
        Memory that the others are read into.
    working_bytes
        Memory beside the resident units: `buffer_bytes`, and what is converted at a time.
    """

    stays: tuple[bool, ...]
    resident_bytes: int
    buffer_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory for all of it."""
        return self.resident_bytes + self.working_bytes


def choose_residence(units: Sequence[UnitSize], budget: int) -> Residence:
    """Choose what stays: as many bytes as `budget` allows, spread evenly over the order of execution.

    What is read ahead takes as much memory as the largest unit that is streamed, and more, so that keeping
    the largest units may leave room for more.

    Raises
    ------
    ShardkitError
        If the budget is too small; `smallest_budget` is one that is not.
    """
    found = [_fill(units, limit, budget) for limit in _limits(units)]
    fitting = [plan for plan in found if plan.total_bytes <= budget]
    if not fitting:
        needed = format_size(smallest_budget(units))
        raise ShardkitError(f"{format_size(budget)} are left for weights, but streaming needs {needed}")
    return max(fitting, key=lambda plan: plan.resident_bytes)


def smallest_budget(units: Sequence[UnitSize]) -> int:
    """Return the smallest budget that `choose_residence` takes, in bytes."""
    return min(_fill(units, limit, 0).total_bytes for limit in _limits(units))


def _limits(units: Sequence[UnitSize]) -> list[int]:
    """Return the sizes that the largest streamed unit may have, 0 among them."""
    return [0, *sorted({unit.read for unit in units})]


def _fill(units: Sequence[UnitSize], limit: int, budget: int) -> Residence:
    small = _SMALL_SHARE * max((unit.read for unit in units), default=0)
    may_leave = [place for place, u in enumerate(units) if small < u.read <= limit and not u.must_stay]
    leaving = [units[place] for place in may_leave]
    largest = max((unit.read for unit in leaving), default=0)
    buffer = math.ceil(largest * _AHEAD_SHARE) if len(leaving) > 1 else largest
    # While a unit that stays is converted, what was read for it exists beside it; buffers do not yet.
    loading = max((u.read + u.converted for u in units if u.converted), default=0)
    converted = max((unit.converted for unit in leaving), default=0)
    working = max(buffer + converted, loading)
    stays = [True] * len(units)
    for place in may_leave:
        stays[place] = False
    resident = sum(unit.resident for unit, stay in zip(units, stays, strict=True) if stay)
    for place in [*_evenly(units, may_leave, budget - working - resident)]:
        stays[place] = True
        resident += units[place].resident
    # What is left is too little for any unit: more can be read ahead.
    buffer += max(0, min(budget - working - resident, largest))
    return Residence(tuple(stays), resident, buffer, max(buffer + converted, loading))


def _evenly(units: Sequence[UnitSize], places: Sequence[int], room: int) -> Iterator[int]:
    """Yield which of some units stay: of each size the same share, then what still fits, largest first."""
    alike: dict[int, list[int]] = {}
    for place in sorted(places, key=lambda place: (-units[place].resident, place)):
        alike.setdefault(units[place].resident, []).append(place)
    share = max(0, room) / max(1, sum(size * len(group) for size, group in alike.items()))
    counts = {size: min(len(group), int(share * len(group))) for size, group in alike.items()}
    room -= sum(size * count for size, count in counts.items())
    for size, group in alike.items():
        more = min(len(group) - counts[size], max(0, room) // max(1, size))
        room -= more * size
        count = counts[size] + more
        yield from (group[number * len(group) // count] for number in range(count))
