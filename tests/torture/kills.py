"""SIGKILL at any instant and at chosen calls: the destination is absent or whole, the next run ends it."""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import product
from pathlib import Path

from shardkit.base.errors import Cancelled
from shardkit.demo import make_demo_checkpoint
from shardkit.shard.engine import shard_checkpoint
from tests.torture.bench import Fault, Finding, Kind, Place, Seen, beside, digests, told
from tests.torture.child import Ending, Spec, end, perform, start_child

LIMIT = "1MB"
DTYPES = (None, "float16")
_HOWS = ("fresh", "resumed", "torn journal", "overwrite", "overwrite by renames")
_PROFILED = ("fresh", "overwrite", "overwrite by renames")  # the others call less than the first
_WAYS = tuple(product(_HOWS, DTYPES))


def make_model(shared: Path) -> None:
    """A model of 30 MB, the shards it has to become, and an older checkpoint to be replaced."""
    source = make_demo_checkpoint(shared / "source", size="30MB").source
    shard_checkpoint(source, shared / "old", strategy="layer")
    for dtype in DTYPES:
        assert shard_checkpoint(source, shared / f"{dtype}", max_shard_size=LIMIT, dtype=dtype).verification


@cache
def whole(folder: Path) -> dict[str, str] | None:
    """What is in a folder that nobody may change."""
    return digests(folder)


def spec_of(place: Place, dtype: str | None, **more: object) -> Spec:
    """What to shard, where to, how."""
    source, out = place.shared / "source", place.work / "out"
    whole(source)  # what it was beforehand
    options = {"max_shard_size": LIMIT, "dtype": dtype}
    return {"source": str(source), "destination": str(out), "options": options, **more}


def go_on(place: Place, spec: Spec, expected: Path, *, done: bool = False) -> Iterator[Finding]:
    """Run the same again: it must end with the expected files (or find them `done`), nothing beside them."""
    ending = end(start_child(spec)) if "no_exchange" in spec else perform(spec)
    if ending["error"] and not (done and "already exists" in ending["message"]):
        yield Fault(f"the same again ended in {ending['error']}: {ending.get('message')}")
    if digests(place.work / "out") != whole(expected):
        yield Fault("the same again did not make the destination what it has to be")
    if left := beside(place.work / "out"):
        yield Fault(f"the same again left {left} beside the destination")
    if digests(place.shared / "source") != whole(place.shared / "source"):
        yield Fault("the source changed")
    if ending.get("reused"):
        yield Seen("went on from there")


def cancel_after(calls: int) -> dict[str, object]:
    """A progress callback that says stop at its n-th call."""
    left = iter(range(calls))
    return {"progress": lambda _: next(left, None) is not None}


def _begin(place: Place, how: str, dtype: str | None) -> Spec:
    """Bring about what the killed run finds, and say what it is to do."""
    spec = spec_of(place, dtype, **{"no_exchange": True} if "renames" in how else {})
    if "overwrite" in how:
        shutil.copytree(place.shared / "old", place.work / "out", copy_function=os.link)
        spec["options"]["overwrite"] = True
    if how in ("resumed", "torn journal"):
        stop = cancel_after(place.dice.randint(3, 36))
        with suppress(Cancelled):
            shard_checkpoint(spec["source"], spec["destination"], **spec["options"], **stop)
    if how == "torn journal":
        journal = place.work / ".out.shardkit-journal"
        os.truncate(journal, max(0, journal.stat().st_size - place.dice.randint(1, 60)))
    return spec


def _prepare(shared: Path) -> None:
    make_model(shared)
    profiles = {f"{dtype}, {how}": _profile(shared, how, dtype) for how, dtype in product(_PROFILED, DTYPES)}
    (shared / "profiles.json").write_text(json.dumps(profiles))


def _profile(shared: Path, how: str, dtype: str | None) -> Ending:
    """Let a run end, and tell how long it took and which calls it made."""
    place = Place(shared, shared / "profile", 0, random.Random(0))
    place.work.mkdir()
    profile = end(start_child(_begin(place, how, dtype)))
    shutil.rmtree(place.work)
    return profile


def _killed(place: Place, *, chosen: bool) -> Iterator[Finding]:
    how, dtype = _WAYS[place.number % len(_WAYS)]
    profiled = how if how in _PROFILED else _PROFILED[0]
    profile = json.loads((place.shared / "profiles.json").read_text())[f"{dtype}, {profiled}"]
    spec = _begin(place, how, dtype)
    call = place.dice.choice(sorted(profile["calls"]))
    kill = [call, place.dice.randint(1, profile["calls"][call]), place.dice.choice(["before", "after"])]
    delay = place.dice.uniform(0, 1.2 * profile["seconds"])
    process = start_child(spec | {"kill": kill} if chosen else spec)
    if not chosen:
        time.sleep(delay)
        process.kill()
    ending = end(process)
    where = f"{how}, {dtype}, killed {' '.join(map(str, kill)) if chosen else f'after {delay:.3f} s'}"
    if ending["error"] is None:
        yield Seen("over before")
    elif ending["error"] != "killed":
        yield Fault(f"({where}) ended by itself: {ending}")
    new = place.shared / f"{dtype}"
    done = "overwrite" not in how and digests(place.work / "out") == whole(new)
    yield from told(where, _left(place, how, new))
    yield from told(where, go_on(place, spec, new, done=done))


def _left(place: Place, how: str, new: Path) -> Iterator[Finding]:
    """Judge what a killed run has left at its destination."""
    now, old = digests(place.work / "out"), whole(place.shared / "old")
    if now == whole(new):
        yield Seen("destination new")
    elif "overwrite" not in how:
        yield Seen("destination absent") if now is None else Fault("destination neither absent nor whole")
    elif now == old:
        yield Seen("destination old")
    elif "renames" in how and now is None and digests(place.work / ".out.shardkit-old") == old:
        yield Seen("old one aside")
    else:
        yield Fault("destination neither the old one nor the new one")


RANDOM = Kind("SIGKILL at a random instant", partial(_killed, chosen=False), 200, 12, _prepare)
CHOSEN = Kind("SIGKILL at a chosen system call", partial(_killed, chosen=True), 400, 8, _prepare)
