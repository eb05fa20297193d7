"""How trials are run: numbered, seeded, many at once, each in a folder of its own, counted and cleaned up."""

import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Self

import xxhash

from tests.unasked import ask_no_models


class Fault(str):
    """What went wrong, in words."""


class Seen(str):
    """Something worth counting, such as how far a run had come when it was killed."""


class Most(NamedTuple):
    """A figure of which the largest is shown: seconds, megabytes."""

    label: str
    value: float


class Skip(Exception):  # noqa: N818  no error
    """The machine does not allow this trial."""


class Place(NamedTuple):
    """Where a trial works: what its kind shares, a folder of its own, its number, its dice."""

    shared: Path
    work: Path
    number: int
    dice: random.Random


Finding = Fault | Seen | Most
Trial = Callable[[Place], Iterator[Finding]]


class Kind(NamedTuple):
    """A kind of trial; how many make it up, in full and in the suite; how to make what they share.

    A trial that takes longer than `seconds` counts as hung, and its process is killed.
    """

    what: str
    trial: Trial
    full: int
    suite: int
    prepare: Callable[[Path], None] | None = None
    workers: int | None = None  # how many trials at once, where they would disturb each other
    seconds: int = 200  # then a trial counts as hung, and its process is killed
    tolerated: int = 0  # faults that chance alone may bring


@dataclass
class Outcome:
    """What came of the trials of a kind."""

    what: str
    tried: int = 0
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    most: dict[str, float] = field(default_factory=dict)
    tolerated: int = 0

    def add(self, findings: list[Finding], again: str) -> None:
        """Take in the findings of one trial; `again` is the command that repeats it."""
        self.tried += 1
        for finding in findings:
            if isinstance(finding, Fault):
                self.faults.append(f"{again}: {finding}")
            elif isinstance(finding, Seen):
                self.counts[str(finding)] += 1
            else:
                self.most[finding.label] = max(finding.value, self.most.get(finding.label, 0.0))

    @property
    def note(self) -> str:
        """What was counted and measured."""
        counts = [f"{count:,} {label}" for label, count in sorted(self.counts.items())]
        return ", ".join([*counts, *(f"at most {value:.3g} {label}" for label, value in self.most.items())])


class Bench:
    """Worker processes, and the folders in which trials work; all gone when the block ends."""

    def __init__(self, base: Path | None = None, workers: int | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="torture-", dir=base)).resolve()
        self._shared: dict[object, Path] = {}
        self._workers = workers or len(os.sched_getaffinity(0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in (mount for mount in mounts if mount.startswith(f"{self._folder}/")):
            subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, name: str, kind: Kind, numbers: range, seed: int = 0) -> Outcome:
        """Run trials by number, a few at once."""
        outcome, shared = Outcome(kind.what, tolerated=kind.tolerated), self._prepared(kind.prepare)
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "shardkit.shard.engine", "shardkit.formats.cast"])
        step = max(1, min(100, len(numbers) // (8 * self._workers)))
        one = partial(_one, kind, f"{seed}/{name}", shared)
        with ProcessPoolExecutor(kind.workers or self._workers, context, ask_no_models) as pool:
            results = pool.map(one, numbers, chunksize=step)
            for number in numbers:
                again = f"python -m tests.torture {name} --seed {seed} --trial {number}"
                try:
                    outcome.add(next(results), again)
                except BrokenProcessPool:
                    outcome.add([Fault(f"its process hung or died, or in the {step} trials after it")], again)
                    break
                except KeyboardInterrupt:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return outcome

    def _prepared(self, prepare: Callable[[Path], None] | None) -> Path:
        if prepare not in self._shared:
            shared = self._folder / str(len(self._shared))
            shared.mkdir()
            if prepare:
                prepare(shared)
            self._shared[prepare] = shared
        return self._shared[prepare]


def _one(kind: Kind, seed: str, shared: Path, number: int) -> list[Finding]:
    work = shared / f"{seed.partition('/')[2]}-{number}"
    work.mkdir()
    signal.alarm(kind.seconds)
    findings: list[Finding] = []
    try:
        for finding in kind.trial(Place(shared, work, number, random.Random(f"{seed}/{number}"))):
            findings.append(finding)  # noqa: PERF402  one by one: those before an exception are kept
    except Skip as reason:
        findings.append(Seen(f"skipped: {reason}"))
    except Exception as error:
        findings.append(Fault(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    finally:
        signal.alarm(0)
        shutil.rmtree(work, ignore_errors=True)
    return findings


def told(where: object, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Say of each fault where it was found."""
    yield from (Fault(f"({where}) {found}") if isinstance(found, Fault) else found for found in findings)


@contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[Path]:
    """Mount something (``"-t", "tmpfs", "-o", "size=1m", "none"``) for a while."""
    point.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, point], capture_output=True, text=True, check=False)
    if done.returncode:
        if os.environ.get("CI") and os.geteuid() == 0:
            raise AssertionError(f"mounting failed in CI, as root: {done.stderr}")
        raise Skip("mounting is not permitted")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)


def digests(folder: Path) -> dict[str, str] | None:
    """Every file of a folder with a digest of its bytes; None where there is no folder."""
    if not folder.exists():
        return None
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): xxhash.xxh3_128_hexdigest(p.read_bytes()) for p in files}


def beside(folder: Path) -> list[str]:
    """What lies beside a destination."""
    return sorted(entry.name for entry in folder.parent.iterdir() if entry != folder)


@contextmanager
def peak() -> Iterator[list[float]]:
    """Measure by how many MB this process's memory rises inside the block, at its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before, risen = _high_water(), []
    yield risen
    risen.append((_high_water() - before) / 1000)


def _high_water() -> int:
    """VmHWM in KB."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
