"""What an executor of many workers gets out of them: two processes against one, 64 workers, a plan of 1.3 TB.

The two processes and the one cast the same model in turn, on a disk that is memory where there is one, so
that a slow disk hides nothing; the ratio is the median of the ratios by round. The 64 workers are threads
that wait, as for another machine. Of the plan, all is done but the copying. The last figures are those that
`cluster_table` computes with.

    python -m tests.benchmarks.bench_cluster --size 1GB --rounds 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest.mock import patch

from shardkit.base.jobs import run_all
from shardkit.demo import make_demo_checkpoint
from shardkit.formats.cast import Caster
from shardkit.plan.plan import plan_shards
from shardkit.shard import engine, folder_store, tasks
from shardkit.shard.report import ShardReport
from shardkit.shard.tasks import Outcome, shard_tasks
from shardkit.shard.verify import verify_checkpoint
from shardkit.sources.local import LocalFiles
from tests.benchmarks.bench_hub import SOURCE, hub
from tests.benchmarks.bench_shard import sparse_checkpoint
from tests.unasked import ask_no_models

MEMORY = Path("/dev/shm")
WIDE = 64
STREAM = """
import sys, time, shardkit
from concurrent.futures import ThreadPoolExecutor
source = shardkit.Checkpoint.open(sys.argv[1])
before = time.process_time()
with ThreadPoolExecutor(1) as one:
    report = shardkit.shard_on_hub(
        source, "me/target", max_shard_size="100MB", dtype="float16", executor=one,
        work_folder=sys.argv[2],
    )
print(time.process_time() - before)
"""
Figure = tuple[str, float, float, str]


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes that have imported what they need."""
    made = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    deque(made.map(time.sleep, [0.5] * workers), maxlen=0)
    deque(made.map(_import, range(workers)), maxlen=0)
    return made


def _import(_: int) -> str:
    return Caster.__name__


def sharded(source: Path, target: Path, executor: Executor, **options: object) -> ShardReport:
    shutil.rmtree(target, ignore_errors=True)
    return engine.shard_checkpoint(source, target, max_shard_size="100MB", executor=executor, **options)


def speed_up(scratch: Path, size: str, rounds: int) -> list[Figure]:
    """Two processes against one; and what one of them does in a second of its core."""
    source, target = scratch / "source", scratch / "target"
    total = make_demo_checkpoint(source, size=size, shards=2).total_bytes
    seconds: dict[str, list[float]] = {"one": [], "two": [], "cast": [], "verify": []}
    with pool(1) as one, pool(2) as two:
        for _ in range(rounds):
            before = one.submit(time.process_time).result()
            for name, executor in (("one", one), ("two", two)):
                report = sharded(source, target, executor, dtype="float16", verify=False)
                seconds[name].append(report.copy_seconds)
            cast = one.submit(time.process_time).result()
            verify_checkpoint(source, target, executor=one)
            seconds["cast"].append(cast - before)
            seconds["verify"].append(one.submit(time.process_time).result() - cast)
            print(f"  {' '.join(f'{k} {v[-1]:.2f} s' for k, v in seconds.items())}", file=sys.stderr)
    shutil.rmtree(target)
    ratio = median(a / b for a, b in zip(seconds["one"], seconds["two"], strict=True))
    rates = [(f"  {name}, a second of a core", total / median(seconds[name]) / 1e9, 0.0, "GB/s") for name in
             ("cast", "verify")]  # fmt: skip
    return [(f"cast {size}: two processes / one", ratio, 1.7, "x"), *rates]


def streamed(scratch: Path, size: str) -> list[Figure]:
    """What one worker gets from Hub to Hub in a second of its core."""
    model = scratch / "model"
    total = make_demo_checkpoint(model, size=size, shards=2).total_bytes
    with hub(scratch / "hub", model) as environment:
        command = [sys.executable, "-c", STREAM, SOURCE, str(scratch / "work")]
        said = subprocess.check_output(command, text=True, env=environment)
    return [("  Hub to Hub, a second of a core", total / float(said) / 1e9, 0.0, "GB/s")]


def busy() -> list[Figure]:
    """How much of their time 64 workers have something to do, with tasks as long as a copy of 16 MB."""
    tasks, seconds = 64 * 40, 0.1
    with ThreadPoolExecutor(WIDE) as executor:
        begun = time.perf_counter()
        with run_all(lambda _: time.sleep(seconds), range(tasks), executor=executor) as results:
            deque(results, maxlen=0)
    share = tasks * seconds / WIDE / (time.perf_counter() - begun)
    return [("64 workers: share of their time with a task", share, 0.9, "")]


def handed_out(scratch: Path) -> list[Figure]:
    """Tasks a second of a plan of 1.3 TB in 100,000 tensors, with workers that are done at once."""
    source = scratch / "sparse"
    source.mkdir()
    sparse_checkpoint(source, files=200, tensors=100_000, nbytes=13 * 10**11)
    plan = plan_shards(source)
    many = sum(len(shard_tasks(shard, LocalFiles(source), "")) for shard in plan.shards)
    with (
        ThreadPoolExecutor(WIDE) as executor,
        patch.object(tasks, "_LARGEST_TASK", 0),  # as many as one machine would make of it
        patch.object(engine, "run_task", lambda _: Outcome()),
        patch.object(folder_store, "free_bytes", lambda _: sys.maxsize),
    ):
        report = engine.shard_checkpoint(plan, scratch / "made", executor=executor, verify=False)
    return [(f"1.3 TB: tasks handed out, of {many:,}", many / report.copy_seconds, 1000, "/s")]


def by_dask(rounds: int = 2000) -> list[Figure]:
    """Tasks that Dask's scheduler and its client, in one process, do in a second of its core."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        begun = time.process_time()
        with run_all(abs, range(rounds), WIDE, client.get_executor()) as results:
            deque(results, maxlen=0)
    return [("  by Dask, a second of a core", rounds / (time.process_time() - begun), 0, "/s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--rounds", type=int, default=5)
    usual = MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
    parser.add_argument("--folder", default=usual, help="where to work (default: memory, where it is a disk)")
    options = parser.parse_args()
    ask_no_models()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as scratch:
        figures = speed_up(Path(scratch), options.size, options.rounds)
        figures += streamed(Path(scratch), options.size)
    with tempfile.TemporaryDirectory(prefix="shardkit-bench-") as scratch:
        figures += busy() + handed_out(Path(scratch)) + by_dask()
    print(f"{'promise':<58} {'seen':>12} {'at least':>12}")
    for name, seen, limit, unit in figures:
        verdict = "held" if seen >= limit else "NOT HELD"
        print(f"{name:<58} {f'{seen:,.3g} {unit}':>12} {f'{limit:,.3g} {unit}':>12}  {verdict}")
    sys.exit(any(seen < limit for _, seen, limit, _ in figures))


if __name__ == "__main__":
    main()
