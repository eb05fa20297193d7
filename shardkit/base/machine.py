"""What this machine has left: memory, limits in force, and what its file systems are."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TypeVar
from weakref import WeakSet

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

CGROUP_ROOT = "/sys/fs/cgroup"
OWN_CGROUP = "/proc/self/cgroup"
# cgroup v1 writes "no limit" as the largest page-aligned number.
_NO_LIMIT = 2**60
LIMIT_FILE = {False: "memory.limit_in_bytes", True: "memory.max"}
_USAGE_FILE = {False: "memory.usage_in_bytes", True: "memory.current"}
# Descendants included. Pages of tmpfs are file pages only by name: the kernel counts them elsewhere.
_DROPPABLE = {
    False: ("total_inactive_file", "total_active_file"),
    True: ("inactive_file", "active_file", "slab_reclaimable"),
}

# The kernel counts pages in batches: what is resident, and its peak, are not quite the same at any time.
_COUNTED_BYTES = 2 << 20
# NVIDIA's own answer takes up to seconds: it is asked for again after so many.
_GPU_TOOL = ("nvidia-smi", "--query-gpu=name,memory.free,compute_cap", "--format=csv,noheader,nounits")
_GPU_SECONDS = 10
# Those that run side by side in this process share the kernel's one peak.
_watches: WeakSet[Watch] = WeakSet()
_WATCHING = Lock()
# Where the pages of a file are memory that the kernel cannot drop.
MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")
# Where a page of a file is asked of another machine or process; fuseblk and overlays have a disk below them.
_ASKED_FILESYSTEMS = re.compile(
    r"fuse(\.(?!fuse-overlayfs).+)?|nfs4?|9p|cifs|smb[23s].*|ceph|lustre|gpfs|beegfs|afs|(mac|osx)fuse"
)


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes are free on the disk of a path; no end of them where the system does not say."""
    try:
        usage = shutil.disk_usage(path)
    except AttributeError:
        return sys.maxsize
    return usage.free if usage.total else sys.maxsize


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_bytes() -> int:
    """Return the memory of this process that cannot be evicted, in bytes."""
    if (counted := _kernel_counts("RssAnon", "RssShmem")) is not None:
        return counted
    import psutil

    return int(psutil.Process().memory_info().rss)


def usable_memory() -> int | None:
    """Return how many bytes the machine and its control group leave a load; None where neither tells."""
    return min((left for left in (_available(), left_in_force()) if left is not None), default=None)


def _available() -> int | None:
    import psutil

    with suppress(OSError, LookupError, ValueError):  # a container may lack /proc/meminfo
        return psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def limit_in_force() -> int | None:
    """Return the smallest memory limit of our control group and its ancestors, in bytes; None for none."""
    return min((limit for _, _, limit in _limited_groups()), default=None)


def left_in_force() -> int | None:
    """Return what those limits leave, file pages counted as free, which the kernel drops first."""
    left = []
    for group, is_v2, limit in _limited_groups():
        with suppress(OSError, ValueError):
            used = int((group / _USAGE_FILE[is_v2]).read_text())
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            droppable = sum(int(line[1]) for line in lines if line[0] in _DROPPABLE[is_v2])
            left.append(max(0, limit - used + droppable))
    return min(left, default=None)


def _limited_groups() -> Iterator[tuple[Path, bool, int]]:
    for group, is_v2 in control_groups():
        limit = _NO_LIMIT
        with suppress(OSError, ValueError):  # "max" is no number
            limit = int((group / LIMIT_FILE[is_v2]).read_text())
        if limit < _NO_LIMIT:
            yield group, is_v2, limit


def control_groups() -> Iterator[tuple[Path, bool]]:
    """Yield our own control group and its ancestors, and whether they are of version 2.

    A container may show only the root of its own tree: some of them may not be there.
    """
    with suppress(OSError):
        for line in Path(OWN_CGROUP).read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                is_v2 = controllers == ""
                base = Path(CGROUP_ROOT) if is_v2 else Path(CGROUP_ROOT, "memory")
                group = Path(name.lstrip("/"))
                above = (group, *group.parents)
                yield from ((base / path, is_v2) for path in above if ".." not in path.parts)


