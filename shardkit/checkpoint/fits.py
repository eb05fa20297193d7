"""Whether a model fits the GPUs and the disks of hosts, and of this machine; and all answers as tables."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

from shardkit.base.machine import Gpus, free_bytes, gpus, usable_memory
from shardkit.base.record import Table, listed
from shardkit.base.sizes import format_size
from shardkit.checkpoint.hosts import (
    BUDGET,
    HERE,
    HOSTS,
    TOO_SLOW_SECONDS,
    USABLE_SHARE,
    HostFit,
    Need,
    Ways,
    fit,
    memory_limits,
)
from shardkit.checkpoint.loaded import LoadedTensor
from shardkit.checkpoint.parts import Part, part_of
from shardkit.checkpoint.quantized import Packing

# Of each GPU, what CUDA and torch's kernels take before any weight: as the documentation of transformers
# measures it (1,343 MB; https://huggingface.co/docs/transformers/v4.49.0/model_memory_anatomy).
CUDA_BYTES = 1_343_000_000
_TIGHT = 0.05  # a share of a GPU that longer prompts may take
# From which compute capability GPUs calculate in bfloat16: earlier ones emulate it.
_BFLOAT16 = 8.0
_HALVED = {"float64": "float32", "float32": "float16"}


@dataclass(frozen=True)
class DiskFit:
    """Whether a model's files fit the disk of a host, and its shards beside them.

    Attributes
    ----------
    name, free_bytes
        The host, and what its disk has free; None where that is not stated.
    verdict
        "download and shards fit"; "download fits, shards beside it do not"; "shards fit, the download does
        not"; "does not fit"; "not stated".
    advice
        What would help; empty where nothing has to, or is known to.
    seen
        Where, and when, the host's figures were stated.
    """

    name: str
    free_bytes: int | None
    verdict: str
    advice: str = ""
    seen: str = ""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model, and the dtype that it is loaded in.

    Attributes
    ----------
    loaded_bytes, cache_bytes, block_bytes
        In that dtype: all weights; keys and values; the largest block.
    file_bytes, shard_bytes
        On disk: its files, and shards in that dtype.
    is_here
        Whether its files are on this machine already.
    packed_bytes, packed_capability
        Weights as stored, and the compute capability of GPUs that need not unpack them; None: nobody does.
    """

    dtype: str | None
    loaded_bytes: int
    cache_bytes: int
    block_bytes: int
    file_bytes: int
    shard_bytes: int
    is_here: bool = False
    packed_bytes: int = 0
    packed_capability: float | None = None

    @classmethod
    def of(
        cls,
        loaded: Iterable[LoadedTensor],
        dtype: str | None,
        cache_bytes: int,
        side_bytes: int,
        is_here: bool,
        packing: Packing | None = None,
    ) -> Self:
        """Return the sizes of a model, with files beside its weights, whose tensors are loaded in a dtype."""
        files = shards = side_bytes
        blocks: Counter[Part] = Counter()
        for tensor in loaded:
            stored = tensor.stored
            files += 0 if tensor.is_alias else stored.nbytes
            shards += tensor.in_shards(str(dtype)).stored.nbytes
            if tensor.converted or not tensor.is_alias:
                blocks[part_of(stored.name)] += tensor.nbytes
        largest, runs_on = max(blocks.values(), default=0), packing.capability if packing else None
        total, packed = blocks.total(), files - side_bytes
        return cls(dtype, total, cache_bytes, largest, files, shards, is_here, packed, runs_on)


def explained(
    hosts: Sequence[HostFit],
    on_gpus: Sequence[HostFit],
    on_disks: Iterable[DiskFit],
    sizes: Sizes | None,
    tokens: str,
) -> Iterator[tuple[str, str]]:
    """Yield what the words of the tables mean, of those that are there."""
    ways = [way for host in hosts for way in host.ways] if _is_needed(hosts) else []
    if any(way.read_bytes for way in ways):
        yield "reads N GB", "fits, and each token reads that much from disk again"
    if any(way.is_slow for way in ways):
        yield "too slow", f"more than {TOO_SLOW_SECONDS} s of reading for each token"
    if any(way.name == BUDGET for way in ways):
        share = f"{USABLE_SHARE:.0%}".replace("%", " %")
        yield BUDGET, f"load_model(max_memory=...) with {share} of a host's memory ({tokens})"
    if ways and all(way.read_bytes is None for way in ways):
        yield "would help", "a smaller or a quantized model, or more memory than these hosts have"
    elif too_small := [disk.name for disk in on_disks if disk.verdict == "does not fit"]:
        yield "no disk for it", f"{listed(too_small)}: whatever their memory, see below"
    if on_gpus and sizes:
        cache = f" and {format_size(sizes.cache_bytes)} of KV cache ({tokens})" * bool(sizes.cache_bytes)
        yield "on GPUs", f"weights{cache} in what CUDA leaves of their memory"


def fit_memory(elsewhere: Need, here: Need, ways: Ways) -> Iterator[HostFit]:
    """Yield whether a load fits what is left of this machine's memory, and the hosts'."""
    if (left := usable_memory()) is not None:
        yield fit(HERE, left, here, ways)
    for name, memory in memory_limits().items():
        yield replace(fit(name, memory, elsewhere, ways), seen=HOSTS[name].seen)


