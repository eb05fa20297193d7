"""A model within less memory than it has weights: seconds a token against its peers, and what is promised.

Every load is a process of its own in a control group whose limit is a share of the weights, and starts cold.
Rounds go through all contenders in turn, so that a machine whose speed drifts slows them alike; ratios are
paired by round, with their interval. Each contender's own figure is the median of its tokens after the first.

    python -m tests.benchmarks.bench_blocks --size 4GB
    python -m tests.benchmarks.bench_blocks --size 4GB --airllm /some/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.limit import limited
from shardkit.measure.page_cache import prepare
from shardkit.shard.engine import shard_checkpoint
from tests.benchmarks.ratio import HEAD, Ratio

OURS = "shardkit"
# What peers must be left beside weights: Python, torch, transformers, and buffers of their own.
BESIDE_BYTES = 600_000_000
# A limit that is a share of a small model leaves no room for Python: to try this benchmark, it gets some.
SMALL_BYTES, RUNTIME_BYTES = 2_000_000_000, 450_000_000
PROMISES = {0.5: 0.55, 0.75: 0.35}  # seconds a token against the best peer, by share of the weights
CONTEXT = 64

_BEGIN = """
import json, sys, threading, time
import torch, transformers
folder, limit, count, scratch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
transformers.AutoModelForCausalLM, transformers.MistralForCausalLM
def field(path, name):
    return next(int(line.split()[1]) for line in open(path) if line.startswith(name))
def anonymous():
    return 1024 * (field("/proc/self/status", "RssAnon:") + field("/proc/self/status", "RssShmem:"))
most, done, before = [0], threading.Event(), anonymous()
def watch():
    while not done.wait(0.01):
        most[0] = max(most[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
moments = []
class Streamer:
    def put(self, value):
        moments.append((time.perf_counter(), field("/proc/self/io", "read_bytes:")))
    def end(self):
        pass
"""
_END = """
ids = torch.arange(1, 9)[None]
with torch.inference_mode():
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                         eos_token_id=None, pad_token_id=0, streamer=Streamer())
plan = getattr(model, "memory_plan", None)
print(json.dumps({"moments": moments, "tokens": out[0].tolist(), "peak": most[0], "before": before, "plan": {
    "resident": plan.resident_bytes, "streamed": plan.streamed_bytes,
    "cache": plan.cache_bytes} if plan else None}), flush=True)
import os; os._exit(0)
"""
_PLAIN = "model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='auto')\n"
CONTENDERS = {
    OURS: f"""
from shardkit import load_model
model = load_model(folder, max_memory=limit, context_tokens={CONTEXT})
""",
    "plain map": _PLAIN,
    "accelerate auto": f"""
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", offload_folder=scratch,
    device_map="auto", max_memory={{"cpu": max(limit - {BESIDE_BYTES}, 0)}})
