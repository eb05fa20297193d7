"""Whether a load fits this machine, or a free host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from shardkit.base.sizes import format_size
from shardkit.checkpoint.bounded import BoundedEstimate

# What the free hosts say they give (November 2026); the process that watches the load needs some as well.
HOSTS = {"Colab": 12_700_000_000, "Kaggle": 30_000_000_000, "Binder": 2_000_000_000}
_USABLE_SHARE = 0.9
HERE = "this machine"


@dataclass(frozen=True)
class HostFit:
    """Whether a load fits a host, and what would help.

    Attributes
    ----------
    name, memory_bytes
        The host, and its memory; of this machine, what was left when the estimate was made.
    verdict, why
        "fits"; "fits, each token reads 14.2 GB from disk again"; "does not fit"; and the reason for it.
    read_bytes
        What each token reads from disk again: 0 where all weights stay, None where the load does not fit.
    bounded_read_bytes
        The same for a load within a budget of all memory that is usable there; None where there is none, or
        its figures are not known.
    advice
        What would help; empty where nothing has to, or is known to.
    """

    name: str
    memory_bytes: int
    verdict: str
    why: str
    read_bytes: int | None = 0
    bounded_read_bytes: int | None = None
    advice: str = ""


class Need(NamedTuple):
    """Memory of a plain load, beside files and for pages of them; and what of those each token uses."""

    anonymous_bytes: int
    mapped_bytes: int
    token_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory in which all of it stays."""
        return self.anonymous_bytes + self.mapped_bytes


@dataclass(frozen=True)
class Ways:
    """Other ways to load a model: from shards in the dtype requested, where that differs; within a budget."""

    dtype: str | None = None
    shards: Need | None = None
    within: Callable[[int], BoundedEstimate] | None = None


def fit(name: str, memory: int, need: Need, ways: Ways = Ways()) -> HostFit:
    """Return whether a load fits a host, what each token then reads from disk again, and what would help."""
    usable = int(_USABLE_SHARE * memory)
    if need.total_bytes <= usable:
        return HostFit(name, memory, "fits", "all weights stay in memory")
    if need.anonymous_bytes > usable:
        why = f"needs {format_size(need.anonymous_bytes)}, about {format_size(usable)} available"
        found = HostFit(name, memory, "does not fit", why, None)
    else:
        again = f"fits, each token reads {format_size(need.token_bytes)} from disk again"
        why = f"{format_size(need.total_bytes)} in use, about {format_size(usable)} stay in memory"
        found = HostFit(name, memory, again, why, need.token_bytes)
    bounded = ways.within(usable) if ways.within else None
    read = bounded.plan.streamed_bytes if bounded and bounded.plan else None
    return replace(found, bounded_read_bytes=read, advice="; ".join(_advice(usable, need, ways, bounded)))


def _advice(usable: int, need: Need, ways: Ways, bounded: BoundedEstimate | None) -> Iterator[str]:
    if ways.shards and need.anonymous_bytes > usable >= ways.shards.anonymous_bytes:
        stays = ways.shards.total_bytes <= usable
        again = "" if stays else f", each token reads {format_size(ways.shards.token_bytes)}"
        yield f"shards in {ways.dtype} need {format_size(ways.shards.anonymous_bytes)}{again}"
        if stays:
            return
    if bounded and bounded.plan:
        read = format_size(bounded.plan.streamed_bytes)
        words = f"each token reads {read}" if bounded.plan.streamed_bytes else "all weights stay in memory"
        yield f"load_model(max_memory=...) with {format_size(usable)}: {words} ({bounded.work.tokens})"
    elif bounded and bounded.smallest_bytes:
        yield f"load_model(max_memory=...) needs at least {format_size(bounded.smallest_bytes)}"