def fit_gpus(sizes: Sizes) -> Iterator[HostFit]:
    """Yield whether weights, keys and values fit the GPUs of this machine, and those of hosts."""
    for name, found in gpus().items():
        yield _fit_gpus(f"{HERE}: {name}", found, sizes, usable_memory())
    for name, host in HOSTS.items():
        if host.gpus:
            yield replace(_fit_gpus(name, host.gpus, sizes, host.memory_bytes), seen=host.seen)


def _fit_gpus(name: str, found: Gpus, sizes: Sizes, memory: int | None) -> HostFit:
    # A block is on one GPU: all but the last may be left with nearly as much as one takes.
    left = found.count * max(0, found.memory_bytes - CUDA_BYTES)
    usable = max(0, left - (found.count - 1) * sizes.block_bytes)
    is_packed = sizes.packed_capability is not None and found.capability >= sizes.packed_capability
    need = (sizes.packed_bytes if is_packed else sizes.loaded_bytes) + sizes.cache_bytes
    dtype = "float16" if sizes.dtype == "bfloat16" and found.capability < _BFLOAT16 else sizes.dtype
    words = f"{format_size(need)} of {format_size(usable)}" + f", in {dtype}" * bool(dtype)
    if 0 <= usable - need < _TIGHT * usable and not sizes.cache_bytes:
        words += f"; {format_size(usable - need)} left for KV cache"
    total = found.count * found.memory_bytes
    made = HostFit(name, total, "fits", words, needed_bytes=need, usable_bytes=usable)
    if need <= usable:
        return made
    over, halved, advice = need - usable, _HALVED.get(dtype or ""), ""
    if halved and need // 2 <= usable:
        advice = f"in {halved}: fits"
    elif memory and over <= USABLE_SHARE * memory and usable > 0:
        advice = f'device_map="auto": {format_size(over)} stay in RAM'
    return replace(made, verdict="does not fit", read_bytes=None, advice=advice)


def fit_disks(sizes: Sizes) -> Iterator[DiskFit]:
    """Yield whether a model's files, and shards beside them, fit what is free here, and on hosts."""
    with suppress(OSError):  # a folder that is gone
        here = replace(sizes, file_bytes=0) if sizes.is_here else sizes
        if (free := free_bytes(".")) < sys.maxsize:
            yield _fit_disk(HERE, free, here)
    seen = set()
    for name, host in HOSTS.items():
        if (key := (name.split()[0], host.disk_bytes)) not in seen:
            seen.add(key)
            yield replace(_fit_disk(name, host.disk_bytes, sizes), seen=host.seen)


def _fit_disk(name: str, free: int | None, sizes: Sizes) -> DiskFit:
    files, shards = sizes.file_bytes, sizes.shard_bytes
    if free is None:
        return DiskFit(name, None, "not stated")
    if files + shards <= free:
        return DiskFit(name, free, "download and shards fit" if files else "shards fit")
    if not files:
        advice = "free_source=True: each source file goes once its shards are there"
        return DiskFit(name, free, "shards do not fit", advice)
    if files <= free:
        verdict, ways = "download fits, shards beside it do not", "stream=True or free_source=True"
    elif shards <= free:
        verdict, ways = "shards fit, the download does not", "stream=True"
    else:
        return DiskFit(name, free, "does not fit")
    return DiskFit(name, free, verdict, f"{ways}: shards in place of the download" * (shards <= free))


def tables(hosts: Sequence[HostFit], on_gpus: Iterable[HostFit], disks: Iterable[DiskFit]) -> Iterator[Table]:
    """Yield a table for each question that has an answer; ways that come to the same are in one column."""
    if hosts:
        columns: dict[tuple[str, ...], list[str]] = {}
        shown = None if _is_needed(hosts) else 1
        for ways in zip(*(host.ways[:shown] for host in hosts), strict=True):
            columns.setdefault(tuple(way.short for way in ways), []).append(ways[0].name)
        names = [", ".join(called) for called in columns.values()]
        cells = zip(*columns, strict=True)
        rows = [(_named(h), format_size(h.memory_bytes), *c) for h, c in zip(hosts, cells, strict=True)]
        yield Table(("on the CPU", "memory", *names), tuple(rows))
    answers = [(f, format_size(f.memory_bytes), f"{f.verdict}: {f.why}") for f in on_gpus]
    yield from _with_advice(("on GPUs", "memory"), answers)
    sizes = ((f, "-" if f.free_bytes is None else format_size(f.free_bytes)) for f in disks)
    yield from _with_advice(("on disk", "free"), [(f, size, f.verdict) for f, size in sizes])


def _is_needed(hosts: Iterable[HostFit]) -> bool:
    """Whether a host needs another way than the one that was requested."""
    return any(host.read_bytes != 0 for host in hosts)


def _with_advice(
    columns: tuple[str, str], answers: Iterable[tuple[HostFit | DiskFit, str, str]]
) -> Iterator[Table]:
    rows = [(_named(found), size, verdict, found.advice) for found, size, verdict in answers]
    shown = None if any(row[-1] for row in rows) else -1  # no column that is empty
    if rows:
        yield Table((*columns, "verdict", "what would help")[:shown], tuple(row[:shown] for row in rows))


def _named(found: HostFit | DiskFit) -> str:
    return found.name.replace(HERE, f"{HERE} (free)")
