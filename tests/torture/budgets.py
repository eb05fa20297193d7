"""Models within a memory budget that is also the kernel's limit: whatever needs more is killed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.limit import limited, why_unlimited
from shardkit.measure.page_cache import prepare
from shardkit.shard.engine import shard_checkpoint
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen, Skip

_TOKENS = 50
# Python, torch and transformers, the cache and the buffers, of a model so small that they are most of it.
_BESIDE_BYTES = 370_000_000
_LAYOUTS = ("demo", "layers", "one", "pickle")

_GENERATE = """
import json, sys, torch, transformers
from shardkit import load_model
transformers.AutoModelForCausalLM, transformers.MistralForCausalLM
budget = int(sys.argv[2]) or None
options = {"max_memory": budget, "context_tokens": 64} if budget else {}
model = load_model(sys.argv[1], **options)
ids = torch.arange(1, 9)[None]
with torch.inference_mode():
    out = model.generate(ids, max_new_tokens=int(sys.argv[3]), do_sample=False, eos_token_id=None,
                         pad_token_id=0)
most = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "kB" in line}
plan = getattr(model, "memory_plan", None)  # none where all weights fit
print(json.dumps([out[0].tolist(), most["RssAnon"] + most["RssShmem"], plan.streamed_bytes if plan else 0]))
"""


def _prepare(shared: Path) -> None:
    make_demo_checkpoint(shared / "demo", size="400MB")
    shard_checkpoint(shared / "demo", shared / "layers", strategy="layer")
    shard_checkpoint(shared / "demo", shared / "one", max_shard_size="1GB")
    (shared / "pickle").mkdir()
    (one,) = (shared / "one").glob("*.safetensors")
    torch.save(load_file(one), shared / "pickle" / "pytorch_model.bin")
    (shared / "pickle" / "config.json").write_bytes((shared / "one" / "config.json").read_bytes())
    plain = _generate([sys.executable], shared / "one", 0)
    (shared / "tokens.json").write_text(json.dumps(json.loads(plain.stdout)[0]))


def _generate(python: list[str], folder: Path, budget: int) -> subprocess.CompletedProcess[str]:
    words = [*python, "-c", _GENERATE, str(folder), str(budget), str(_TOKENS)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def _within(place: Place) -> Iterator[Finding]:
    """Generate 50 tokens, cold, within a quarter to nine tenths of the weights."""
    if why := why_unlimited():
        raise Skip(why)
    folder = place.shared / _LAYOUTS[place.number % len(_LAYOUTS)]
    checkpoint = Checkpoint.open(folder)
    budget = _BESIDE_BYTES + int(place.dice.uniform(0.25, 0.9) * checkpoint.total_bytes)
    prepare([checkpoint.path(name) for name in checkpoint.files], "cold")
    with limited(budget) as limit:
        done = _generate(limit.command([sys.executable]), folder, budget)
        kills = limit.kills()
    told = f"{folder.name} in {budget:,} bytes"
    if done.returncode or kills:
        yield Fault(f"{told}: status {done.returncode}, {kills} kills: {done.stderr[-300:]}")
        return
    tokens, memory, streamed = json.loads(done.stdout)
    if tokens != json.loads((place.shared / "tokens.json").read_text()):
        yield Fault(f"{told}: other tokens than the plain model")
    if memory > budget:
        yield Fault(f"{told}: {memory:,} bytes at the end")
    yield Most("of the budget used", memory / budget)
    yield Seen("with weights streamed" if streamed else "with all weights resident")


BUDGETS = Kind("50 tokens in a limit as large as the budget", _within, 50, 1, _prepare)
