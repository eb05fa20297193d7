"""Carrying out many small tasks: a few at a time, counting bytes, stopping when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import TypeVar

from shardkit.base.errors import Cancelled, Interrupted, ShardkitError
from shardkit.base.machine import cores

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

_AHEAD = 2  # tasks under way for each worker: enough to keep it busy, few enough to stop soon
_WIDTH_UNKNOWN = 64  # for an executor that does not say: idle machines cost more than a longer queue


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands: what it is doing ("check", "copy", "verify"), bytes done, bytes in all."""

    stage: str
    done_bytes: int
    total_bytes: int


# Returning False asks the job to stop; None and True let it go on.
ProgressCallback = Callable[[Progress], bool | None]


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does the work of a job (so many threads of ours, or the caller's executor), and who hears of it."""

    workers: int
    executor: Executor | None = None
    progress: ProgressCallback | None = None


def worker_count(workers: int | None, executor: Executor | None = None) -> int:
    """Return how many tasks are carried out at once.

    None means as many as the executor has workers, whichever machines they are on. Threads of our own are
    four, which keep a disk busy, or fewer where there are fewer cores.
    """
    usual = min(4, cores()) if executor is None else _width(executor)
    if workers is not None and workers < 1:
        raise ShardkitError(f"workers is {workers}, but must be at least 1 (default: {usual})")
    return workers or usual


def _width(executor: Executor) -> int:
    """Return how many workers an executor has: a pool of Python, joblib or MPI, or a cluster of Dask."""
    for name in ("_max_workers", "max_workers", "num_workers"):
        if isinstance(width := getattr(executor, name, None), int) and width > 0:
            return width
    ncores = getattr(getattr(executor, "_client", executor), "ncores", None)
    threads = ncores() if callable(ncores) else None
    return (sum(threads.values()) if isinstance(threads, Mapping) else 0) or _WIDTH_UNKNOWN


@contextmanager
def resumable(otherwise: str = "nothing was finished, so nothing is kept") -> Iterator[None]:
    """Say of an interrupt what is kept, as its notes have it, or `otherwise`."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "; ".join(getattr(error, "__notes__", ())) or otherwise
        raise Interrupted(f"stopped; {kept}") from error


@contextmanager
def run_all(
    function: Callable[[TaskT], ResultT],
    tasks: Iterable[TaskT],
    workers: int | None = None,
    executor: Executor | None = None,
) -> Iterator[Iterator[tuple[TaskT, ResultT]]]:
    """Give an iterator of tasks with their results, as they finish.

    Leaving the block cancels what has not begun and waits for what has: nothing runs on behind it.
    """
    count = worker_count(workers, executor)
    pool = executor or ThreadPoolExecutor(count, thread_name_prefix="shardkit")
    running: dict[Future[ResultT], TaskT] = {}
    waiting = iter(tasks)

    def results() -> Iterator[tuple[TaskT, ResultT]]:
        failure: Exception | None = None
        while True:
            try:
                for task in islice(waiting, 0 if failure else count * _AHEAD - len(running)):
                    running[pool.submit(function, task)] = task
            except Exception as error:  # of a task that could not be made, or a broken executor
                failure = error
            if not running:
                if failure:
                    raise failure
                return
            done = wait(running, return_when=FIRST_COMPLETED).done
            # A failure comes last, or what ended along with it would be lost.
            for future in sorted(done, key=lambda future: future.cancelled() or bool(future.exception())):
                yield running.pop(future), future.result()

    try:
        yield results()
    finally:
        for future in running:
            future.cancel()
        wait(running)
        if pool is not executor:
            pool.shutdown()


class ProgressCount:
    """Adds up bytes, from any thread, and reports them; raises `Cancelled` when the callback says stop."""

    def __init__(self, callback: ProgressCallback | None, stage: str, total_bytes: int) -> None:
        self._callback, self._stage, self._total = callback, stage, total_bytes
        self._done = 0
        self._lock = Lock()
        self.add(0)

    def add(self, nbytes: int) -> None:
        """Count bytes as done."""
        with self._lock:
            self._done += nbytes
            if self._callback is None:
                return
            if self._callback(Progress(self._stage, self._done, self._total)) is False:
                raise Cancelled(f"stopped after {self._done} of {self._total} bytes ({self._stage})")
