"""The table of docs/cluster.md, computed from what one worker was measured to do.

python -m tests.benchmarks.cluster_table
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from shardkit.base.jobs import Crew
from shardkit.shard.tasks import task_bytes

# Bytes that one worker deals with in a second of its core, and tasks that Dask's scheduler does, as
# `python -m tests.benchmarks.bench_cluster` measured them on 2 cores.
CAST, VERIFY, STREAM, TASKS = 1.1e9, 1.22e9, 0.265e9, 580
LINE, DOLLARS = 5e9, 0.05  # bytes a second of a disk or line that all share; for an hour of a core
SHARD = 2e9  # bytes of a file, from Hub to Hub the work of one worker
MODELS = {"7B": 14.5e9, "70B": 141e9, "700B": 1400e9}  # bytes in 16 bits
WORKERS = (1, 8, 64)


def seconds(nbytes: float, workers: int, *, by_hub: bool) -> float:
    """How long a job takes: from Hub to Hub, a worker does a file at a time; else all share a scheduler."""
    if by_hub:
        rounds = math.ceil(math.ceil(nbytes / SHARD) / workers)
        return rounds * min(SHARD, nbytes) / STREAM
    with ThreadPoolExecutor(1) as executor:
        crew = Crew(workers, executor)
        tasks = sum(total / task_bytes(int(total), crew) for total in (nbytes, 2 * nbytes))
    return max(nbytes / workers * (1 / CAST + 1 / VERIFY), tasks / TASKS)


def shown(value: float) -> str:
    """A time as a person reads it."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def size(nbytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 1e12:.1f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.3g} GB"


def row(model: str, nbytes: float, workers: int, *, by_hub: bool) -> str:
    """One line of the table."""
    # Received and sent; or read and written, and both sides read again.
    wire, disk = (2 * nbytes, f"{size(SHARD)} each") if by_hub else (4 * nbytes, size(nbytes))
    time = seconds(nbytes, workers, by_hub=by_hub)
    slowed = max(time, wire / LINE)
    cost = workers * slowed / 3600 * DOLLARS
    way = "Hub to Hub" if by_hub else "folder to folder"
    cells = (model, way, workers, shown(time), shown(slowed), disk, size(wire), f"{cost:.2g}")
    return f"| {' | '.join(map(str, cells))} |"


def table() -> str:
    """The table, in Markdown."""
    head = "| model | way | workers | time | at 5 GB/s | disk | wire | cost, $ |\n|---|---|" + "--:|" * 6
    rows = (
        row(model, nbytes, workers, by_hub=by_hub)
        for model, nbytes in MODELS.items()
        for by_hub in (False, True)
        for workers in WORKERS
    )
    return "\n".join((head, *rows))


if __name__ == "__main__":
    print(table())
