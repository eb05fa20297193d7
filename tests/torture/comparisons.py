"""Comparisons whose truth is known: the same checkpoint in two arms, and a third made 1.3 x slower."""

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from shardkit.compare import compare_loads
from shardkit.demo import make_demo_checkpoint
from shardkit.measure.launch import WORKER
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen

SLOWDOWN = 1.3
_REPEATS = 5
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


def _compared(place: Place) -> Iterator[Finding]:
    model = place.shared / "model"
    found = compare_loads(
        model,
        model,
        dtype="float16",
        cache="warm",
        repeats=_REPEATS,
        others={"slowed": {"python": str(place.shared / "slow-python")}},
        seed=place.number,
    )
    for ratio in found.ratios.values():
        if ratio.conclusion in ("less", "more"):
            yield Fault(f"the same checkpoint twice, {ratio.quantity}: {ratio.words()}")
    yield Seen(f"A/A load {found.ratios['load_wall_seconds'].conclusion}")
    slowed = found.ratios_of("slowed")["load_wall_seconds"]
    if slowed.conclusion == "more":
        yield Seen("slowdown called")
        yield Most("x, slowdown as measured", slowed.ratio)
    else:
        yield Fault(f"a load made {SLOWDOWN} x longer: {slowed.words()}")


COMPARISONS = Kind(
    "A/A comparisons, and a slowdown to find", _compared, 20, 0, _prepare, workers=2, seconds=900, tolerated=1
)
