"""Whether a load fits this machine, or a free host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardkit.base.sizes import format_size

# What the free hosts say they give (November 2026); the process that watches the load needs some as well.
HOSTS = {"Colab": 12_700_000_000, "Kaggle": 30_000_000_000, "Binder": 2_000_000_000}
_USABLE_SHARE = 0.9
HERE = "this machine"

Verdict = Literal["fits", "fits tightly", "does not fit"]


@dataclass(frozen=True)
class HostFit:
    """Whether a load fits a host: its name, its memory in bytes, the verdict and the reason for it.

    Of this machine, the memory is what was left when the estimate was made.
    """

    name: str
    memory_bytes: int
    verdict: Verdict
    why: str


def fit(name: str, memory: int, anonymous: int, mapped: int) -> HostFit:
    """Return whether a load fits a host: all of it, or only if its mapped pages come and go."""
    usable = int(_USABLE_SHARE * memory)
    if anonymous > usable:
        need = f"needs {format_size(anonymous)}, about {format_size(usable)} available"
        return HostFit(name, memory, "does not fit", need)
    if anonymous + mapped > usable:
        why = "not all weights stay in memory: each token reads from disk again"
        return HostFit(name, memory, "fits tightly", why)
    return HostFit(name, memory, "fits", "all weights stay in memory")
