"""Proof that two checkpoints hold the same tensors, however they are laid out.

Every tensor of both sides is read and digested (XXH3, 128 bits) by itself: the digest depends on its bytes
alone, not on its file, its offset or its neighbours. Where the copy has another floating-point dtype, the
cast is computed again from the source, and the copy has to hold exactly that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, starmap
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from shardkit.base import pages
from shardkit.base.errors import CheckpointError, VerificationError
from shardkit.base.jobs import Crew, ProgressCallback, ProgressCount, worker_count
from shardkit.base.record import listed
from shardkit.checkpoint.belonging import is_needed, named_files
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import read_json
from shardkit.formats.tensor import CAST_DTYPES, DTYPE_NAMES, FLOAT_DTYPES, TensorInfo
from shardkit.load.look import config_differences
from shardkit.load.seen import Ask, ModelKeys, model_keys
from shardkit.plan.plan import PlannedTensor, Shard
from shardkit.shard.destination import sync
from shardkit.shard.digests import digest_pairs, digest_range, digests_of
from shardkit.shard.report import AUTO_DTYPE, Mismatch, Verification
from shardkit.shard.store import Job
from shardkit.shard.tasks import Outcome, Range, file_range, tensor_range
from shardkit.sources.local import LocalFiles, WrittenFiles

_SOON_BYTES = 8_000_000_000  # are copied in about the time that transformers takes to start


def verify_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> Verification:
    """Compare two checkpoints tensor by tensor, reading every byte of both.

    Parameters
    ----------
    source, destination
        Folders, files, addresses or models on the Hub (streamed completely), or open checkpoints. Their
        order matters only after a cast, which is computed from `source`.
    workers, executor
        Threads to read with (default: up to four), or an executor of your own, all of whose workers are used.
    progress
        Called with a `Progress`; returning False stops.

    Returns
    -------
    Verification
        What is equal, what is not, and where it was read from.

    Raises
    ------
    CheckpointError
        If either side cannot be read. That they differ is a result, not an error.

    Examples
    --------
    >>> verify_checkpoint("mistral-demo", "sharded").equal
    True
    """
    crew = Crew(worker_count(workers, executor), executor, progress)
    ours, theirs = (s if isinstance(s, Checkpoint) else Checkpoint.open(s) for s in (source, destination))
    found = _judged(ours, theirs, crew, partial(compare_tensors, ours, theirs, crew))
    if any(side.config is None and os.path.isfile(side.source) for side in (ours, theirs)):
        return found  # of a file alone, what lies beside it is none of its business
    named = named_files(ours.place, ours.config)
    needed = [file for file in ours.side_files if is_needed(file, named)]
    both = [file for file in needed if file in theirs.side_files and file != ours.config_file]
    return replace(
        found,
        missing_files=tuple(file for file in needed if file not in theirs.side_files),
        changed_files=tuple(file for file in both if _is_changed(file, ours, theirs)),
    )


def _is_changed(file: str, ours: Checkpoint, theirs: Checkpoint) -> bool:
    if file.endswith(".json"):  # which tools write in ways of their own
        first, second = ({"": read_json(side.place, file)} for side in (ours, theirs))
        return bool(config_differences(first, second))
    size = ours.side_files[file]
    same_size = size == theirs.side_files[file]
    return not (same_size and is_same_file(ours.place.fetched(file), theirs.place.fetched(file), size))


def is_same_file(first: Path, second: Path, nbytes: int) -> bool:
    """Whether two files of one size have the same content."""
    return digest_range(file_range(first, nbytes)) == digest_range(file_range(second, nbytes))


def _judged(
    ours: Checkpoint,
    theirs: Checkpoint,
    crew: Crew,
    compare: Callable[[], Verification],
    ask: Ask | None = None,
) -> Verification:
    """Compare tensors, ask what a model gets from both sides, and judge which dtype a load chooses."""
    with ExitStack() as stack:
        answer = (ask or stack.enter_context(model_keys(ours)))(theirs)
        found = compare()
        ProgressCount(crew.progress, "model", 0)  # which may take longer than all the bytes
        found = replace(found, model=answer())
    stored = [DTYPE_NAMES[dtype] for dtype in theirs.dtypes if dtype in FLOAT_DTYPES]
    wanted = {ours.auto_dtype, *stored} if found.cast else {ours.auto_dtype}
    if theirs.auto_dtype not in wanted and ours.config is not None:
        words = f"a load chooses {ours.auto_dtype}, but {theirs.auto_dtype} for the copy"
        if found.cast:
            words = f"a load chooses {theirs.auto_dtype} for the copy, which is stored in {', '.join(stored)}"
        return replace(found, mismatches=(*found.mismatches, Mismatch(AUTO_DTYPE, words)))
    return found


def compare_tensors(ours: Checkpoint, theirs: Checkpoint, crew: Crew) -> Verification:
    """Compare the tensors of two checkpoints; as `verify_checkpoint`, which also asks what a model gets."""
    start = time.perf_counter()
    ours.confirm(), theirs.confirm()
    here = [path for side in (ours, theirs) for file in side.files if (path := side.place.path(file))]
    in_memory = pages.mostly_resident(here)
    ranges = {
        t.name: (tensor_range(ours.place, t, copy.dtype), tensor_range(theirs.place, copy, copy.dtype))
        for t, copy in _pairs(ours, theirs)
        if _obstacle(t, copy) is None
    }
    digests = dict(zip(ranges, digest_pairs(list(ranges.values()), crew, "verify"), strict=True))
    for side in (ours, theirs):
        if side.seen and side.place.folder is None and side.has_changed():
            raise CheckpointError("changed while being verified: verify again", file=side.source)
    differ = {
        name: f"bytes: digest {a[:12]} in the source, {b[:12]} in {theirs.tensors[name].file}"
        for name, (a, b) in digests.items()
        if a != b
    }
    finding = _verification(ours, theirs, differ, {name: copy for name, (_, copy) in digests.items()}, start)
    return replace(finding, files=len(here), files_in_memory=None if crew.elsewhere else in_memory)


def _verification(
    ours: Checkpoint, theirs: Checkpoint, differ: dict[str, str], digests: dict[str, str], start: float
) -> Verification:
    pairs = _pairs(ours, theirs)
    obstacles = {tensor.name: why for tensor, copy in pairs if (why := _obstacle(tensor, copy))}
    return Verification(
        source=ours.source,
        destination=theirs.source,
        tensors=len(pairs),
        nbytes=sum(tensor.nbytes for tensor, _ in pairs),
        cast=sum(tensor.dtype != copy.dtype and tensor.name not in obstacles for tensor, copy in pairs),
        mismatches=tuple(starmap(Mismatch, (obstacles | differ).items())),
        missing=tuple(name for name in ours.tensors if name not in theirs.tensors),
        extra=tuple(name for name in theirs.tensors if name not in ours.tensors),
        digests=digests,
        seconds=time.perf_counter() - start,
    )


def _pairs(ours: Checkpoint, theirs: Checkpoint) -> list[tuple[TensorInfo, TensorInfo]]:
    return [(t, theirs.tensors[name]) for name, t in ours.tensors.items() if name in theirs.tensors]


def _obstacle(ours: TensorInfo, theirs: TensorInfo) -> str | None:
    """Return why the bytes need not be compared: they cannot be equal."""
    if ours.shape != theirs.shape:
        return f"shape: {list(ours.shape)} in the source, {list(theirs.shape)} in the destination"
    is_cast = ours.dtype in FLOAT_DTYPES and theirs.dtype in CAST_DTYPES.values()
    if ours.dtype != theirs.dtype and not is_cast:
        names = DTYPE_NAMES[ours.dtype], DTYPE_NAMES[theirs.dtype]
        return "dtype: {} in the source, {} in the destination".format(*names)
    return None


def head_start(job: Job) -> AbstractContextManager[Ask | None]:
    """Start whom to ask what a model gets, while a copy is made that takes about as long as transformers."""
    takes_seconds = job.plan.total_bytes <= _SOON_BYTES and not job.is_received
    return model_keys(job.checkpoint) if job.verify and takes_seconds else nullcontext()


def verify_written(
    job: Job, outcomes: Mapping[str, Outcome], folder: Path, ask: Ask | None = None
) -> Verification:
    """Verify what a job has written in `folder`: against the source, or against what was received of it."""
    checkpoint, crew, copy = job.checkpoint, job.crew, _written(job, folder)
    if not job.is_read_once:
        there = replace(copy, place=WrittenFiles(folder))
        there.seen.update(copy.seen)
        return _judged(checkpoint, copy, crew, partial(compare_tensors, checkpoint, there, crew), ask)

    def compare() -> Verification:
        start = time.perf_counter()
        wrong, _ = altered(job, outcomes, folder, "verify")
        differ = dict.fromkeys(chain(*wrong.values()), "bytes: differ from what was read of the source")
        ranges = {name: tensor_range(copy.place, t, t.dtype) for name, t in copy.tensors.items()}
        found = digests_of([list(ranges.values())], crew, "verify")
        digests = {name: found[part] for name, part in ranges.items()}
        result = _verification(checkpoint, copy, differ, digests, start)
        return replace(result, received=job.is_received, freed=job.free_source)

    return _judged(checkpoint, copy, crew, compare, ask)


def verify_headers(job: Job, folder: Path) -> Verification:
    """Verify as `verify_written`, but for the bytes of tensors, which are not written yet."""
    checkpoint, copy, start = job.checkpoint, _written(job, folder), time.perf_counter()
    return _judged(checkpoint, copy, job.crew, partial(_verification, checkpoint, copy, {}, {}, start))


def _written(job: Job, folder: Path) -> Checkpoint:
    copy, shards = Checkpoint.open(folder), {shard.file for shard in job.plan.shards}
    if set(copy.files) != shards:  # a load would choose weights that came along
        copy = Checkpoint.open(folder / (job.plan.index_file or job.plan.shards[0].file))
    return copy


class Checked(NamedTuple):
    """What reading a shard back has found: its tensors' digests, and how long it took.

    `in_memory` has, for each file that was read, whether it was in memory, as `pages.drop` says.
    """

    digests: Mapping[str, str] = {}
    seconds: float = 0.0
    in_memory: tuple[int | None, ...] = ()


def checked(job: Job, shard: Shard, outcome: Outcome, folder: Path) -> Checked:
    """Read a shard in `folder` back, unless nobody wants that; refuse what is not what it was made of."""
    if not job.verify:
        return Checked()
    start, path = time.perf_counter(), folder / shard.file
    sync(path)
    in_memory = pages.drop([path])
    wrong, digests = altered(replace(job, crew=Crew(1)), {shard.file: outcome}, folder)
    if wrong:
        differs = f"not as in the source: {listed(wrong[shard.file]) or 'its header'}"
        if job.is_received:
            differs = "differs from what was received: the disk may be failing"
        raise VerificationError(f"{path}: {differs}")
    ranges = {t.source.name: shard_range(folder, shard, t) for t in shard.tensors}
    found = {name: digests.get(part) or digest_range(part) for name, part in ranges.items()}
    return Checked(found, time.perf_counter() - start, (in_memory,))


def proof(job: Job, checks: Collection[Checked], destination: str, why_unchecked: str) -> Verification:
    """Return what reading shards back has proven, of which nobody was asked what a model gets."""
    in_memory = [count for check in checks for count in check.in_memory]
    return Verification(
        source=job.checkpoint.source,
        destination=destination,
        tensors=len(job.checkpoint.tensors),
        nbytes=job.checkpoint.total_bytes,
        cast=sum(tensor.is_cast for shard in job.plan.shards for tensor in shard.tensors),
        digests={name: digest for check in checks for name, digest in check.digests.items()},
        seconds=sum(check.seconds for check in checks),
        received=job.is_received,
        model=ModelKeys(why_unchecked=why_unchecked),
        files=len(in_memory),
        files_in_memory=None if None in in_memory else sum(filter(None, in_memory)),
    )


def altered(
    job: Job, outcomes: Mapping[str, Outcome], folder: Path, stage: str = "check"
) -> tuple[dict[str, list[str]], dict[Range, str]]:
    """Return, by shard file in `folder`, the tensors that are not what the source gives, or has given.

    A source that was received, or may be freed, is not read again: every byte is compared with the digest
    taken when it arrived (after its cast), or was proven. What arrived is what the Hub sent for that range of
    that commit; that the Hub sent what it holds rests on the connection: `verify_checkpoint` reads it again.
    The digests of the ranges that were read come second.
    """
    found: dict[str, list[str]] = {}
    checks: list[tuple[Shard, Range, Range | str]] = []
    for shard in (shard for shard in job.plan.shards if shard.file in outcomes):
        path, received = folder / shard.file, sorted(outcomes[shard.file].received, key=attrgetter("offset"))
        begins = [*(part.offset for part in received), shard.nbytes]
        ends = [shard.header_bytes, *(part.offset + part.nbytes for part in received)]
        header = LocalFiles(folder).read_bytes(shard.file, 0, shard.header_bytes)
        if header != job.plan.header(shard) or (job.is_read_once and begins != ends):
            found[shard.file] = [tensor.source.name for tensor in shard.tensors]
        elif job.is_read_once:
            checks += [(shard, file_range(path, part.nbytes, part.offset), part.digest) for part in received]
        else:
            checks += [
                (shard, shard_range(folder, shard, t), tensor_range(job.checkpoint.place, t.source, t.dtype))
                for t in shard.tensors
            ]
    digests = digest_pairs([check[1:] for check in checks], job.crew, stage)
    for (shard, part, _), (staged, expected) in zip(checks, digests, strict=True):
        if staged != expected:
            begin, end = part.offset - shard.header_bytes, part.offset + part.nbytes - shard.header_bytes
            hit = [t.source.name for t in shard.tensors if t.begin < end and begin < t.begin + t.nbytes]
            found.setdefault(shard.file, []).extend(hit)
    return found, {part: staged for (_, part, _), (staged, _) in zip(checks, digests, strict=True)}


def shard_range(folder: Path, shard: Shard, tensor: PlannedTensor) -> Range:
    """Return the bytes of a tensor in its shard file in `folder`."""
    part = file_range(folder / shard.file, tensor.nbytes, shard.header_bytes + tensor.begin)
    return replace(part, files=WrittenFiles(folder))
