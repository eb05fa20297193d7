"""Places and moments that a run does not expect: odd disks and names, huge files, cancels, Ctrl-C."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from shardkit.base.errors import Cancelled, DestinationError
from shardkit.shard.engine import shard_checkpoint
from tests.support import file_bytes
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen, Skip, beside, digests, mounted, told
from tests.torture.child import end, start, start_child
from tests.torture.kills import DTYPES, LIMIT, cancel_after, go_on, make_model, spec_of, whole

_MAIN = """
from tests.unasked import ask_no_models
from shardkit.__main__ import main
ask_no_models()
print("ready", flush=True)
main()
"""
_TMPFS = ("-t", "tmpfs", "-o", "size=200m", "none")
_HOLE = 4_600_000_000
_ERRORS = ("EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EPERM", "EBADF")
_NAMES = ('it\'s "a b"\n$HOME;rm -rf [*]?', "größe 層 🧊", "-v", os.fsdecode(b"\xff\xfe"))


def _odd_names(place: Place) -> Iterator[Finding]:
    """Names with all that a file system allows, through the command line and back."""
    for name in _NAMES:
        source, out = place.work / name / "source", place.work / name / f"out{name}"
        source.parent.mkdir()
        source.symlink_to(place.shared / "source")
        shard = ["shard", source, out, "--max-shard-size", LIMIT]
        for words in (shard, ["inspect", out], ["verify", source, out]):
            process = start("-c", _MAIN, *map(os.fspath, words), errors="surrogateescape")
            _, errors = process.communicate(timeout=100)
            if process.returncode:
                yield Fault(f"{words[0]} with {name!r}: {errors.strip().splitlines()[-1:]}")
        if digests(out) != whole(place.shared / "None"):
            yield Fault(f"{name!r} has not the right files")


def _read_only_source(place: Place) -> Iterator[Finding]:
    with mounted(place.work / "ro", "-o", "bind,ro", str(place.shared / "source")) as source:
        inside = place._replace(work=place.work / "inside")
        inside.work.mkdir()
        yield from go_on(inside, spec_of(inside, None) | {"source": str(source)}, place.shared / "None")


def _across_disks(place: Place) -> Iterator[Finding]:
    with mounted(place.work / "disk", *_TMPFS) as disk:
        there = place._replace(work=disk)
        yield from go_on(there, spec_of(there, None), place.shared / "None")
        for dtype in DTYPES:
            here = place._replace(work=place.work / f"{dtype}")
            here.work.mkdir()
            spec = spec_of(here, dtype) | {"source": str(disk / "out")}
            yield from go_on(here, spec, place.shared / f"{dtype}")


def _mount_point(place: Place) -> Iterator[Finding]:
    with mounted(place.work / "out", *_TMPFS) as out:
        yield from _refused(place, out, "mount")


def _read_only_destination(place: Place) -> Iterator[Finding]:
    with mounted(place.work / "disk", "-o", "ro", *_TMPFS) as disk:
        yield from _refused(place, disk / "out", "Read-only")
        yield from _refused(place, disk / "made" / "out", "Read-only")


def _refused(place: Place, out: Path, because: str) -> Iterator[Finding]:
    try:
        shard_checkpoint(place.shared / "source", out)
        yield Fault(f"{out} was not refused")
    except DestinationError as error:
        if because.lower() not in str(error).lower():
            yield Fault(f"the refusal does not say {because}: {error}")
    if left := list(place.work.rglob(".*")):
        yield Fault(f"left {left}")


def _umask(place: Place) -> Iterator[Finding]:
    before = os.umask(0o027)
    try:
        yield from go_on(place, spec_of(place, "float16"), place.shared / "float16")
    finally:
        os.umask(before)
    for path in (place.work / "out", *(place.work / "out").rglob("*")):
        if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640):
            yield Fault(f"{path.name} has the rights {path.stat().st_mode & 0o777:o}")


def _over_four_gigabytes(place: Place) -> Iterator[Finding]:
    """A hole for a tensor, then others, beyond byte 2**32 of source and destination: these are read back."""
    disk = os.statvfs(place.work)
    if disk.f_bavail * disk.f_frsize < 12_000_000_000:
        raise Skip("less than 12 GB free")
    sizes = [_HOLE, *range(100_000, 100_020)]
    data, header, at = random.Random(0).randbytes(sum(sizes) - _HOLE), {}, 0
    for number, size in enumerate(sizes):
        header[f"{number:02d}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at := at + size]}
    with (place.work / "model.safetensors").open("wb") as file:
        file.write(file_bytes(header))
        file.seek(_HOLE, os.SEEK_CUR)
        file.write(data)
    for limit in ("1GB", "8GB"):
        out = place.work / limit
        report = shard_checkpoint(place.work / "model.safetensors", out, max_shard_size=limit, verify=False)
        with (out / max(report.files)).open("rb") as file:
            file.seek(-len(data), os.SEEK_END)
            if file.read() != data:
                yield Fault(f"with {limit} a file, what lies beyond 4 GB is wrong")
        for file in out.iterdir():
            file.unlink()


_PLACES = (
    _odd_names, _read_only_source, _across_disks, _mount_point, _read_only_destination, _umask,
    _over_four_gigabytes,
)  # fmt: skip


def _placed(place: Place) -> Iterator[Finding]:
    yield from told(_PLACES[place.number].__name__, _PLACES[place.number](place))


def _fallback(place: Place) -> Iterator[Finding]:
    """Let the kernel refuse to copy, at once or in the middle, by one way or by both."""
    code, (first, second) = _ERRORS[place.number % 6], [(1, 0), (1, 1), (9, 0), (9, 3)][place.number // 6 % 4]
    fail = [["copy_file_range", first, code], *[["sendfile", second, code]] * bool(second)]
    ending = end(start_child(spec_of(place, None, fail=fail)))
    if ending["error"] or digests(place.work / "out") != whole(place.shared / "None"):
        yield Fault(f"({fail}) ended in {ending}")


def _cancelled(place: Place) -> Iterator[Finding]:
    """Say stop at the n-th call of the progress callback, for each n that there is."""
    dtype, calls = DTYPES[place.number % 2], place.number // 2
    spec = spec_of(place, dtype)
    try:
        shard_checkpoint(spec["source"], spec["destination"], **spec["options"], **cancel_after(calls))
        yield Seen("over before")
    except Cancelled:
        if (place.work / "out").exists():
            yield Fault(f"cancelled at call {calls}, and yet there is a destination")
    yield from go_on(place, spec, place.shared / f"{dtype}", done=(place.work / "out").exists())


def _interrupted(place: Place) -> Iterator[Finding]:
    """Press Ctrl-C at any instant of `shardkit shard`."""
    dtype, delay = DTYPES[place.number % 2], place.dice.uniform(0, 0.9)
    words = ["shard", f"{place.shared / 'source'}", f"{place.work / 'out'}", "--max-shard-size", LIMIT]
    process = start("-c", _MAIN, *words, *(["--dtype", dtype] if dtype else []))
    if place.number % 4 > 1:  # not while it imports: while it works
        delay /= 3
        while process.poll() is None and not beside(place.work / "out"):
            time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    sent = time.perf_counter()
    _, errors = process.communicate(timeout=100)
    yield Most("s to stop", time.perf_counter() - sent)
    yield Seen("over before" if process.returncode == 0 else "stopped")
    # A signal in the interpreter's last moments, after our last line, ends it as a shell shows by 130, too.
    if process.returncode not in (0, 130, -signal.SIGINT) or "Traceback" in errors:
        yield Fault(
            f"after {delay:.3f} s: exit status {process.returncode}: {' '.join(errors.split())[-200:]}"
        )
    yield from go_on(
        place, spec_of(place, dtype), place.shared / f"{dtype}", done=(place.work / "out").exists()
    )


ODD = Kind("odd disks, names, rights, 5 GB", _placed, len(_PLACES), len(_PLACES) - 1, make_model)
FALLBACKS = Kind("kernels that cannot copy", _fallback, 24, 6, make_model)
CANCELS = Kind("cancels at each progress call", _cancelled, 90, 12, make_model)
INTERRUPTS = Kind("Ctrl-C at a random instant", _interrupted, 60, 6, make_model)
