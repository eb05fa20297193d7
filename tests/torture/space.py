"""A disk that fills up, a real one and system calls that say so: no destination, one clear line."""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, count
from pathlib import Path

from shardkit.base.errors import SpaceError
from shardkit.shard.engine import shard_checkpoint
from tests.torture.bench import Fault, Finding, Kind, Place, Seen, digests, mounted, told
from tests.torture.child import Spec, end, start_child
from tests.torture.kills import DTYPES, go_on, make_model, spec_of, whole

_PAGE, _SLACK = 4096, 4 << 20
_SHIFTS = (0, -_PAGE, _PAGE, -500_000)  # at a boundary, just before and after it, in the middle of a shard
_CALLS = ("copy_file_range", "pwrite", "fsync", "truncate", "mkdir", "sendfile")


def _cuts(expected: Path) -> list[int]:
    """How many bytes there is room for: about each boundary between the files, in order of writing."""
    files = sorted(expected.rglob("*"), key=lambda file: (file.suffix != ".safetensors", file.name))
    ends = accumulate(-(-file.stat().st_size // _PAGE) * _PAGE for file in files)
    needed = sum(file.stat().st_size for file in files)
    return sorted({end + shift for end in ends for shift in _SHIFTS if 0 < end + shift < needed})


def _fill(disk: Path, room: int) -> None:
    """Leave so many bytes free."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, max(1, free.f_bavail * free.f_bsize - room))


def _refusal(spec: Spec, **more: Callable[..., object]) -> str:
    try:
        shard_checkpoint(spec["source"], spec["destination"], **spec["options"], **more)
    except SpaceError as error:
        return str(error)
    return "done"


def _full(place: Place, *, meanwhile: bool) -> Iterator[Finding]:
    """Fill the disk before the run, or just after it has looked how much is free."""
    dtype = DTYPES[place.number % 2]
    expected = place.shared / f"{dtype}"
    cuts = _cuts(expected)
    room = cuts[place.number * 37 // 2 % len(cuts)] if meanwhile or place.number else 0
    size = sum(file.stat().st_size + _PAGE for file in expected.iterdir()) + _SLACK
    with mounted(place.work / "disk", "-t", "tmpfs", "-o", f"size={size}", "none") as disk:
        inside = place._replace(work=disk)
        spec, calls, where = spec_of(inside, dtype), count(), f"{dtype}, room for {room:,} bytes"
        spec["options"]["workers"] = 1 + place.number % 3
        if meanwhile:
            message = _refusal(spec, progress=lambda _: next(calls) or _fill(disk, room))
        else:
            _fill(disk, room)
            message = _refusal(spec)
        if not re.search(r"free another [\d,]+ bytes", message):
            yield Fault(f"({where}) said {message!r}")
        if (disk / "out").exists() or (not meanwhile and list(disk.rglob("*.safetensors"))):
            yield Fault(f"({where}) wrote something all the same")
        (disk / "filler").unlink()
        yield from told(where, go_on(inside, spec, expected))


def _failing_call(place: Place) -> Iterator[Finding]:
    dtype, call = DTYPES[place.number % 2], _CALLS[place.number // 2 % len(_CALLS)]
    spec, expected = spec_of(place, dtype), place.shared / f"{dtype}"
    first = 1 + place.dice.choice([0, 1, 2, place.dice.randrange(40)])
    fail = [call, first, place.dice.choice(["ENOSPC", "EDQUOT"])]
    ending = end(start_child(spec | {"fail": [fail]}))
    published = (place.work / "out").exists()
    if ending["error"] is None:
        yield Seen("never called so often")
    elif ending["error"] != "SpaceError" or "free another" not in ending["message"]:
        yield Fault(f"({dtype}, {fail}) ended in {ending['error']}: {ending.get('message')}")
    if published and digests(place.work / "out") != whole(expected):
        yield Fault(f"({dtype}, {fail}) left a destination that is not whole")
    yield from told(f"{dtype}, {fail}", go_on(place, spec, expected, done=published))


BEFORE = Kind("disk too small from the start", partial(_full, meanwhile=False), 60, 4, make_model)
MEANWHILE = Kind(
    "disk full at and about file boundaries", partial(_full, meanwhile=True), 300, 16, make_model
)
CALLS = Kind("system calls that say the disk is full", _failing_call, 120, 12, make_model)
