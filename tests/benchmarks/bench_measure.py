"""What watching a load costs, and whether the watcher sees the kernel's own peak.

Wall: one process loads again and again while the whole instrument (a process of its own that runs
`measure_load` around it) is stopped and let go on in turn, load by load, in ABBA order: a neighbour's noise
meets both alike, and no start of a process comes between. A watched load is timed with what the worker does
about it; the median of the paired ratios counts, with its bootstrap interval. Peak: `measure_load` in full,
against the kernel's figure of a load that nobody watched.

    python -m tests.benchmarks.bench_measure --sizes 50MB 500MB --pairs 1000 300
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shardkit.base.sizes import format_size
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.launch import measure_load
from tests.benchmarks.ratio import HEAD, Ratio
from tests.fake_loads import fake_interpreter

_PREPARED = """
import safetensors.torch, torch, transformers, accelerate
transformers.AutoModelForCausalLM._model_mapping[type(transformers.AutoConfig.from_pretrained({folder!r}))]
transformers.AutoTokenizer.from_pretrained({folder!r})
def load():
    return transformers.AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float16)
"""
# Stands in for the worker: loads once a line that it is sent, and answers with seconds.
_AGAIN_AND_AGAIN = """
from contextlib import nullcontext
with reporter.phase("imports"):
{prepared}
with open({asked!r}) as asked, open({answers!r}, "w", buffering=1) as answers:
    for line in asked:
        start = time.perf_counter()
        with reporter.phase("load") if line == "watched\\n" else nullcontext():
            model = load()
        print(time.perf_counter() - start, file=answers)
        del model
reporter.send("done")
"""
_INSTRUMENT = """
import shardkit, sys
found = shardkit.measure_load(sys.argv[1], dtype="float16", cache="warm", generate=0, python=sys.argv[2])
assert found.ok and found.curve.seconds, found
"""
_UNWATCHED_PEAK = """
{prepared}
open("/proc/self/clear_refs", "w").write("5")
model = load()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
PEAK_ROUNDS = 3


@contextmanager
def instrument(scratch: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """Run `measure_load` around a process that loads when asked."""
    asked, answers = scratch / "asked", scratch / "answers"
    for pipe in (asked, answers):
        os.mkfifo(pipe)
    prepared = _PREPARED.format(folder=str(folder)).replace("\n", "\n    ")
    script = _AGAIN_AND_AGAIN.format(prepared=prepared, asked=str(asked), answers=str(answers))
    worker = fake_interpreter(scratch, script)
    with subprocess.Popen([sys.executable, "-c", _INSTRUMENT, str(folder), str(worker)]) as process:
        yield process, asked, answers
    if process.returncode:
        raise SystemExit(f"the instrument failed: status {process.returncode}")


def wall_overhead(scratch: Path, folder: Path, pairs: int) -> Ratio:
    """Return what a load takes watched, to what it takes unwatched."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with (
        instrument(scratch, folder) as (process, asked, answers),
        asked.open("w", buffering=1) as ask,
        answers.open() as answer,
    ):
        for number in range(-2, pairs):  # the first two warm up
            for watched in (True, False) if number % 2 else (False, True):
                process.send_signal(signal.SIGCONT if watched else signal.SIGSTOP)
                time.sleep(0.02)
                ask.write("watched\n" if watched else "unwatched\n")
                took = float(answer.readline())
                if number >= 0:
                    seconds[watched].append(took)
        process.send_signal(signal.SIGCONT)
    return median_interval(seconds[False], seconds[True])


def median_interval(first: list[float], second: list[float]) -> Ratio:
    """Return the median of ``second / first`` and its bootstrap interval: one hiccup moves neither."""
    ratios = np.asarray(second) / np.asarray(first)
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    return Ratio(float(np.median(ratios)), *np.quantile(np.median(drawn, axis=1), (0.025, 0.975)))


def peak_error(folder: Path) -> Ratio:
    """Return the peak that `measure_load` reports, to the kernel's of a load that nobody watched."""
    told, kernels = [], []
    code = _UNWATCHED_PEAK.format(prepared=_PREPARED.format(folder=str(folder)))
    for _ in range(PEAK_ROUNDS):
        found = measure_load(folder, dtype="float16", cache="warm", generate=0)
        told.append(found.phase("load").peak_total_bytes)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        kernels.append(int(done.stdout.split()[-1]) * 1024)
    return Ratio.of(kernels, told)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["50MB", "500MB", "4GB"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[600, 200, 25], help="of loads, by size")
    parser.add_argument("--folder", help="where to work: a disk with the sizes free")
    options = parser.parse_args()
    held = True
    print(HEAD)
    for size, pairs in zip(options.sizes, options.pairs, strict=True):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as made:
            scratch, folder = Path(made), Path(made, "model")
            nbytes = format_size(make_demo_checkpoint(folder, size=size).total_bytes)
            found = {
                f"load {nbytes}: wall, watched / unwatched": (wall_overhead(scratch, folder, pairs), 0.02),
                f"load {nbytes}: peak total, told / kernel's": (peak_error(folder), 0.01),
            }
        for name, (interval, limit) in found.items():
            held &= show(name, interval, limit)
    sys.exit(not held)


def show(name: str, interval: Ratio, limit: float) -> bool:
    """Print a line; False where the promise is broken."""
    broken = interval.low > 1 + limit or interval.high < 1 - limit
    verdict = "undecided: more pairs, or a quieter machine" if interval.high > 1 + limit else "held"
    verdict = "NOT HELD" if broken else verdict
    print(interval.line(name, 1 + limit, verdict), flush=True)
    return not broken


if __name__ == "__main__":
    main()
