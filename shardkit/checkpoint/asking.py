"""Ask transformers about a model, in a process of its own: the one place that starts it.

Neither torch nor transformers, 300 MB of them, comes into the process that asks, and whatever a stranger's
config makes of a model ends with the process that was asked.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

_SCRIPT = Path(__file__).parents[1] / "load" / "look.py"
_SECONDS = 120.0
_MEMORY_BYTES = 3_000_000_000  # of the process, beside files that it maps: some 600 MB are usual
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@contextmanager
def asked() -> Iterator[Callable[..., Callable[[], dict[str, Any]]]]:
    """Start a process, which imports transformers, and give a function that hands it a job.

    That returns a function that waits for the answer. The process may map `mapped_bytes` of files beside the
    memory that it is allowed. Jobs and answers are those of `shardkit.load.look`.
    """
    # A notebook may have found transformers by a path that it added.
    environment = {**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, filter(None, sys.path)))}
    started = subprocess.Popen(  # noqa: S603  our own script
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )

    def ask(job: dict[str, Any], mapped_bytes: int = 0) -> Callable[[], dict[str, Any]]:
        limited = {**job, "memory_bytes": _MEMORY_BYTES + mapped_bytes}
        future = thread.submit(_hand_over, process, json.dumps(limited).encode())

        def answer() -> dict[str, Any]:
            try:
                found: dict[str, Any] = json.loads(future.result(_SECONDS))
            except TimeoutError:
                return {"why": f"transformers gave no answer within {_SECONDS:.0f} s"}
            except ValueError:
                return {"why": f"the process that asks transformers ended with status {process.wait()}"}
            return found

        return answer

    with started as process, ThreadPoolExecutor(1, thread_name_prefix="shardkit-asking") as thread:
        try:
            yield ask
        finally:
            if process.poll() is None:
                process.kill()  # which ends the thread's waiting, too


def _hand_over(process: subprocess.Popen[bytes], job: bytes) -> bytes:
    """Return the answer to a job. The pipe stays open: its end tells the process that nobody waits for it."""
    jobs, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    with suppress(OSError), open(jobs.fileno(), "wb", closefd=False) as pipe:
        pipe.write(job + b"\n")
    answer = answers.read()
    process.wait()
    return answer


def asked_here(job: dict[str, Any]) -> dict[str, Any]:
    """Answer a job in this process, where transformers is imported already: it takes no seconds to start."""
    found: dict[str, Any] = runpy.run_path(str(_SCRIPT))["answer"](job)
    return found
