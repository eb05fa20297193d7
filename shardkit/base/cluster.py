"""Executors by their address: a cluster that is running, for a command that is given its name."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from shardkit.base.errors import ShardkitError
from shardkit.base.extras import require

DASK = "dask://"
_SECONDS = 10


def check_address(text: str) -> str:
    """Return the address of an executor; raise ShardkitError if it is none."""
    if not re.fullmatch(rf"{DASK}[^/\s]+:\d+", text):
        raise ShardkitError(f"{text!r} is not {DASK}HOST:PORT, as in {DASK}localhost:8786")
    return text


def is_cancelled() -> bool:
    """Whether nobody waits any more for the task that runs here; Dask cannot stop one, but knows."""
    if (workers := sys.modules.get("distributed.worker")) is None:
        return False
    try:
        worker = workers.get_worker()
        return str(worker.state.tasks[worker.get_current_task()].state) == "cancelled"
    except (ValueError, KeyError):  # it is no task of Dask's, or forgotten
        return False


@contextmanager
def executor_at(address: str | None) -> Iterator[Executor | None]:
    """Give the executor of an address, ``dask://HOST:PORT`` for Dask's scheduler there; None for none.

    A ShardkitError if nobody answers there within ten seconds, a MissingPackageError without Dask.
    """
    if address is None:
        yield None
        return
    require("cluster", f"the executor {address}", "distributed")
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what ends a job is said once, by its error
    try:
        client = Client(f"tcp://{address.removeprefix(DASK)}", timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ShardkitError(
            f"{address}: no Dask scheduler answers there within {_SECONDS} s: check host and port, and that "
            "this machine may reach it"
        ) from error
    try:
        yield client.get_executor(pure=False)
    finally:
        client.close(timeout=_SECONDS)
