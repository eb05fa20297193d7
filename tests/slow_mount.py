"""A folder behind a slow network, as a FUSE mount whose server is a process of its own and logs each read.

A request waits for the other side (`delay`, in seconds), several of them at once; then its bytes come at a
`rate` in bytes a second: that of each request, or of one line that all share. Mounted as FUSE does by
default: what the page cache has of a file is dropped when it is opened.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Request(NamedTuple):
    """One read: of which file, and how much."""

    name: str
    nbytes: int


class SlowMount(NamedTuple):
    """Where the folder is mounted, and what was read of it."""

    folder: Path
    log: Path

    def take_requests(self) -> list[Request]:
        """Return the reads of weights since this was last asked."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        self.log.write_text("")
        return [Request(name, int(nbytes)) for name, nbytes in lines if name.endswith(".safetensors")]


def why_no_fuse() -> str | None:
    """Why nothing can be mounted here; None if it can."""
    if not os.path.exists("/dev/fuse"):
        return "this machine has no /dev/fuse"
    missing = "mfusepy" if find_spec("mfusepy") is None else "fusermount3"
    return f"{missing} is not installed" if missing == "mfusepy" or not shutil.which(missing) else None


@contextmanager
def slow_mount(
    source: Path, scratch: Path, rate: float = 1e12, delay: float = 0.0, line: str = "shared"
) -> Iterator[SlowMount]:
    """Mount a folder, read-only, as long as this lasts."""
    mount = SlowMount(scratch / "mount", scratch / "reads")
    mount.folder.mkdir(parents=True)
    mount.log.touch()
    words = map(str, (source, mount.folder, mount.log, rate, delay, line))
    with (
        (scratch / "server").open("wb") as said,
        subprocess.Popen([sys.executable, __file__, *words], stdout=said, stderr=said) as server,
    ):
        try:
            end = time.monotonic() + 30
            while not os.path.ismount(mount.folder):
                assert server.poll() is None, (scratch / "server").read_text()
                assert time.monotonic() < end, (scratch / "server").read_text()
                time.sleep(0.05)
            yield mount
        finally:
            # At once, whoever still maps a file of it: an unmount that waits would wait for this process.
            subprocess.run(["fusermount3", "-u", "-z", mount.folder], check=False)
            server.terminate()


def serve(source: str, mountpoint: str, log: str, rate: float, delay: float, line: str) -> None:
    import mfusepy

    class Server(mfusepy.Operations):
        use_ns = True

        def __init__(self) -> None:
            self.reads = os.open(log, os.O_WRONLY | os.O_APPEND)
            self.lock, self.free_at = threading.Lock(), 0.0

        def getattr(self, path: str, _: int | None = None) -> dict[str, Any]:
            try:
                found = os.stat(source + path)
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno) from None
            names = ("mode", "size", "uid", "gid", "nlink")
            return {f"st_{n}": getattr(found, f"st_{n}") for n in names} | {"st_mtime": found.st_mtime_ns}

        def readdir(self, path: str, _: int) -> list[str]:
            return [".", "..", *os.listdir(source + path)]

        def open(self, path: str, _: int) -> int:
            return os.open(source + path, os.O_RDONLY)

        def release(self, _: str, fh: int) -> int:
            os.close(fh)
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            data = os.pread(fh, size, offset)
            with self.lock:
                begin = max(time.monotonic() + delay, self.free_at if line == "shared" else 0.0)
                self.free_at = end = begin + len(data) / rate
            os.write(self.reads, f"{path} {len(data)}\n".encode())
            time.sleep(max(0.0, end - time.monotonic()))
            return data

    mfusepy.FUSE(Server(), mountpoint, foreground=True, fsname="slow", ro=True)


if __name__ == "__main__":
    serve(*sys.argv[1:4], float(sys.argv[4]), float(sys.argv[5]), sys.argv[6])
