"""A measured load against the same load by itself: what watching costs, and whether it sees the truth.

The bare load is what a user would write: imports, then `from_pretrained` between two readings of a clock,
then the kernel's own peak of it. Both take turns in ABBA order, with a warm page cache.

    python -m tests.benchmarks.bench_measure --rounds 15
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from shardkit.demo import make_demo_checkpoint
from shardkit.measure import measure_load
from shardkit.measure.intervals import paired_interval
from shardkit.sizes import format_size

BARE = """
import json, os, sys, time
import safetensors.torch, torch, transformers, accelerate
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM._model_mapping[type(config)]
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
wall = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps([wall, peak]), flush=True)
os._exit(0)
"""


def bare(folder: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder)], capture_output=True, text=True, check=True
    )
    wall, peak = json.loads(done.stdout.splitlines()[-1])
    return wall, peak


def measured(folder: Path) -> tuple[float, float]:
    found = measure_load(folder, dtype="float16", cache="warm", generate=0)
    assert found.ok, found.reason
    return found.load_wall_seconds, found.phase("load").peak_total_bytes


def rounds_of(folder: Path, rounds: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    ours, theirs = [], []
    for number in range(-1, rounds):
        pair = {}
        for contender in (bare, measured) if number % 2 else (measured, bare):
            pair[contender] = contender(folder)
        if number >= 0:  # the first warms up
            theirs.append(pair[bare])
            ours.append(pair[measured])
            print(
                f"  bare {pair[bare][0]:.3f} s, measured {pair[measured][0]:.3f} s",
                file=sys.stderr,
                flush=True,
            )
    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["50MB", "500MB", "4GB"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", help="where to work: a disk with the sizes free")
    options = parser.parse_args()
    held = True
    print(f"{'promise':<44} {'ratio':>7} {'95 % interval':>16} {'at most':>8}")
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as scratch:
            folder = Path(scratch, "model")
            checkpoint = make_demo_checkpoint(folder, size=size)
            pairs = rounds_of(folder, options.rounds)
        for number, (what, limit) in enumerate((("wall", 0.02), ("peak total", 0.01))):
            interval = paired_interval(*([run[number] for run in side] for side in pairs), seed=0)
            broken = interval.low > 1 + limit or interval.high < 1 - limit
            sure = interval.high <= 1 + limit
            held &= not broken
            name = f"load {format_size(checkpoint.total_bytes)}: {what}, measured / bare"
            bounds = f"{interval.low:.3f} to {interval.high:.3f}"
            verdict = (
                "NOT HELD" if broken else "held" if sure else "undecided: more rounds, or a quieter machine"
            )
            print(f"{name:<44} {interval.ratio:>7.3f} {bounds:>16} {1 + limit:>8.2f}  {verdict}", flush=True)
    sys.exit(not held)


if __name__ == "__main__":
    main()
