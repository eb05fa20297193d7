"""Sharding against its peers, in one run, as ratios: a parallel `cp`, and transformers' own route.

That is what articles do: load the model, save it in shards. Its wall time and peak stand beside ours.

Every run is a process of its own, timed as a whole from outside, on a source that was read just before
(warm page cache). Rounds go through copies in turn, then through loads, so that a machine whose speed drifts
slows them alike; each ratio is the median of the ratios by round. What is compared ends in the same state:
the files are on the disk (`sync`), not only in memory.

    python -m tests.benchmarks.bench_shard --size 4GB --rounds 3
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo import make_demo_checkpoint
from shardkit.formats.safetensors import PREFIX_BYTES
from tests.support import sparse_file

WORKERS = 4
CAST = "shardkit to float16"

# Prints the process's own peak at the end: VmHWM, in KiB.
PEAK = "print([l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')][0])"
SHARD = f"""
import shardkit, sys
shardkit.shard_checkpoint(sys.argv[1], sys.argv[2], max_shard_size="500MB", dtype=sys.argv[3] or None,
                          verify=sys.argv[4] == "verify")
assert sys.argv[3] or "torch" not in sys.modules
{PEAK}
"""
TRANSFORMERS = f"""
import subprocess, sys, torch, transformers
dtype = getattr(torch, sys.argv[3]) if sys.argv[3] else "auto"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
model.save_pretrained(sys.argv[2], max_shard_size="500MB")
subprocess.run("sync " + sys.argv[2] + "/*", shell=True, check=True)
{PEAK}
"""
PLAN = f"""
import shardkit, sys
plan = shardkit.plan_shards(shardkit.Checkpoint.open(sys.argv[1]), max_shard_size="5GB")
assert len(plan.shards) >= 200, len(plan.shards)
print(plan)
{PEAK}
"""


class Run:
    """One timed process: wall seconds, and the last number it printed."""

    def __init__(self, command: list[str]) -> None:
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        self.seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
        words = done.stdout.split()
        self.peak_bytes = int(words[-1]) * 1024 if words else 0


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


def parallel_cp(source: Path, target: Path) -> list[str]:
    copy = (
        f"mkdir '{target}' && cd '{source}' && printf '%s\\0' *.safetensors "
        f"| xargs -0 -n 1 -P {WORKERS} cp -t '{target}' && sync '{target}'/*"
    )
    return ["sh", "-c", copy]


def timed(make: Callable[[Path], list[str]], source: Path, scratch: Path) -> Run:
    target = scratch / "target"
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    subprocess.run(["sh", "-c", f"cat '{source}'/*.safetensors > /dev/null"], check=True)
    return Run(make(target))


def rounds_of(source: Path, scratch: Path, rounds: int) -> dict[str, list[Run]]:
    copies: dict[str, Callable[[Path], list[str]]] = {
        "cp": lambda target: parallel_cp(source, target),
        "shardkit": lambda target: python(SHARD, source, target, "", "copy"),
        CAST: lambda target: python(SHARD, source, target, "float16", "copy"),
        "shardkit, verified": lambda target: python(SHARD, source, target, "", "verify"),
    }
    # Last: they free gigabytes, and where a machine takes these back, whoever comes next pays for them.
    loads: dict[str, Callable[[Path], list[str]]] = {
        "transformers": lambda target: python(TRANSFORMERS, source, target, ""),
        "transformers to float16": lambda target: python(TRANSFORMERS, source, target, "float16"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in copies | loads}
    for contenders in (copies, loads):
        for _ in range(rounds):
            for name, make in contenders.items():
                runs[name].append(timed(make, source, scratch))
                print(f"  {name:<24} {runs[name][-1].seconds:6.2f} s", file=sys.stderr, flush=True)
    return runs


def sparse_checkpoint(folder: Path, files: int, tensors: int, nbytes: int) -> None:
    """A checkpoint of 1 TB that takes no disk: headers, then holes."""
    weight_map, elements = {}, nbytes // tensors // 2
    for file in range(files):
        name = f"model-{file + 1:05d}-of-{files:05d}.safetensors"
        names = [f"model.layers.{file}.experts.{n}.weight" for n in range(tensors // files)]
        size = sparse_file(folder / name, dict.fromkeys(names, (elements,)))
        assert size - 2 * elements * len(names) > PREFIX_BYTES
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": 2 * elements * tensors}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def import_seconds(rounds: int = 9) -> float:
    """Median time that `import shardkit` adds to Python's own start."""
    pairs = [(Run(python("pass")), Run(python("import shardkit"))) for _ in range(rounds)]
    return median(after.seconds - before.seconds for before, after in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="4GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work: a disk with five times the size free")
    parser.add_argument("--output", help="write the figures here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as scratch:
        figures = measure(Path(scratch), options.size, options.rounds)
    print(f"{'promise':<58} {'seen':>10} {'at most':>10}")
    for name, seen, limit, unit in figures:
        shown = [format_size(x) if unit == "B" else f"{x:.3g} {unit}".strip() for x in (seen, limit)]
        print(f"{name:<58} {shown[0]:>10} {shown[1]:>10}  {'held' if seen <= limit else 'NOT HELD'}")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2))
    sys.exit(any(seen > limit for _, seen, limit, _ in figures))


