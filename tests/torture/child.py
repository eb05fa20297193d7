"""One run of `shard_checkpoint` in a process of its own, told to die or to fail at a chosen system call.

``python -m tests.torture.child SPEC`` prints ``ready``, waits for a line on stdin where ``wait`` says so, and
prints how it ended, in JSON.
"""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shardkit.formats.cast  # noqa: F401  before ctypes is wrapped: numpy uses it
from shardkit.base.errors import ShardkitError
from shardkit.shard.engine import shard_checkpoint
from tests.unasked import ask_no_models

ROOT = Path(__file__).parents[2]
CALLS = ("rename", "unlink", "rmdir", "mkdir", "fsync", "truncate", "pwrite", "copy_file_range", "sendfile")

Spec = dict[str, Any]  # source, destination, options; kill, fail, no_exchange, wait
Ending = dict[str, Any]  # error (None where it was done), message, reused, seconds, calls


def perform(spec: Spec) -> Ending:
    """Shard as `spec` says, and tell how it ended."""
    try:
        report = shard_checkpoint(spec["source"], spec["destination"], **spec["options"])
    except ShardkitError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "reused": len(report.reused)}


def start(*command: str, **options: Any) -> "subprocess.Popen[str]":
    """Start Python on something that says ``ready`` once it has imported all it needs; wait for that."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *command], **pipes, text=True, cwd=ROOT, **options)
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise AssertionError(f"it did not start: {process.communicate()[1]}")
    return process


def start_child(spec: Spec) -> "subprocess.Popen[str]":
    """Start a run."""
    return start("-m", __name__, json.dumps(spec))


def end(process: "subprocess.Popen[str]") -> Ending:
    """Return how a run ended, once it has."""
    output, errors = process.communicate(timeout=120)
    if output.strip():
        return json.loads(output)
    status = process.returncode
    return {"error": "killed" if status == -signal.SIGKILL else errors.strip() or f"exit status {status}"}


def _watch(spec: Spec, counts: Counter[str]) -> None:
    """Count the calls that change a disk; die at one of them, or let some fail from a number on."""
    lock = threading.Lock()
    fail = {name: (first, getattr(errno, code)) for name, first, code in spec.get("fail", [])}

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with lock:
                counts[name] += 1
                number = counts[name]
            if spec.get("kill") == [name, number, "before"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if name in fail and number >= fail[name][0]:
                raise OSError(fail[name][1], os.strerror(fail[name][1]))
            result = real(*arguments, **options)
            if spec.get("kill") == [name, number, "after"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    real_library = ctypes.CDLL

    class Library:
        def __init__(self, *_: object, **options: Any) -> None:
            if not spec.get("no_exchange"):
                self.renameat2 = wrapped("renameat2", real_library(None, **options).renameat2)

    ctypes.CDLL = Library  # type: ignore[misc, assignment]
    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def main() -> None:
    """Do what the command line says."""
    spec, counts = json.loads(sys.argv[1]), Counter()
    ask_no_models()
    _watch(spec, counts)
    print("ready", flush=True)
    if spec.get("wait"):
        sys.stdin.readline()
    begun = time.perf_counter()
    ending = perform(spec)
    print(json.dumps(ending | {"seconds": time.perf_counter() - begun, "calls": counts}))


if __name__ == "__main__":
    main()
