"""What hosts give a notebook, and whether a load fits there, or on this machine, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from shardkit.base.machine import Gpus
from shardkit.base.sizes import format_size
from shardkit.checkpoint.bounded import BoundedEstimate, about_seconds


class Host(NamedTuple):
    """What a host gives a notebook, in bytes: RAM, disk that is free at first, GPUs; None: not stated.

    `seen` is where, and when, that was stated, or recorded by a run.
    """

    memory_bytes: int | None
    disk_bytes: int | None = None
    gpus: Gpus | None = None
    seen: str = ""


_HUB, _WANDB = "https://huggingface.co", "tree/main/wandb"
_KAGGLE = "https://www.kaggle.com/docs/notebooks (20 GB are those of /kaggle/working), 2026-11"
_BINDER = "https://mybinder.readthedocs.io/en/latest/about/user-guidelines.html, 2026-11"
_KAGGLE_GPU = f"{_KAGGLE}; {_HUB}/dataautogpt3/ProteusV0.2/discussions/7"  # where 29 GB are seen
_T4 = 16_106_127_360
# fmt: off
HOSTS = {
    "Colab": Host(12_700_000_000, 81_900_000_000, None,
                  f"{_HUB}/Gyaneshere/my_awesome_mind_model/commit/1df4a90, 2025-02"),
    "Colab T4": Host(12_700_000_000, 55_200_000_000, Gpus(1, _T4, 7.5),
                     f"{_HUB}/Kinjal123/content/{_WANDB}, 2024-02"),
    "Colab L4 (paid)": Host(None, None, Gpus(1, 24_150_000_000, 8.9),
                            f"{_HUB}/kmd2525/llm-jp-3-13b-it-r64-ichikara-fix/commit/2fa7c17, read 2026-11"),
    "Kaggle": Host(30_000_000_000, 20_000_000_000, None, _KAGGLE),
    "Kaggle T4 x2": Host(29_000_000_000, 20_000_000_000, Gpus(2, _T4, 7.5),
                         f"{_KAGGLE_GPU}; {_HUB}/Femboyuwu2000/working/{_WANDB}, 2024-04"),
    "Kaggle P100": Host(29_000_000_000, 20_000_000_000, Gpus(1, 17_071_734_784, 6.0),
                        f"{_KAGGLE_GPU}; {_HUB}/mingsung/working/{_WANDB}, 2023-11"),
    "Binder": Host(2_000_000_000, None, None, _BINDER),
}
# fmt: on
# The process that watches the load needs some memory as well.
USABLE_SHARE = 0.9
HERE, BUDGET = "this machine", "in a budget"
# A model is of no use to anybody who waits longer than this for each token.
TOO_SLOW_SECONDS = 30


def memory_limits() -> dict[str, int]:
    """Return the RAM of each host without a GPU, in bytes."""
    return {name: host.memory_bytes for name, host in HOSTS.items() if host.memory_bytes and not host.gpus}


@dataclass(frozen=True)
class WayFit:
    """What one way to load a model comes to on a host.

    Attributes
    ----------
    name
        "in float16", "as stored", "shards" (in the dtype requested), "in a budget".
    needed_bytes
        Memory that cannot be evicted.
    read_bytes
        What each token reads from disk again: 0 where all weights stay, None where the load does not fit.
    seconds_per_token
        How long that reading takes; None where no rate of the disk is known, or nothing is read.
    """

    name: str
    needed_bytes: int
    read_bytes: int | None
    seconds_per_token: float | None = None

    @property
    def is_slow(self) -> bool:
        """Whether nobody would wait for it, as far as that is known."""
        return (self.seconds_per_token or 0) > TOO_SLOW_SECONDS

    @property
    def verdict(self) -> str:
        """Whether it fits, and what that costs for each token."""
        if not self.read_bytes:
            return "does not fit" if self.read_bytes is None else "fits"
        words = f"each token reads {format_size(self.read_bytes)} from disk"
        seconds = f", about {about_seconds(self.seconds_per_token)}" if self.seconds_per_token else ""
        return f"{'too slow to use: ' if self.is_slow else 'fits, '}{words}{seconds}"

    @property
    def short(self) -> str:
        """The verdict in a word or two, for a column of them."""
        if not self.read_bytes:
            return f"needs {format_size(self.needed_bytes)}" if self.read_bytes is None else "fits"
        seconds = f", {about_seconds(self.seconds_per_token)}" if self.seconds_per_token else ""
        return ("too slow" if self.is_slow else f"reads {format_size(self.read_bytes)}") + seconds


@dataclass(frozen=True)
class HostFit:
    """Whether a load fits a host, in RAM or on its GPUs, and what would help.

    Attributes
    ----------
    name, memory_bytes
        The host, and its memory; of this machine, what was left when the estimate was made.
    needed_bytes, usable_bytes
        What the load needs there (in RAM, what cannot be evicted), and what of that memory it can have.
    verdict, why
        "fits"; "fits, each token reads 14.2 GB from disk, about 12 s"; "too slow to use: " and the same, of
        more than 30 s; "does not fit"; and the reason for it.
    read_bytes
        As `WayFit` has it, of a load as it was requested.
    bounded_read_bytes
        The same for a load within a budget of all memory that is usable there; None where there is none, or
        its figures are not known.
    advice
        What would help; empty where nothing has to, or is known to.
    ways
        The requested way, and others; on GPUs none.
    seen
        Where, and when, the host's figures were stated.
    """

    name: str
    memory_bytes: int
    verdict: str
    why: str
    read_bytes: int | None = 0
    bounded_read_bytes: int | None = None
    advice: str = ""
    ways: tuple[WayFit, ...] = ()
    seen: str = ""
    needed_bytes: int = 0
    usable_bytes: int = 0


class Need(NamedTuple):
    """Memory of a plain load, beside files and for pages of them; and what of those each token uses."""

    anonymous_bytes: int
    mapped_bytes: int
    token_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory in which all of it stays."""
        return self.anonymous_bytes + self.mapped_bytes


