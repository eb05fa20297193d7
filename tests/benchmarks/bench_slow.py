"""Loading from a slow mount, against plain `from_pretrained`: wall time to the first token, as a ratio.

The mount is a FUSE file system made here, throttled to a rate and a wait for each request. Each load is a
process of its own, in pairs whose order changes, with imports before the clock starts; all are cold, as the
bytes show that the server was asked for. Where requests share one line, the kernel's own read-ahead leaves
little of it idle, and no way of reading is faster than the line.

    python -m tests.benchmarks.bench_slow --size 500MB --pairs 3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from shardkit.base import pages
from shardkit.base.sizes import format_size, parse_size
from shardkit.demo import make_demo_checkpoint
from tests.benchmarks.ratio import HEAD, Ratio
from tests.slow_mount import SlowMount, slow_mount, why_no_fuse

PROMISES = {"each": 0.5, "shared": 1.1}  # first token against from_pretrained, by what has the rate
PLAIN, OURS = "from_pretrained", "shardkit.load_model"
_LOADS = {PLAIN: "transformers.AutoModelForCausalLM.from_pretrained", OURS: "shardkit.load_model"}
_FIRST_TOKEN = """
import os, sys, time
import shardkit, torch, transformers
transformers.MistralForCausalLM, shardkit.load_model
begin = time.perf_counter()
model = {load}(sys.argv[1], dtype="auto")
with torch.inference_mode():
    token = model(torch.arange(1, 9)[None]).logits[0, -1].argmax().item()
print(time.perf_counter() - begin, token)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0], flush=True)
os._exit(0)
"""


class Run(NamedTuple):
    """One load: seconds to the first token, the peak of its process, its token, and what was requested."""

    seconds: float
    peak_bytes: int
    token: int
    requests: int
    read_bytes: int


def run(name: str, mount: SlowMount) -> Run:
    pages.drop(mount.folder.glob("*.safetensors"))
    mount.take_requests()
    command = [sys.executable, "-c", _FIRST_TOKEN.format(load=_LOADS[name]), str(mount.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: status {done.returncode}\n{done.stderr[-2000:]}")
    seconds, token, peak = done.stdout.split()
    requests = mount.take_requests()
    read = sum(request.nbytes for request in requests)
    return Run(float(seconds), int(peak) * 1024, int(token), len(requests), read)


def pairs_of(mount: SlowMount, nbytes: int, count: int) -> dict[str, list[Run]]:
    """Run both in turn, so many times, and show each."""
    runs: dict[str, list[Run]] = {PLAIN: [], OURS: []}
    for number in range(count):
        for name in (PLAIN, OURS) if number % 2 == 0 else (OURS, PLAIN):
            found = run(name, mount)
            assert found.read_bytes >= 0.8 * nbytes, (name, found)  # rows of the embedding that nobody wants
            runs[name].append(found)
            each, peak = map(format_size, (found.read_bytes / found.requests, found.peak_bytes))
            words = f"{found.seconds:6.2f} s, {found.requests} requests of {each}, peak {peak}"
            print(f"  {name:<20} {words}", file=sys.stderr, flush=True)
    assert len({found.token for both in runs.values() for found in both}) == 1
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="500MB")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rate", default="50MB", help="bytes a second of the mount")
    parser.add_argument("--delay", type=float, default=0.005, help="seconds that each request waits")
    parser.add_argument("--lines", nargs="+", default=list(PROMISES), choices=list(PROMISES))
    parser.add_argument("--folder", help="where to work: a disk with the size free")
    options = parser.parse_args()
    if why := why_no_fuse():
        print(f"nothing can be mounted here, so slow mounts are not measured: {why}")
        return
    kept = True
    print(HEAD)
    for line in options.lines:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="shardkit-bench-") as made:
            model = Path(made, "model")
            nbytes = make_demo_checkpoint(model, size=options.size).total_bytes
            how = parse_size(options.rate), options.delay, line
            with slow_mount(model, Path(made, "slow"), *how) as mount:
                runs = pairs_of(mount, nbytes, options.pairs)
        ratio = Ratio.of(*([one.seconds for one in found] for found in runs.values()))
        title = f"{format_size(nbytes)}, {options.rate}/s {line}, {options.delay:g} s a request: first token"
        print(ratio.line(title, PROMISES[line]), flush=True)
        kept &= ratio.ratio <= PROMISES[line]
    sys.exit(not kept)


if __name__ == "__main__":
    main()
