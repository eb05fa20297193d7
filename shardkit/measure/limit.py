"""A load under a memory limit: a control group (v1 or v2) of our own, where the system gives us one.

The limit counts what the kernel counts: anonymous memory, page tables, and file pages as long as they are
not dropped. A process that needs more is killed by the kernel, which says so in the group's own counters.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from shardkit.base import machine
from shardkit.base.errors import MeasurementError
from shardkit.base.machine import LIMIT_FILE, control_groups

_PROBE_BYTES = 64 << 20
_KILLS_FILES = ("memory.oom_control", "memory.events")

# The shell joins the group and becomes the command, so that all the command's memory counts.
_JOIN = 'echo 0 > "$0" && exec "$@"'
_SYSTEMD = ("systemd-run", "--user", "--scope", "--quiet", "--collect", "--property=MemorySwapMax=0")
_HOLD = "sed -n s/^0:://p /proc/self/cgroup; read _"


@dataclass(frozen=True)
class Limited:
    """A limit in force, by its group, and what joins that before a command; without a group, no limit."""

    group: Path | None = None
    join: tuple[str, ...] = ()

    def command(self, command: Sequence[str]) -> list[str]:
        """Return how to start a command under it."""
        return [*self.join, *command]

    def kills(self) -> int | None:
        """Return how many processes the kernel has killed for it; None where it does not say."""
        for file in [self.group / name for name in _KILLS_FILES] if self.group else ():
            with suppress(OSError):
                for line in file.read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
        return None


def limited(nbytes: int | None) -> AbstractContextManager[Limited]:
    """Return a limit of `nbytes` (None: no limit) for a block of code; refuse one that cannot be set."""
    if nbytes is None:
        return nullcontext(Limited())
    if why := why_unlimited():
        raise MeasurementError(f"no memory limit can be set here: {why}")
    return _in_force(nbytes)


@contextmanager
def _in_force(nbytes: int) -> Iterator[Limited]:
    """Give the limit in a group of our own, or in one of the user's systemd; OSError where there is none."""
    with ExitStack() as stack:
        # What joins systemd's group must be started by systemd: nobody else may cross over.
        start = () if (group := _make_group(nbytes)) else (*_SYSTEMD, "--")
        group = group or stack.enter_context(_scope(nbytes))
        stack.callback(_remove, group)
        yield Limited(group, (*start, "/bin/sh", "-c", _JOIN, str(group / "cgroup.procs")))


@contextmanager
def _scope(nbytes: int) -> Iterator[Path]:
    """Have the user's systemd make a group, which lasts as long as what holds it; that ends with us."""
    # What is delegated systemd does not end, with its counters, once the kernel has killed something in it.
    limits = ["--property=Delegate=yes", f"--property=MemoryMax={nbytes}"]
    command = [*_SYSTEMD, *limits, "--", "/bin/sh", "-c", _HOLD]
    piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **piped) as holder:  # noqa: S603
        group = Path(machine.CGROUP_ROOT, next(iter(holder.stdout or ()), "").strip().lstrip("/"))
        # systemd does not say when it cannot limit, as where the kernel was started without the controller.
        if abs(int((group / LIMIT_FILE[True]).read_text()) - nbytes) >= PAGESIZE:
            raise OSError("systemd has set another limit")
        yield group


@cache
def why_unlimited() -> str | None:
    """Return why memory cannot be limited here; None if it can. Found out by trying, once."""
    try:
        with _in_force(_PROBE_BYTES) as limit:
            subprocess.run(limit.command(["true"]), capture_output=True, timeout=20, check=True)  # noqa: S603
    except (OSError, ValueError, subprocess.SubprocessError):
        return (
            "control groups cannot be written (they can as root, in a container started with "
            "`--privileged --cgroupns=host`, or where systemd gives users theirs)"
        )
    return None


def _make_group(nbytes: int) -> Path | None:
    """Make a group with this limit and no swap, below our own or as near above as we may; None if nowhere."""
    for parent, is_v2 in control_groups():
        group = parent / f"shardkit-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            group.mkdir()
            _set_limit(group, nbytes, is_v2)
        except OSError:
            _remove(group)
        else:
            return group
    return None


def _remove(group: Path) -> None:
    """Remove a group of ours, and whatever may still run in it; what cannot be removed stays."""
    for _ in range(100):
        with suppress(OSError):
            for pid in map(int, (group / "cgroup.procs").read_text().split()):
                if pid > 0:  # 0 stands for a process that we cannot see; kill(0) would be our own end
                    os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            group.rmdir()
        if not group.exists():
            return
        time.sleep(0.01)  # until the kernel is through with the processes


def _set_limit(group: Path, nbytes: int, is_v2: bool) -> None:
    if is_v2:
        # A group's children have the memory controller only if it says so; with processes of its own it
        # may not.
        with suppress(OSError):
            (group.parent / "cgroup.subtree_control").write_text("+memory")
    with (group / LIMIT_FILE[is_v2]).open("r+") as file:  # which is there only where the controller is
        file.write(str(nbytes))
    swap, most = ("memory.swap.max", 0) if is_v2 else ("memory.memsw.limit_in_bytes", nbytes)
    with suppress(OSError):  # swap is not always accounted for
        (group / swap).write_text(str(most))
