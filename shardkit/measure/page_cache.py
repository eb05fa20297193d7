"""Which pages of the weight files are in memory before a load: brought about, then proven by `mincore`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from shardkit.base import pages
from shardkit.base.sizes import format_size

# Read-ahead around a page that somebody else touches must not spoil a proof.
_TOLERANCE = 0.01
# A file system that compresses reads less than it shows: only what goes well beyond was read by others.
_UNREAD_SHARE = 0.25
# What a load may read besides its weights, such as libraries.
_OTHER_READS = 64_000_000


@dataclass(frozen=True)
class CacheState:
    """What of the weight files was in the page cache before and after a load; None where that is unknown.

    It is `proven` where they were seen to be `asked`, "cold" or "warm", just before the process started, and
    nothing seen since speaks against it.
    """

    asked: str
    proven: bool
    why_not: str
    total_bytes: int
    resident_bytes_before: int | None
    resident_bytes_after: int | None

    def __str__(self) -> str:
        return f"{self.asked}, {'' if self.proven else 'not '}proven"


def prepare(files: Iterable[str], asked: str) -> CacheState:
    """Evict the files ("cold") or read them ("warm"), and see whether that worked; then comes `conclude`."""
    files = list(files)
    why_not = ""
    if asked == "cold":
        pages.drop(files)
    else:
        for file in files:
            with suppress(OSError), open(file, "rb") as source, open(os.devnull, "wb") as nowhere:
                shutil.copyfileobj(source, nowhere, 2**20)
    total = sum(os.stat(file).st_size for file in files)
    resident = pages.resident_bytes(files)
    if resident is None:
        why_not = "this system does not report reliably which pages of files are in memory"
    elif abs(resident - (0 if asked == "cold" else total)) > _TOLERANCE * total:
        why_not = f"{resident / max(total, 1):.0%} was in memory before the load"
    return CacheState(asked, not why_not, why_not, total, resident, None)


def conclude(state: CacheState, files: Iterable[str], read_bytes: int | None) -> CacheState:
    """Add what is resident after the load, and whether the load's own `read_bytes` explain it.

    They cannot where somebody else read the files between the proof and the load. None: unknown, or read
    ahead on purpose.
    """
    resident = pages.resident_bytes(files)
    state = replace(state, resident_bytes_after=resident)
    if resident is None and state.proven:
        return doubt(state, "the files could not be checked again after the load")
    if state.asked == "cold" and resident is not None and read_bytes is not None:
        unread = resident - read_bytes
        if unread > _UNREAD_SHARE * state.total_bytes:
            share = f"{unread / state.total_bytes:.0%}"
            return doubt(state, f"{share} came into memory without the load reading it (kernel's count)")
    if state.asked == "warm" and (read_bytes or 0) > max(_OTHER_READS, _UNREAD_SHARE * state.total_bytes):
        return doubt(state, f"{format_size(read_bytes or 0)} still came from the disk")
    return state


def doubt(state: CacheState, why_not: str) -> CacheState:
    """Return the state as not proven; a reason that it already has stays."""
    return replace(state, proven=False, why_not=state.why_not or why_not)
