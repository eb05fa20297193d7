"""The machine and the stack that a figure belongs to."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shardkit.base.machine import cores, filesystem, limit_in_force
from shardkit.base.record import plural
from shardkit.base.sizes import format_size


@dataclass(frozen=True)
class Environment:
    """Machine and software under which a load was measured; None where the system does not report it.

    The cores are those that the process may use, the file system is that of the weights, the threads are
    torch's, the versions those of the process that loaded.
    """

    platform: str
    cpu: str
    cores: int
    ram_bytes: int | None
    memory_limit_bytes: int | None
    filesystem: str | None
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    gpu: str | None = None

    def __str__(self) -> str:
        ram = f"{format_size(self.ram_bytes)} RAM" if self.ram_bytes else None
        words = [self.cpu, plural(self.cores, "core"), ram, self.gpu]
        words += [f"limit {format_size(self.memory_limit_bytes)}"] if self.memory_limit_bytes else []
        return ", ".join([*filter(None, words), self.filesystem or "unknown file system"])


def describe_machine(folder: str, limit: int | None, **stack: Any) -> Environment:
    """Return the environment of a load from `folder` under `limit`, with what its process reported."""
    import psutil

    return Environment(
        platform=platform.platform(),
        cpu=_cpu_model(),
        cores=cores(),
        ram_bytes=psutil.virtual_memory().total,
        memory_limit_bytes=min(filter(None, (limit, limit_in_force())), default=None),
        filesystem=filesystem(folder),
        **stack,
    )


def _cpu_model() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
