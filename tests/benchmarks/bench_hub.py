"""Hub to Hub against the least that it has to do: a download and an upload of as much, side by side.

All talk to one Hub on this machine, a process of its own. Download and upload are the Hub's own client,
started together, each in a process; what they take is when the later one ends. Rounds go through both in
turn, the ratio is the median of the ratios by round. Disk and memory are watched while ours runs.

    python -m tests.benchmarks.bench_hub --size 2GB --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from shardkit.base.sizes import format_size, parse_size
from shardkit.demo import make_demo_checkpoint
from shardkit.shard.engine import shard_checkpoint
from tests.support import disk_watched

ROOT = Path(__file__).parents[2]
SOURCE, WORKERS = "org/model", 4

# Prints the process's own peak at the end: VmHWM, in KiB.
PEAK = "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
RESHARD = f"""
import shardkit, sys
repo, limit, folder = sys.argv[1:]
shardkit.shard_on_hub("{SOURCE}", repo, max_shard_size=int(limit), workers={WORKERS}, work_folder=folder)
{PEAK}
"""
DOWNLOAD = f"""
import huggingface_hub, sys
huggingface_hub.snapshot_download("{SOURCE}", max_workers={WORKERS})
"""
UPLOAD = """
import huggingface_hub, sys
huggingface_hub.create_repo(sys.argv[1], private=True)
huggingface_hub.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
"""


@contextmanager
def hub(folder: Path, model: Path) -> Iterator[dict[str, str]]:
    """Run a Hub with a model; give the environment of its clients."""
    command = [sys.executable, "-m", "tests.loopback_hub", folder, "--model", f"{SOURCE}={model}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        yield {**os.environ, **json.loads(process.stdout.readline()), "PYTHONPATH": str(ROOT)}
        process.stdin.close()  # which ends it


def start(code: str, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    quiet = {**environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, env=quiet, stdout=subprocess.PIPE, text=True)


def timed(*processes: subprocess.Popen[str]) -> float:
    """Wait for processes that were just started; return how long the last one took."""
    begun = time.perf_counter()
    for process in processes:
        process.wait()
        if process.returncode:
            raise SystemExit(f"a process failed: status {process.returncode}")
    return time.perf_counter() - begun


def measure(scratch: Path, size: str, rounds: int) -> list[tuple[str, float, float, str]]:
    model, shards, work = scratch / "model", scratch / "shards", scratch / "work"
    make_demo_checkpoint(model, size=size, shards=WORKERS)
    limit = parse_size(size) // 16
    largest = max(shard_checkpoint(model, shards, max_shard_size=limit, verify=False).files.values())
    work.mkdir()
    ratios, peaks, disks = [], [], []
    with hub(scratch / "hub", model) as environment:
        for number in range(rounds):
            home = scratch / "home"
            apart = timed(
                start(DOWNLOAD, environment | {"HF_HOME": str(home)}),
                start(UPLOAD, environment, f"me/upload-{number}", shards),
            )
            shutil.rmtree(home)
            with disk_watched(work) as most:
                process = start(RESHARD, environment, f"me/reshard-{number}", limit, work)
                ours = timed(process)
            peaks.append(int(process.stdout.read()) * 1024)
            disks.append(most[0])
            ratios.append(apart / ours)
            print(f"  side by side {apart:6.2f} s   hub to hub {ours:6.2f} s", file=sys.stderr, flush=True)
    return [
        (f"hub to hub, {size}: throughput / download and upload", median(ratios), 0.7, "x"),
        (f"  most on disk, of {format_size(parse_size(size))}", max(disks), (WORKERS + 1) * largest, "B"),
        ("  peak memory", max(peaks), 100 * 10**6, "B"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="2GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work: a disk with five times the size free")
    parser.add_argument("--output", help="write the figures here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as scratch:
        figures = measure(Path(scratch), options.size, options.rounds)
    print(f"{'promise':<58} {'seen':>10} {'limit':>10}")
    all_held = True
    for name, seen, limit, unit in figures:
        shown = [format_size(x) if unit == "B" else f"{x:.3g} {unit}" for x in (seen, limit)]
        is_held = seen >= limit if unit == "x" else seen <= limit
        all_held &= is_held
        words = "held" if is_held else "NOT HELD"
        print(f"{name:<58} {shown[0]:>10} {shown[1]:>10}  {words}")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2))
    sys.exit(not all_held)


if __name__ == "__main__":
    main()
