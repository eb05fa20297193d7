"""SIGKILL while the source is freed: it and the shards hold every tensor together; the next run ends it."""

import json
import shutil
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen, beside, digests, told
from tests.torture.child import Ending, Spec, end, perform, start_child
from tests.torture.kills import DTYPES, LIMIT, make_model, whole

_CALLS = ("truncate", "fsync", "unlink", "rename", "mkdir", "copy_file_range", "pwrite")
_WAYS = tuple(product(DTYPES, ("at an instant", "at a call"), ("once", "twice")))


def held_bytes(*folders: Path) -> int:
    """What the disk has given to all files in folders."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_blocks * 512 for path in files)


def tensors_in(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and end of each tensor of a safetensors file, counted from its start."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    return {n: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for n, e in header.items()}


def lost(original: Path, source: Path, out: Path, expected: Path) -> set[str]:
    """Tensors of `original` that neither `source`, a copy that is being freed, nor a finished shard holds."""
    shards = out if out.exists() else out.parent / f".{out.name}.shardkit-staging"
    saved: set[str] = set()
    for made in expected.glob("*.safetensors"):
        if (shard := shards / made.name).exists() and shard.read_bytes() == made.read_bytes():
            saved |= tensors_in(made).keys()
    names: set[str] = set()
    for file in original.glob("*.safetensors"):
        was = file.read_bytes()
        now = (source / file.name).read_bytes() if (source / file.name).exists() else b""
        places = tensors_in(file)
        names |= places.keys()
        saved |= {name for name, (a, b) in places.items() if len(now) >= b and now[a:b] == was[a:b]}
    return names - saved


def _prepare(shared: Path) -> None:
    make_model(shared)
    profiles = {}
    for dtype in DTYPES:
        (shared / "profile").mkdir()
        profiles[f"{dtype}"] = _profile(shared, shared / "profile", dtype)
        shutil.rmtree(shared / "profile")
    (shared / "profiles.json").write_text(json.dumps(profiles))


def _spec(shared: Path, work: Path, dtype: str | None) -> Spec:
    shutil.copytree(shared / "source", work / "source")
    options = {"max_shard_size": LIMIT, "dtype": dtype, "free_source": True}
    return {"source": str(work / "source"), "destination": str(work / "out"), "options": options}


def _profile(shared: Path, work: Path, dtype: str | None) -> Ending:
    profile = end(start_child(_spec(shared, work, dtype)))
    assert profile["error"] is None, profile
    return profile


def _freed(place: Place) -> Iterator[Finding]:
    dtype, how, times = _WAYS[place.number % len(_WAYS)]
    profile = json.loads((place.shared / "profiles.json").read_text())[f"{dtype}"]
    spec, expected = _spec(place.shared, place.work, dtype), place.shared / f"{dtype}"
    for again in range(1 + (times == "twice")):
        call = place.dice.choice([call for call in _CALLS if profile["calls"].get(call)])
        kill = [call, place.dice.randint(1, profile["calls"][call]), place.dice.choice(["before", "after"])]
        delay = place.dice.uniform(0, 1.1 * profile["seconds"])
        process = start_child(spec | ({"kill": kill} if how == "at a call" else {}))
        if how == "at an instant":
            time.sleep(delay)
            process.kill()
        ending = end(process)
        where = (
            f"{dtype}, killed {' '.join(map(str, kill)) if how == 'at a call' else f'after {delay:.3f} s'}"
        )
        if ending["error"] not in (None, "killed") and not (again and (place.work / "out").exists()):
            yield Fault(f"({where}) ended by itself: {ending}")
        yield from told(where, _judged(place, expected))
    yield from told(where, _resumed(place, spec, expected))


def _judged(place: Place, expected: Path) -> Iterator[Finding]:
    """Judge what is left: every tensor, on a disk that was never much fuller than before."""
    original, source, out = place.shared / "source", place.work / "source", place.work / "out"
    if gone := lost(original, source, out, expected):
        yield Fault(f"{len(gone)} tensors are nowhere: {sorted(gone)[:3]}")
    if out.exists() and digests(out) != whole(expected):
        yield Fault("the destination is there, and is not whole")
    left = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    yield Seen("nothing freed" if left == total else "half freed" if left > total / 9 else "nearly all freed")
    yield Most("times the model on disk", held_bytes(place.work) / held_bytes(original))


def _resumed(place: Place, spec: Spec, expected: Path) -> Iterator[Finding]:
    """Run the same again: it must end with the expected files, and the other files of the source alone."""
    out, source = place.work / "out", place.work / "source"
    was_done = out.exists()
    ending = perform(spec)
    ends = ("already exists", "seems to have finished")
    if ending["error"] and not (was_done and any(words in ending["message"] for words in ends)):
        yield Fault(f"the same again ended in {ending['error']}: {ending.get('message')}")
    if digests(out) != whole(expected):
        yield Fault("the same again did not make the destination what it has to be")
    if left := set(beside(out)) - {"source"}:
        yield Fault(f"the same again left {left} beside the destination")
    kept = {
        name: digest for name, digest in whole(place.shared / "source").items() if "safetensors" not in name
    }
    if digests(source) != kept:
        yield Fault(f"the source is left with {sorted(digests(source))}")
    if ending.get("reused"):
        yield Seen("resumed")


FREED = Kind("SIGKILL while the source is freed", _freed, 280, 8, _prepare)
