"""``python -m tests.windows inspect FOLDER``: the command line, with what Windows lacks and refuses.

After ``--unasked``, transformers is not asked what a model gets (see ``unasked``).

What it does not play: names (``\\``, case, ``:``), and locks that keep others from reading.
"""

import ctypes
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import filelock

LACKING = {
    os: (
        "chown", "copy_file_range", "fchmod", "fork", "getegid", "geteuid", "getgid", "getloadavg", "getpgid",
        "getsid", "getuid", "killpg", "lchown", "mkfifo", "mknod", "nice", "posix_fadvise", "posix_fallocate",
        "posix_spawn", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "sched_setaffinity",
        "sendfile", "setpgid", "setsid", "splice", "statvfs", "fstatvfs", "sync", "sysconf", "uname", "wait4",
        "waitid", "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC",
    ),
    signal: ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGSTOP", "SIGUSR1", "pthread_sigmask"),
}  # fmt: skip
ABSENT = ("fcntl", "grp", "posix", "pwd", "resource", "termios")
O_BINARY = 1 << 28
_read_only: set[int] = set()
_text: set[int] = set()  # opened so that each LF is written as CR LF


def opened() -> list[str]:
    """Paths that this process has open, or mapped."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # that of the list itself
            continue
    return found


def refuse_open(call: Callable[..., Any]) -> Callable[..., Any]:
    """What is open, or holds what is, is neither renamed nor removed."""

    def refusing(path: Any, *others: Any, **options: Any) -> Any:
        real = os.path.realpath(path) if isinstance(path, (str, os.PathLike)) else None
        if real and any(name == real or name.startswith(f"{real}/") for name in opened()):
            raise PermissionError(errno.EACCES, "it is being used by another process", str(path))
        return call(path, *others, **options)

    return refusing


def rename(source: Any, target: Any, *, real: Callable[..., None] = os.rename) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))
    real(source, target)


def open_file(path: Any, flags: int, *rest: Any, real: Callable[..., int] = os.open, **options: Any) -> int:
    if (
        os.path.isdir(path) and sys._getframe(1).f_code.co_filename != shutil.__file__
    ):  # which has no such way there
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    handle = real(path, flags & ~O_BINARY, *rest, **options)
    (_read_only.discard if flags & (os.O_WRONLY | os.O_RDWR) else _read_only.add)(handle)
    (_text.discard if flags & O_BINARY else _text.add)(handle)
    return handle


def write(handle: int, data: Any, *, real: Callable[[int, Any], int] = os.write) -> int:
    if handle not in _text:
        return real(handle, data)
    real(handle, bytes(data).replace(b"\n", b"\r\n"))
    return len(data)


def fsync(file: Any, *, real: Callable[[Any], None] = os.fsync) -> None:
    if (file if isinstance(file, int) else file.fileno()) in _read_only:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real(file)


class Lock(filelock.BaseFileLock):
    """A lock as Windows has it: its file is removed when it is released, by whoever holds it."""

    def _acquire(self) -> None:
        with suppress(FileExistsError):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | O_BINARY
            self._context.lock_file_fd = os.open(self.lock_file, flags)

    def _release(self) -> None:
        handle, self._context.lock_file_fd = self._context.lock_file_fd, None
        os.close(handle)
        os.unlink(self.lock_file)


class Stat:
    """What is known of a file: of its blocks, nothing."""

    def __init__(self, known: os.stat_result) -> None:
        self._known = known

    def __getattr__(self, name: str) -> Any:
        if name in ("st_blocks", "st_blksize", "st_rdev"):
            raise AttributeError(name)
        return getattr(self._known, name)

    def __getitem__(self, place: int) -> Any:
        return self._known[place]


def library(name: object, *rest: Any, real: Any = ctypes.CDLL, **options: Any) -> Any:
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return real(name, *rest, **options)


def play() -> None:
    """Take away what is lacking; what has been imported by then is another's affair."""
    # Libraries that know Windows, and would not get through the play.
    import subprocess  # noqa: F401
    import tempfile  # noqa: F401

    import numpy as np  # noqa: F401
    import psutil  # noqa: F401

    filelock.FileLock = Lock
    free = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: free  # type: ignore[assignment]  its own way to ask is lacking here
    for module, names in LACKING.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.modules.update(dict.fromkeys(ABSENT))  # type: ignore[arg-type]
    os.O_BINARY = O_BINARY  # type: ignore[attr-defined]
    os.open, os.write, os.fsync, ctypes.CDLL = open_file, write, fsync, library  # type: ignore[assignment, misc]
    os.rename = refuse_open(rename)
    os.replace, os.unlink, os.remove, os.rmdir = map(
        refuse_open, (os.replace, os.unlink, os.remove, os.rmdir)
    )
    look, look_at = os.stat, os.fstat
    os.stat = lambda *where, **how: Stat(look(*where, **how))  # type: ignore[assignment]
    os.fstat = lambda handle: Stat(look_at(handle))  # type: ignore[assignment]


if __name__ == "__main__":
    play()
    if sys.argv[1] == "--unasked":
        from tests.unasked import ask_no_models

        del sys.argv[1]
        ask_no_models()
    from shardkit.__main__ import main

    main()
