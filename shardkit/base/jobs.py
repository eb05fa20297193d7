"""Carrying out many small tasks: a few at a time, counting bytes, stopping when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Generic
from uuid import uuid4

from shardkit.base.errors import Cancelled, Interrupted, ShardkitError
from shardkit.base.machine import ResultT, TaskT, cores

_AHEAD = 2  # tasks under way for each worker: enough to keep it busy, few enough to stop soon
_STOP_SECONDS = 0.2
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
    """Who does the work of a job (so many threads of ours, or the caller's executor), and who hears of it.

    `elsewhere` are the processes on other machines that have read what is to be proven.
    """

    workers: int
    executor: Executor | None = None
    progress: ProgressCallback | None = None
    elsewhere: set[str] = field(default_factory=set, compare=False)


def worker_count(workers: int | None, executor: Executor | None = None) -> int:
    """Return how many tasks are carried out at once.

    None means as many as the executor has workers, whichever machines they are on. Threads of our own are
    four, which keep a disk busy, or fewer where there are fewer cores.
    """
    if workers is not None and workers > 0:
        return workers
    usual = min(4, cores()) if executor is None else _width(executor)
    if workers is not None:
        raise ShardkitError(f"workers is {workers}, but must be at least 1 (default: {usual})")
    return usual


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
    """Say of an interrupt what is kept, as its notes have it, or `otherwise`.

    One that interrupts how an earlier one is dealt with comes without notes: what is kept is not known then.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            otherwise = "run again to resume, if anything was finished"
        kept = "; ".join(getattr(error, "__notes__", ())) or otherwise
        raise Interrupted(f"stopped; {kept}") from error


@dataclass(frozen=True, slots=True)
class _Call(Generic[TaskT, ResultT]):
    """A task on its way to a worker, no two of which are equal.

    An executor that remembers the result of an equal call may not carry it out: a digest that is remembered
    proves nothing, and a write that is remembered writes nothing.
    """

    function: Callable[[TaskT], ResultT]
    task: TaskT
    number: str = field(default_factory=lambda: uuid4().hex)

    def __call__(self) -> ResultT:
        return self.function(self.task)

    def __dask_tokenize__(self) -> str:
        return self.number  # which spares Dask to hash the task

    def __str__(self) -> str:
        return "shardkit"  # what Dask's own pages call it


def _explained(error: Exception) -> Exception:
    """Return, in a line, what became of a task that an executor did not carry out; other errors as they are.

    Dask's own are known by name: it may not be installed.
    """
    kind, resume = type(error).__name__, "run again to resume"
    if isinstance(error, CancelledError) or kind == "ClosedClientError":
        return ShardkitError(
            f"the executor dropped a task: its scheduler is gone, or it was shut down; {resume}"
        )
    if kind == "KilledWorker":
        return ShardkitError(
            "the executor gave up a task, because several workers died while they had it (out of memory? see "
            f"their logs); {resume}"
        )
    return error


def _result(future: Future[ResultT]) -> ResultT:
    try:
        return future.result()
    except Exception as error:
        if (explained := _explained(error)) is error:
            raise
        raise explained from error


def _next(ended: SimpleQueue[Future[ResultT]], stop: Event | None) -> Future[ResultT]:
    """Wait for a task to end; in vain where no worker of an executor is left, unless it is stopped."""
    while True:
        with suppress(Empty):
            return ended.get(timeout=_STOP_SECONDS if stop else None)
        if stop and stop.is_set():
            raise Cancelled("stopped")


@contextmanager
def run_all(
    function: Callable[[TaskT], ResultT],
    tasks: Iterable[TaskT],
    workers: int | None = None,
    executor: Executor | None = None,
    stop: Event | None = None,
) -> Iterator[Iterator[tuple[TaskT, ResultT]]]:
    """Give an iterator of tasks with their results, as they finish; it raises `Cancelled` once `stop` is set.

    Leaving the block cancels what has not begun and waits for what has: nothing runs on behind it, unless an
    executor cannot wait for a task that it cancels, as Dask's.
    """
    count = worker_count(workers, executor)
    pool = executor or ThreadPoolExecutor(count, thread_name_prefix="shardkit")
    running: dict[Future[ResultT], TaskT] = {}
    waiting, ended = iter(tasks), SimpleQueue[Future[ResultT]]()

    def results() -> Iterator[tuple[TaskT, ResultT]]:
        failure: Exception | None = None
        while True:
            try:
                for task in islice(waiting, 0 if failure else count * _AHEAD - len(running)):
                    future = pool.submit(_Call(function, task))
                    running[future] = task
                    future.add_done_callback(ended.put)
            except Exception as error:  # of a task that could not be made, or a broken executor
                failure = _explained(error)
            if not running:
                if failure:
                    raise failure
                return
            done = [_next(ended, stop), *(ended.get() for _ in range(ended.qsize()))]
            # A failure comes last, or what ended along with it would be lost.
            for future in sorted(done, key=lambda future: future.cancelled() or bool(future.exception())):
                yield running.pop(future), _result(future)

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
            if self._callback and self._callback(Progress(self._stage, self._done, self._total)) is False:
                raise Cancelled(f"stopped after {self._done} of {self._total} bytes ({self._stage})")
