"""A worker of a Dask cluster is killed in the middle: the job goes on without it, and loses nothing."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from shardkit.base.jobs import Progress
from shardkit.demo import make_demo_checkpoint
from shardkit.shard.engine import shard_checkpoint
from shardkit.shard.report import ShardReport
from tests.torture.bench import Fault, Finding, Kind, Place, Seen, beside, digests

WORKERS = 4
PLAN = {"max_shard_size": "4MB", "dtype": "float16"}


def _prepare(shared: Path) -> None:
    source = make_demo_checkpoint(shared / "source", size="60MB").source
    shard_checkpoint(source, shared / "expected", **PLAN)


def _killed(place: Place) -> Iterator[Finding]:
    """Shard and verify on four processes, one of which dies at a random moment of it."""
    from distributed import Client, LocalCluster

    quiet = {
        "dashboard_address": None,
        "silence_logs": logging.CRITICAL,
        "local_directory": place.work / "dask",
    }
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, processes=True, **quiet) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        victim = place.dice.choice(sorted(client.run(os.getpid).values()))
        stage, when, killed = place.dice.choice(["copy", "copy", "verify"]), place.dice.random(), []

        def kill(at: Progress) -> None:
            if not killed and at.stage == stage and at.done_bytes >= when * at.total_bytes:
                killed.append(at.done_bytes)
                os.kill(victim, signal.SIGKILL)

        report = shard_checkpoint(
            place.shared / "source", place.work / "out", **PLAN, executor=client.get_executor(), progress=kill
        )
        yield from _judged(place, report)
        yield Seen(f"killed during {stage}") if killed else Fault("no worker was killed")


def _judged(place: Place, report: ShardReport) -> Iterator[Finding]:
    if not (report.verification and report.verification.equal):
        yield Fault("not verified")
    if digests(place.work / "out") != digests(place.shared / "expected"):
        yield Fault("the destination is not what one process makes")
    if left := [name for name in beside(place.work / "out") if name != "dask"]:
        yield Fault(f"left {left} beside the destination")


KILLED = Kind("SIGKILL of a worker of a Dask cluster", _killed, 20, 1, _prepare, workers=1)