class DiskRate(NamedTuple):
    """Bytes that a disk gives a second: stated, of any disk; or measured, of this machine's alone."""

    nbytes: int
    is_measured: bool


@dataclass(frozen=True)
class Ways:
    """Ways to load a model: what the requested one is called, others by name, and within a budget."""

    requested: str = "as stored"
    others: Mapping[str, Need] = field(default_factory=dict)
    within: Callable[[int], BoundedEstimate] | None = None
    disk_rate: DiskRate | None = None


def fit(name: str, memory: int, need: Need, ways: Ways = Ways()) -> HostFit:
    """Return whether a load fits a host, what each token then reads from disk again, and what would help."""
    usable, rate = int(USABLE_SHARE * memory), ways.disk_rate
    nbytes = rate.nbytes if rate and (name == HERE or not rate.is_measured) else None
    plain = {ways.requested: need, **ways.others}
    found = [_way(called, other, usable, nbytes) for called, other in plain.items()]
    bounded = ways.within(usable) if ways.within else None
    if bounded and bounded.smallest_bytes:
        read = bounded.plan.streamed_bytes if bounded.plan else None
        seconds = read / nbytes if read and nbytes else None
        found.append(WayFit(BUDGET, bounded.smallest_bytes, read, seconds))
    asked, last = found[0], found[-1]
    made = HostFit(name, memory, asked.verdict, "all weights stay in memory", asked.read_bytes)
    made = replace(made, ways=tuple(found), needed_bytes=need.anonymous_bytes, usable_bytes=usable)
    if asked.read_bytes == 0:
        return made
    why = f"needs {format_size(need.anonymous_bytes)}, about {format_size(usable)} available"
    if asked.read_bytes:
        why = f"{format_size(need.total_bytes)} in use, about {format_size(usable)} stay in memory"
    read = last.read_bytes if last.name == BUDGET else None
    return replace(made, why=why, bounded_read_bytes=read, advice="; ".join(_advice(usable, found)))


def _way(name: str, need: Need, usable: int, rate: int | None) -> WayFit:
    if need.anonymous_bytes > usable:
        return WayFit(name, need.anonymous_bytes, None)
    read = 0 if need.total_bytes <= usable else need.token_bytes
    return WayFit(name, need.anonymous_bytes, read, read / rate if read and rate else None)


def _advice(usable: int, ways: Sequence[WayFit]) -> Iterator[str]:
    """Yield what would help where the first of some ways does not fit, or reads."""
    asked, *others = ways
    alike: dict[str, list[str]] = {}
    for way in others:
        if way.read_bytes is not None and (asked.read_bytes is None or way.read_bytes < asked.read_bytes):
            words = f"load_model(max_memory=...) with {format_size(usable)}"
            alike.setdefault(way.verdict, []).append(words if way.name == BUDGET else way.name)
    if "fits" in alike:
        alike = {"fits": alike["fits"]}
    for verdict, names in alike.items():
        yield f"{' or '.join(names)}: {verdict}"
    if not alike and others and others[-1].name == BUDGET:
        yield f"load_model(max_memory=...) needs at least {format_size(others[-1].needed_bytes)}"
