"""What `make torture` tries at length, tried in smaller numbers; and that it would find a fault."""

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.torture import pickles
from tests.torture.__main__ import table
from tests.torture.bench import Bench, Fault, Finding, Kind, Outcome, Place
from tests.torture.kinds import KINDS

# What they try depends on an idle machine; test_compare.py tries it with loads of a known length.
TIMED = ("quantized", "same-twice", "same-twice-auto", "slowdowns", "slowdowns-auto")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, mounts and Linux's own calls")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("torture"), workers=2) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in TIMED])
def test_nothing_is_lost_nor_believed_nor_executed(name: str, bench: Bench) -> None:
    kind = KINDS[name]
    outcome = bench.run(name, kind, range(kind.suite))
    assert not outcome.faults, "\n".join(outcome.faults)
    if skipped := [what for what in outcome.counts if what.startswith("skipped")]:
        pytest.skip(skipped[0])


def _faulty(place: Place) -> Iterator[Finding]:
    if place.number == 1:
        yield Fault("found")
    if place.number == 2:
        raise OSError("raised")


def _dying(place: Place) -> Iterator[Finding]:
    yield Fault(f"{os.kill(os.getpid(), 9)} at {place.number}")


def test_fault_is_one_line_that_says_how_to_repeat_it(bench: Bench) -> None:
    outcome = bench.run("faulty", Kind("faulty", _faulty, 3, 3), range(3), seed=7)
    again = "python -m tests.torture faulty --seed 7 --trial"
    assert outcome.tried == 3
    assert outcome.faults == [f"{again} 1: found", f"{again} 2: OSError: raised"]
    assert table([outcome], 7).splitlines()[2:] == outcome.faults


def test_process_that_dies_is_a_fault(bench: Bench) -> None:
    outcome = bench.run("dying", Kind("dying", _dying, 9, 9), range(9))
    assert len(outcome.faults) == 1
    assert "died" in outcome.faults[0]


def test_pickles_would_be_executed_by_a_reader_that_trusts_them(tmp_path: Path) -> None:
    for number, way in enumerate(("reduce", "stack global", "inst", "obj", "build")):
        canary = tmp_path / str(number)
        command = pickles.text(f"touch '{canary}'")
        if way != "build":
            pickle.loads(b"\x80\x04" + pickles.call("posix.system", command, way=way) + b".")
            assert canary.exists(), way


def test_every_kind_runs_at_full_length_by_default() -> None:
    assert all(kind.full >= kind.suite > 0 for name, kind in KINDS.items() if name not in TIMED)
    assert Outcome("nothing").note == ""
