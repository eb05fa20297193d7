"""What the three ways to load a checkpoint need, where they fit, and what follows from it in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from shardkit.app import page
from shardkit.base.record import Summary
from shardkit.base.sizes import format_size
from shardkit.checkpoint.estimate import Estimate
from shardkit.checkpoint.fits import tables
from shardkit.checkpoint.hosts import HostFit
from shardkit.plan.plan import ShardPlan

_CLEARLY = 0.95
_WHERE = {"float16": ", as on a T4"}


@dataclass(frozen=True)
class Loads:
    """Estimates of a load of the original in its own dtype and in the requested one, and of the shards."""

    stored: Estimate
    requested: Estimate
    shards: Estimate
    plan: ShardPlan
    original_bytes: int

    @property
    def advice(self) -> str:
        """What to do, in a sentence or two."""
        stored, shards = self.stored, self.shards
        if (hosts := (*stored.hosts, *shards.hosts)) and all(host.read_bytes is None for host in hosts):
            return (
                f"Too large for the memory here and on the free hosts, sharded or not: {stored.needed}. "
                "What would help is below; otherwise take a smaller or a quantized model."
            )
        dtype, must = shards.dtype, f"{shards.dtype}{_WHERE.get(str(shards.dtype), '')}"
        if shards.peak_anonymous_bytes < _CLEARLY * stored.peak_anonymous_bytes:
            return (
                f"Write these shards: loading them needs {shards.needed}, the original {stored.needed} "
                f"{_in(stored)}, as stored."
            )
        enough = (
            f"Loaded {_in(stored)}, as stored, the original needs {stored.needed} already: for memory you "
            "need no shards."
        )
        if (smaller := self.plan.total_bytes) < _CLEARLY * self.original_bytes:
            disk = f"{format_size(smaller)} on disk instead of {format_size(self.original_bytes)}"
            return (
                f"{enough} Write {dtype} if its precision is enough: {disk}, and that much less to read for "
                f"each token. Converting the original in each load needs {self.requested.needed}."
            )
        if self.requested.peak_anonymous_bytes * _CLEARLY <= shards.peak_anonymous_bytes:
            return f"{enough} They help to copy, upload and download: smaller files, nothing else."
        return (
            f"{enough} Write {dtype} only where you must run in {must}: there the original needs "
            f"{self.requested.needed} of RAM, these shards {shards.needed}."
        )

    def html(self) -> str:
        """Return the advice and, below it, a table of what each way needs and where it fits."""
        ways = (self.stored, self.requested, self.shards)
        columns = (
            f"original as stored, {_in(self.stored)}",
            f"original {_in(self.requested)}, as the shards",
            f"these shards, {_in(self.shards)}",
        )
        disk = (self.original_bytes, self.original_bytes, self.plan.total_bytes)
        rows = [
            ("memory to load", "cannot be evicted", [f"<b>{way.needed}</b>" for way in ways]),
            ("mapped from files", "can be evicted", [format_size(w.mapped_bytes) for w in ways]),
            ("weights on disk", "", [format_size(size) for size in disk]),
        ]
        for fits in zip_longest(*(way.hosts for way in ways)):
            known = next(filter(None, fits))
            rows.append((known.name, format_size(known.memory_bytes), [_fit(one) for one in fits]))
        notes = dict.fromkeys(note for way in ways for note in way.notes)
        warnings = "".join(map(page.warning, notes))
        return page.advice(self.advice) + page.ways(columns, rows) + self._elsewhere() + warnings

    def _elsewhere(self) -> str:
        """Return, folded, whether the model fits on GPUs, and its files on disks; empty if not known."""
        title = f"The original and shards {_in(self.requested)}"
        found = Summary(title, tables=tuple(tables((), self.requested.gpus, self.requested.disks)))
        return page.details("On GPUs and disks", found.html(), name="disks") if found.tables else ""


def _in(way: Estimate) -> str:
    return f"in {way.dtype or 'their dtypes'}"


def _fit(host: HostFit | None) -> str:
    if host is None:
        return page.verdict("", "not known", "")
    kind = "fits" if host.verdict == "fits" else "tight" if host.verdict.startswith("fits") else "not"
    helps = "" if kind == "fits" else "; ".join(filter(None, (host.why, host.advice)))
    return page.verdict(kind, host.verdict, helps)