@dataclass(frozen=True)
class Gpus:
    """GPUs of one kind: how many, bytes of each (here, those left), and CUDA's compute capability."""

    count: int
    memory_bytes: int
    capability: float


def gpus() -> dict[str, Gpus]:
    """Return the NVIDIA GPUs of this machine by name, as its driver's tool shows them; empty for none."""
    return _gpus(time.monotonic() // _GPU_SECONDS)


@lru_cache(maxsize=1)
def _gpus(_: float) -> dict[str, Gpus]:
    found: dict[str, Gpus] = {}
    with suppress(OSError, ValueError, subprocess.SubprocessError):  # no driver, or one that is stuck
        said = subprocess.check_output(  # noqa: S603  the driver's own
            _GPU_TOOL, text=True, stderr=subprocess.DEVNULL, timeout=_GPU_SECONDS
        )
        for name, free, capability in (line.split(", ") for line in said.splitlines()):
            left, others = int(free) << 20, found.get(name)
            least, count = (min(left, others.memory_bytes), others.count) if others else (left, 0)
            found[name] = Gpus(count + 1, least, float(capability))
    return found


def filesystem(folder: str) -> str | None:
    """Return the type of the file system that holds `folder`: "ext4"; None where the system does not tell."""
    import psutil

    path, mounts = os.path.realpath(folder), []
    with suppress(OSError, RuntimeError, ValueError):  # a sandbox may hide what is mounted
        mounts = psutil.disk_partitions(all=True)
    holding = [mount for mount in mounts if os.path.commonpath([path, mount.mountpoint]) == mount.mountpoint]
    # Of two at the same place, the later hides the earlier.
    nearest = max(reversed(holding), key=lambda mount: len(mount.mountpoint), default=None)
    return nearest.fstype if nearest else None


def is_slow_to_map(folder: str) -> bool:
    """Whether `folder` is on a network or FUSE mount, where pages of a mapped file come one by one."""
    return _ASKED_FILESYSTEMS.fullmatch(filesystem(folder) or "") is not None


class Watch:
    """Time, and the kernel's own peak of this process' resident memory, since it was made.

    What ran in other processes adds its peaks: those since they were started, as `seen` reports them.
    """

    def __init__(self) -> None:
        self._start, self._here = time.perf_counter(), _who()
        self._helpers: dict[str, int | None] = {}
        with _WATCHING:
            self._earlier = _kernel_counts("VmHWM")
            for other in _watches:  # which the kernel is about to forget
                other._least = other._own_peak() or other._least
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
            self.before_bytes = _kernel_counts("VmRSS")
            peak = _kernel_counts("VmHWM")
            self._was_reset = bool(peak and self.before_bytes and peak - self.before_bytes < _COUNTED_BYTES)
            # The kernel counts in batches: its peak may fall short of what it said was resident at the start.
            self._least: int = self.before_bytes or 0
            _watches.add(self)

    @property
    def seconds(self) -> float:
        """How long ago it was made."""
        return time.perf_counter() - self._start

    def add(self, who: str, peak: int | None) -> None:
        """Take the peak of a process that did a part of the work."""
        if who != self._here:
            self._helpers[who] = peak

    @property
    def peak_bytes(self) -> int | None:
        """The peak, those of other processes added; None where the kernel does not say."""
        peaks = [self._own_peak(), *self._helpers.values()]
        return sum(filter(None, peaks)) if None not in peaks else None

    def _own_peak(self) -> int | None:
        own = _kernel_counts("VmHWM")
        if own == self._earlier and not self._was_reset:
            return None  # an earlier peak that could not be forgotten, and was not exceeded, hides this one
        return own and max(own, self._least)


def seen(function: Callable[[TaskT], ResultT], task: TaskT) -> tuple[ResultT, str, int | None]:
    """Carry out a task; return also which process did, and its peak so far."""
    return function(task), _who(), _kernel_counts("VmHWM")


def is_here(who: str) -> bool:
    """Whether a process, as `seen` reports it, is on this machine."""
    return who.rpartition(":")[0] == platform.node()


def _who() -> str:
    return f"{platform.node()}:{os.getpid()}"


def _kernel_counts(*names: str) -> int | None:
    """Return the sum of what `/proc/self/status` has under these names, in bytes; None without all."""
    with suppress(OSError, ValueError, LookupError):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in names)
    return None
