"""Comparisons whose truth is known: the same checkpoint in two variants, and a third made 1.3 x slower."""

import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardkit.compare.comparison import Comparison
from shardkit.compare.experiment import compare_loads
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.launch import WORKER
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen

SLOWDOWN = 1.3
# Where one load in three is 20 % off, as on shared cores, so many tell 1.3 x from 1.05 x nine times of ten.
_ENOUGH = 10
# Runs the worker as it is, with a `from_pretrained` that takes its time.
_SLOW = f"""#!{sys.executable}
import runpy, sys, time, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
def slow(*args, **options):
    start = time.monotonic()
    model = load(*args, **options)
    time.sleep(({SLOWDOWN} - 1) * (time.monotonic() - start))
    return model
transformers.AutoModelForCausalLM.from_pretrained = slow
sys.argv = sys.argv[1:]
runpy.run_path({str(WORKER)!r}, run_name="__main__")
"""


def _prepare(shared: Path) -> None:
    make_demo_checkpoint(shared / "model", size="400MB")
    slow = shared / "slow-python"
    slow.write_text(_SLOW)
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)


def _same_twice(place: Place) -> Iterator[Finding]:
    found = _compare(place, repeats=5)
    wrong = [ratio for ratio in found.ratios.values() if ratio.conclusion in ("less", "more")]
    if wrong:
        yield Fault("; ".join(f"{ratio.quantity}: {ratio}" for ratio in wrong))
    yield Seen(f"load {found.ratios['load_wall_seconds'].conclusion}")


def _slowed(place: Place) -> Iterator[Finding]:
    slow = {"slowed": {"python": str(place.shared / "slow-python")}}
    found = _compare(place, repeats=_ENOUGH, generate=0, others=slow)
    ratio = found.ratios_of("slowed")["load_wall_seconds"]
    yield Most("x, slowdown as measured", ratio.ratio)
    if ratio.conclusion != "more":
        yield Fault(f"a load made {SLOWDOWN} x longer: {ratio}")


def _compare(place: Place, **more: Any) -> Comparison:
    model = place.shared / "model"
    return compare_loads(model, model, dtype="float16", cache="warm", **more)


# Two at once: more would disturb each other. By chance, one in twenty may find a difference that is none, and
# two may miss one.
SAME = Kind(
    "the same checkpoint in both variants", _same_twice, 20, 0, _prepare, workers=2, seconds=900, tolerated=1
)
SLOWED = Kind(
    f"loads made {SLOWDOWN} x longer", _slowed, 20, 0, _prepare, workers=2, seconds=900, tolerated=2
)
