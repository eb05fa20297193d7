"""Comparisons whose truth is known: a checkpoint and itself, or one whose loads are made 1.3 x longer."""

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from shardkit.compare.comparison import Comparison
from shardkit.compare.experiment import compare_loads
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.launch import WORKER
from shardkit.measure.samples import AUTO, Repeats
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen

SLOWDOWN = 1.3
# Where one load in three is 20 % off, as on shared cores, so many tell 1.3 x from 1.05 x nine times of ten.
_ENOUGH = 10
# Runs the worker as it is, with a `from_pretrained` that takes its time where the folder is named so.
_SLOW = f"""#!{sys.executable}
import runpy, sys, time, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
def slow(folder, *args, **options):
    start = time.monotonic()
    model = load(folder, *args, **options)
    if folder.endswith("slowed"):
        time.sleep(({SLOWDOWN} - 1) * (time.monotonic() - start))
    return model
transformers.AutoModelForCausalLM.from_pretrained = slow
sys.argv = sys.argv[1:]
runpy.run_path({str(WORKER)!r}, run_name="__main__")
"""


def _prepare(shared: Path) -> None:
    make_demo_checkpoint(shared / "model", size="400MB")
    shutil.copytree(shared / "model", shared / "slowed", copy_function=os.link)
    slow = shared / "slow-python"
    slow.write_text(_SLOW)
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)


def _same_twice(repeats: Repeats, place: Place) -> Iterator[Finding]:
    found = _compare(place, "model", repeats)
    wrong = [ratio for ratio in found.ratios.values() if ratio.conclusion in ("less", "more")]
    if wrong:
        yield Fault("; ".join(f"{ratio.quantity}: {ratio}" for ratio in wrong))
    yield Seen(f"load {found.ratios['load_wall_seconds'].conclusion}")
    yield _took(found)


def _slowed(repeats: Repeats, place: Place) -> Iterator[Finding]:
    found = _compare(place, "slowed", repeats, generate=0, python=place.shared / "slow-python")
    ratio = found.ratios["load_wall_seconds"]
    yield Most("x, slowdown as measured", ratio.ratio)
    if ratio.conclusion != "more":
        yield Fault(f"a load made {SLOWDOWN} x longer: {ratio}")
    yield _took(found)


def _compare(place: Place, other: str, repeats: Repeats, **more: Any) -> Comparison:
    pair = place.shared / "model", place.shared / other
    return compare_loads(*pair, dtype="float16", cache="warm", repeats=repeats, **more)


def _took(found: Comparison) -> Seen:
    return Seen(f"after {len({sample.pair for sample in found.samples}):2} pairs")


def _kind(
    what: str, trial: Callable[[Repeats, Place], Iterator[Finding]], repeats: Repeats, **how: int
) -> Kind:
    """Two at once: more would disturb each other."""
    until = ", until decided" * (repeats == AUTO)
    return Kind(
        what + until, partial(trial, repeats), suite=0, prepare=_prepare, workers=2, seconds=1200, **how
    )


# By chance, one in twenty may find a difference that is none, and two may miss one.
_ALIKE, _APART = "the same checkpoint in both variants", f"loads made {SLOWDOWN} x longer"
SAME = _kind(_ALIKE, _same_twice, 5, full=20, tolerated=1)
SAME_UNTIL = _kind(_ALIKE, _same_twice, AUTO, full=40, tolerated=2)
SLOWED = _kind(_APART, _slowed, _ENOUGH, full=20, tolerated=2)
SLOWED_UNTIL = _kind(_APART, _slowed, AUTO, full=20, tolerated=2)