""",
    "accelerate on disk": """
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", device_map={"": "disk"}, offload_folder=scratch)
""",
}
AIRLLM = """
from airllm import AutoModel
model = AutoModel.from_pretrained(folder, device="cpu", layer_shards_saving_path=scratch)
"""


class Figures(NamedTuple):
    """What one process took: seconds and bytes read of each token, peak memory, and its plan."""

    seconds: list[float]
    read: list[int]
    peak: int
    before: int
    tokens: list[int]
    plan: dict[str, int] | None

    @property
    def each(self) -> float:
        return median(self.seconds[1:])


class Bench:
    """A model on disk, and what is asked of it."""

    def __init__(self, folder: Path, scratch: Path, count: int, airllm: str | None) -> None:
        self.folder, self.scratch, self.count, self.airllm = folder, scratch, count, airllm
        checkpoint = Checkpoint.open(folder)
        self.nbytes = checkpoint.total_bytes
        self.files = [checkpoint.path(name) for name in checkpoint.files]

    def run(self, name: str, limit: int | None) -> Figures:
        """Load and generate in a process of its own, under a limit, cold; without a limit, warm."""
        code = _BEGIN + (AIRLLM if name == "AirLLM" else CONTENDERS[name]) + _END
        python = self.airllm if name == "AirLLM" and self.airllm else sys.executable
        prepare(self.files, "cold" if limit else "warm")
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch, limited(limit) as under:
            # AirLLM's second copy is made once, and not counted.
            kept = self.scratch / "airllm" if name == "AirLLM" else Path(scratch)
            words = [python, "-c", code, self.folder, limit or 0, self.count, kept]
            command = under.command([str(word) for word in words])
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} under {limit}: status {done.returncode}\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        pairs = list(zip(found["moments"], found["moments"][1:], strict=False))
        return Figures(
            [after[0] - before[0] for before, after in pairs],
            [after[1] - before[1] for before, after in pairs],
            *(found[name] for name in ("peak", "before", "tokens", "plan")),
        )

    def limit(self, share: float) -> int:
        return int(share * self.nbytes) + (RUNTIME_BYTES if self.nbytes < SMALL_BYTES else 0)

    def disk_rate(self) -> float:
        """Bytes a second that two `dd` read at once, past the page cache."""
        prepare(self.files, "cold")
        largest = sorted(self.files, key=lambda file: Path(file).stat().st_size)[-4:]
        command = "xargs -P 2 -I{} dd if={} of=/dev/null bs=16M iflag=direct status=none"
        start = time.perf_counter()
        subprocess.run(["sh", "-c", command], input="\n".join(largest), text=True, check=True)
        return sum(Path(file).stat().st_size for file in largest) / (time.perf_counter() - start)


def rounds_of(bench: Bench, share: float, rounds: int) -> tuple[dict[str, list[Figures]], list[float]]:
    """Run all contenders in turn, in another order each round; one that dies is left out from there on."""
    names = [*CONTENDERS, *(["AirLLM"] if bench.airllm else [])]
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    rates = []
    for number in range(rounds):
        rates.append(bench.disk_rate())
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            try:
                runs[name].append(bench.run(name, bench.limit(share)))
            except RuntimeError as error:
                if name == OURS:
                    raise
                print(f"  {name}: {error}", file=sys.stderr)
                continue
            found = runs[name][-1]
            print(
                f"  {share:.0%} {name:<20} first {found.seconds[0]:6.2f} s, then {found.each:6.3f} s and "
                f"{format_size(median(found.read[1:]))} read each, peak {format_size(found.peak)}",
                file=sys.stderr,
                flush=True,
            )
    return {name: found for name, found in runs.items() if len(found) == rounds}, rates


def promises(bench: Bench, share: float, rounds: int) -> list[tuple[str, Ratio, float]]:
    """What is promised of a limit of this share of the weights: name, ratio, and the most it may be."""
    runs, rates = rounds_of(bench, share, rounds)
    ours = runs.pop(OURS)
    best = min(runs, key=lambda name: median(run.each for run in runs[name]))
    assert all(run.tokens == ours[0].tokens for found in (ours, runs["plain map"]) for run in found)
    compute = bench.run("plain map", None).each
    plan = ours[0].plan
    assert plan is not None
    budget = bench.limit(share)
    room = [budget - run.before - plan["cache"] for run in ours]
    slowest = [max(plan["streamed"] / rate, compute) for rate in rates]
    pairs = {
        f"seconds a token / {best}": (
            [run.each for run in runs[best]],
            [run.each for run in ours],
            PROMISES[share],
        ),
        "seconds a token / disk or compute": (slowest, [run.each for run in ours], 1.15),
        "first token / later ones": ([run.each for run in ours], [run.seconds[0] for run in ours], 3.0),
        "bytes read a token / streamed": (
            [plan["streamed"]] * rounds,
            [median(r.read[1:]) for r in ours],
            1.05,
        ),
        "room for weights x 0.8 / resident": ([plan["resident"]] * rounds, [0.8 * x for x in room], 1.0),
        "peak memory / limit": ([budget] * rounds, [run.peak for run in ours], 1.0),
    }
    print(
        f"  {share:.0%}: disk {format_size(median(rates))}/s, compute {compute:.3f} s a token, "
        f"{format_size(plan['resident'])} resident, {format_size(plan['streamed'])} streamed",
        file=sys.stderr,
    )
    title = f"{format_size(bench.nbytes)} in {share:.0%} of it: "
    return [(title + name, Ratio.of(first, second), limit) for name, (first, second, limit) in pairs.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="4GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--shares", nargs="+", type=float, default=list(PROMISES), choices=list(PROMISES))
    parser.add_argument(
        "--folder", help="where to work: a disk with twice the size free (AirLLM: three times)"
    )
    parser.add_argument("--airllm", help="a Python with AirLLM 4 installed (`pip install --no-deps airllm`)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as made:
        scratch = Path(made)
        make_demo_checkpoint(scratch / "demo", size=options.size)
        shard_checkpoint(scratch / "demo", scratch / "layers", strategy="layer")
        shutil.rmtree(scratch / "demo")
        bench = Bench(scratch / "layers", scratch, options.tokens, options.airllm)
        found = [line for share in options.shares for line in promises(bench, share, options.rounds)]
    print(HEAD)
    for name, ratio, limit in found:
        print(ratio.line(name, limit))
    sys.exit(any(ratio.ratio > limit for _, ratio, limit in found))


if __name__ == "__main__":
    main()
