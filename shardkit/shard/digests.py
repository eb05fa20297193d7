"""Digests (XXH3, 128 bits) of ranges of bytes, some at once, as each is after its cast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, zip_longest

import xxhash

from shardkit.base.jobs import Crew, ProgressCount, run_all
from shardkit.base.machine import is_here, seen
from shardkit.shard.copy import cast_chunks
from shardkit.shard.tasks import Range, task_bytes

_BATCH_BYTES = 32 << 20
_BATCH_TENSORS = 512


def digest_pairs(pairs: Sequence[tuple[Range, Range | str]], crew: Crew, stage: str) -> list[tuple[str, str]]:
    """Return the digests of ranges of both sides; one that is known stands for itself."""
    seconds = [second for _, second in pairs if isinstance(second, Range)]
    digests = digests_of([[first for first, _ in pairs], seconds], crew, stage)
    return [(digests[a], digests[b] if isinstance(b, Range) else b) for a, b in pairs]


def digests_of(sides: Sequence[Sequence[Range]], crew: Crew, stage: str) -> dict[Range, str]:
    """Return digests of ranges, reading all sides at once: one may be in memory, and the other on a disk."""
    total = sum(part.nbytes for part in chain(*sides))
    count = ProgressCount(crew.progress if total else None, stage, total)
    nbytes = max(_BATCH_BYTES, task_bytes(total, crew))
    batches = filter(None, chain.from_iterable(zip_longest(*(_batches(side, nbytes) for side in sides))))
    digests: dict[Range, str] = {}
    with run_all(partial(seen, digest_ranges), batches, crew.workers, crew.executor) as results:
        for batch, (found, who, _) in results:
            crew.elsewhere.update({who} if not is_here(who) else ())
            digests.update(zip(batch, found, strict=True))
            count.add(sum(part.nbytes for part in batch))
    return digests


def digest_ranges(batch: Sequence[Range]) -> list[str]:
    """Return the XXH3-128 of each range, after its cast."""
    return [digest_range(part) for part in batch]


def digest_range(part: Range) -> str:
    """Return the XXH3-128 of a range, after its cast."""
    digest = xxhash.xxh3_128()
    for chunk, _, _ in cast_chunks(part):
        digest.update(chunk)
    return digest.hexdigest()


def _batches(ranges: Sequence[Range], nbytes: int) -> Iterator[Sequence[Range]]:
    """Yield what is read by one task: small tensors together, large ones alone."""
    first = size = 0
    for end, part in enumerate(ranges, start=1):
        size += part.nbytes
        if size >= nbytes or end - first >= _BATCH_TENSORS or end == len(ranges):
            yield ranges[first:end]
            first, size = end, 0