def measure(scratch: Path, size: str, rounds: int) -> list[tuple[str, float, float, str]]:
    source = scratch / "source"
    make_demo_checkpoint(source, size=size, shards=WORKERS)
    runs = rounds_of(source, scratch, rounds)

    def ratio(ours: str, peer: str) -> float:
        return median(a.seconds / b.seconds for a, b in zip(runs[ours], runs[peer], strict=True))

    def peak(name: str) -> float:
        return max(run.peak_bytes for run in runs[name])

    print(f"{'process':<24} {'wall':>8} {'peak':>10}")
    for name, own in runs.items():
        print(f"{name:<24} {median(run.seconds for run in own):6.2f} s {format_size(peak(name)):>10}")
    small = scratch / "small"
    make_demo_checkpoint(small, size="500MB", shards=WORKERS)
    small_peaks = {
        dtype: timed(lambda t, d=dtype: python(SHARD, small, t, d, "copy"), small, scratch).peak_bytes
        for dtype in ("", "float16")
    }
    sparse = scratch / "sparse"
    sparse.mkdir()
    sparse_checkpoint(sparse, files=200, tensors=100_000, nbytes=10**12)
    total = Checkpoint.open(source).total_bytes
    plan = median(Run(python(PLAN, sparse)).seconds for _ in range(rounds))
    mb = 10**6
    return [
        (f"shard {format_size(total)}: wall / parallel cp", ratio("shardkit", "cp"), 1.1, "x"),
        ("  the same with verification / parallel cp", ratio("shardkit, verified", "cp"), 3.0, "x"),
        ("  wall / transformers", ratio("shardkit", "transformers"), 0.2, "x"),
        ("  peak memory / transformers", peak("shardkit") / peak("transformers"), 0.05, "x"),
        ("  peak memory", peak("shardkit"), 45 * mb, "B"),
        ("  peak memory at 500 MB", small_peaks[""], 45 * mb, "B"),
        ("  growth of the peak from 500 MB", abs(peak("shardkit") - small_peaks[""]), 8 * mb, "B"),
        ("cast to float16: wall / parallel cp", ratio(CAST, "cp"), 1.5, "x"),
        ("  wall / transformers", ratio(CAST, "transformers to float16"), 0.5, "x"),
        ("  peak memory / transformers", peak(CAST) / peak("transformers to float16"), 0.05, "x"),
        ("  peak memory", peak(CAST), 80 * mb, "B"),
        ("  growth of the peak from 500 MB", abs(peak(CAST) - small_peaks["float16"]), 20 * mb, "B"),
        ("open and plan 1 TB, 100,000 tensors, 200 files", plan, 3.0, "s"),
        ("import shardkit, beyond Python's start", import_seconds(), 0.15, "s"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
