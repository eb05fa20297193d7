"""Two runs on one destination: one whole result, one clear refusal; a dead one's lock holds nobody up."""

import time
from collections.abc import Iterator

from tests.torture.bench import Fault, Finding, Kind, Place, Seen, beside, digests, told
from tests.torture.child import Ending, end, start_child
from tests.torture.kills import DTYPES, go_on, make_model, spec_of, whole

_HOWS = ("same call", "other dtype", "stale lock", "holder killed", "overwriting")


def _raced(place: Place) -> Iterator[Finding]:
    how = _HOWS[place.number % len(_HOWS)]
    specs = [spec_of(place, dtype if how == "other dtype" else None, wait=True) for dtype in DTYPES]
    for spec in specs:
        spec["options"]["overwrite"] = how == "overwriting"
    if how == "stale lock":
        (place.work / ".out.shardkit-lock").write_text("process 1 on elsewhere")
    first, second = map(start_child, specs)
    for process in (first, second):
        print("go", file=process.stdin, flush=True)
        time.sleep(place.dice.choice([0.0, place.dice.uniform(0, 0.3)]))
    if how == "holder killed":
        first.kill()
    yield from told(how, _judged(place, how, [end(first), end(second)]))
    if how == "holder killed":
        done = (place.work / "out").exists()
        yield from told(how, go_on(place, specs[1], place.shared / "None", done=done))


def _judged(place: Place, how: str, endings: list[Ending]) -> Iterator[Finding]:
    errors = [ending["error"] for ending in endings]
    written = [whole(place.shared / f"{dtype if how == 'other dtype' else None}") for dtype in DTYPES]
    now = digests(place.work / "out")
    if not any(now == w and e in (None, "killed") for w, e in zip(written, errors, strict=True)):
        yield Fault(f"the destination is not what a run wrote that succeeded: {endings}")
    if errors == [None, None] and how != "overwriting":
        yield Fault("both wrote")
    if not {*errors} <= {None, "DestinationError", "killed" if how == "holder killed" else None}:
        yield Fault(f"ended in {endings}")
    if how != "holder killed" and (left := beside(place.work / "out")):
        yield Fault(f"left {left} beside the destination")
    yield Seen(" and ".join(sorted(error or "done" for error in errors)))


RACES = Kind("two runs at once on one destination", _raced, 50, 6, make_model)
