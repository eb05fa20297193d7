"""The experiment: both checkpoints loaded in turn, in fresh processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from shardkit.base.errors import Cancelled, CheckpointError, MeasurementError, ShardkitError
from shardkit.base.jobs import Crew, worker_count
from shardkit.base.record import listed, plural
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.scan import refuse_gguf
from shardkit.compare.comparison import Comparison
from shardkit.formats.tensor import LoadDtypeLike
from shardkit.measure.launch import run_load
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.samples import AUTO, MOST_PAIRS, ORIGINAL, SHARDED, Repeats, Sample, Variant
from shardkit.measure.spec import RULES, Cache, LoadSpec, Rule, check, optional, share, whole_number
from shardkit.shard.verify import compare_tensors

_ProgressCallback = Callable[[int, int, str], bool | None]
_Source = str | os.PathLike[str]

# Tensors read to see whether two checkpoints hold the same model: this many, of about this size in all.
_COMPARED_TENSORS, _COMPARED_BYTES = 32, 256_000_000


def compare_loads(
    original: _Source,
    sharded: _Source,
    *,
    dtype: LoadDtypeLike | None = None,
    device: str = "cpu",
    cache: Cache = "cold",
    repeats: Repeats = 5,
    most: int = MOST_PAIRS,
    most_seconds: float | None = None,
    margin: float = 0.05,
    progress: _ProgressCallback | None = None,
    generate: int = 1,
    prefetch: bool = False,
    memory_limit: int | str | None = None,
    python: _Source | None = None,
    timeout: float | None = None,
    options: Mapping[str, Any] | None = None,
    max_memory: int | str | None = None,
    loader: _Source | None = None,
    prompt: str | None = None,
    generation: Mapping[str, Any] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    same_model: bool = True,
    on_sample: Callable[[Comparison], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Comparison:
    """Load two checkpoints (or more) in turn, each in fresh processes, and report what differs.

    One warm-up of each comes first and is not counted; then pairs in ABBA order, so drift of the machine
    favors neither. The main quantities (times of the load and to its tokens, peaks, bytes read a token) carry
    verdicts. Those of a variant are a family: at most 5 % of comparisons of a checkpoint with itself call any
    difference (Holm's procedure on Student's t of the pairs' log ratios: `shardkit.measure.intervals`). Times
    have a verdict from three pairs on; five, the default, give an interval half as wide as three do.

    Parameters
    ----------
    original, sharded
        As `source` of `measure_load`; models on the Hub are downloaded before anything is measured.
    dtype, device, cache, generate, prefetch, memory_limit, python, timeout, options, max_memory, loader,
    prompt, generation
        As for `measure_load`, for every load.
    repeats
        Number of pairs. "auto" adds pairs until every verdict is decided (a difference, or none that matters)
        or `most` or `most_seconds` is spent. Its intervals are those of a t confidence sequence, which hold
        after every pair at once, so that the 5 % are kept although each look could end it (Lai 1976; Wang and
        Ramdas 2025: `shardkit.measure.intervals`). They are wider: a verdict takes four pairs at least.
    most, most_seconds
        With "auto": the most pairs; seconds after which no pair begins (None: as long as it takes).
    margin
        Smallest difference that matters: 0.05 for 5 %.
    progress
        Called with (runs done, runs in all, what comes next); returning False stops the experiment.
    others
        More variants by name, each with arguments of `measure_load` that differ from the common ones; without
        a source, that of the sharded is used: ``{"prefetched": {"prefetch": True}}``. If one prefetches, and
        so works before its load, all times count from process start.
    same_model
        Whether to refuse checkpoints that are not the same model: tensors that differ in name or shape, or,
        in a sample of them, in their values (up to a cast).
    on_sample
        Called with the comparison so far, after each run.
    stop
        Called a few times a second; True stops the experiment, even in the middle of a load.

    Returns
    -------
    Comparison
        Every run, and what differs, with intervals.

    Raises
    ------
    ShardkitError
        If the checkpoints are not the same model, or an argument is invalid.
    Cancelled
        If `progress` or `stop` asked to stop.

    Examples
    --------
    >>> comparison = compare_loads("mistral-demo", "sharded", dtype="float16", repeats=3)
    >>> comparison.save("comparison.json")
    >>> Comparison.load("comparison.json").names
    ('original', 'sharded')
    """
    given = {"repeats": repeats, "most": most, "most_seconds": most_seconds}
    check({**given, "margin": margin, "others": others}, _RULES)
    common = LoadSpec(
        dtype, device, cache, generate, prefetch, memory_limit, python, timeout, options or {}, max_memory,
        loader, prompt, generation or {},
    )  # fmt: skip
    wanted = {ORIGINAL: {"source": original}, SHARDED: {"source": sharded}, **(others or {})}
    specs = {name: _spec(name, common, changes) for name, changes in wanted.items()}
    opened = {name: _open(changes.get("source", sharded)) for name, changes in wanted.items()}
    for name in [*opened][1:] if same_model else ():
        _require_same_model(opened[ORIGINAL], opened[name])
    variants = tuple(
        Variant(name, c.source, len(c.files), c.total_bytes, c.dtypes, dict(vars(specs[name])))
        for name, c in opened.items()
    )
    notes = () if same_model else ("the variants were not required to be the same model",)
    # A model of the Hub is loaded from where it was downloaded to, and shown by its id.
    paths = {name: c.source if os.path.exists(c.source) else c.folder for name, c in opened.items()}
    loads = {name: partial(run_load, path, specs[name], stop=stop) for name, path in paths.items()}
    pairs, at_most = (repeats, None) if isinstance(repeats, int) else (most, most)
    found, began = Comparison(variants, margin, (), (), notes, at_most), time.monotonic()

    def is_enough() -> bool:
        spent = most_seconds is not None and time.monotonic() - began >= most_seconds
        return at_most is not None and (spent or found.is_decided)

    try:
        for sample in _run_all(loads, pairs, progress, is_enough, f" of at most {at_most}" * bool(at_most)):
            found = found.with_sample(sample)
            if on_sample is not None:
                on_sample(found)
    except CheckpointError as error:  # it could be opened, and now it cannot
        if not found.warm_ups:
            raise
        found = replace(found, notes=(*found.notes, f"ended early: {error}"))
    changed = (name for name, checkpoint in opened.items() if checkpoint.has_changed())
    mixed = (f"the files of {name} changed during the comparison: the figures mix both" for name in changed)
    return replace(found, notes=(*found.notes, *mixed))


def _have_names(others: object) -> None:
    if not isinstance(others, Mapping) or not all(isinstance(one, Mapping) for one in others.values()):
        raise MeasurementError(f"{others!r} is not arguments by name, for each variant by its name")
    for name in others:
        if not isinstance(name, str) or name in ("", ORIGINAL, SHARDED):
            raise MeasurementError(
                f"a variant is named {name!r}: use a name other than {ORIGINAL} and {SHARDED}"
            )


_RULES: dict[str, Rule] = {
    "repeats": whole_number(1, AUTO),
    "most": whole_number(1),
    "most_seconds": RULES["timeout"],
    "margin": share(0, math.inf),
    "others": optional(_have_names),
}


def _spec(name: str, common: LoadSpec, changes: Mapping[str, Any]) -> LoadSpec:
    own = {key: value for key, value in changes.items() if key != "source"}
    if unknown := sorted(map(str, own.keys() - vars(common).keys())):
        raise MeasurementError(f"variant {name!r}: {listed(unknown)} is not an argument of measure_load")
    try:
        return replace(common, **own)
    except MeasurementError as error:
        raise MeasurementError(f"variant {name!r}: {error}") from None


def _run_all(
    loads: Mapping[str, Callable[[], LoadMeasurement]],
    repeats: int,
    progress: _ProgressCallback | None,
    is_enough: Callable[[], bool],
    of_how_many: str,
) -> Iterator[Sample]:
    names = tuple(loads)
    order: list[tuple[str, int | None]] = [(name, None) for name in names]
    for number in range(repeats):
        order += [(name, number) for name in (names if number % 2 == 0 else names[::-1])]
    ends: dict[str, list[bool]] = {name: [] for name in names}
    total = len(order)
    for done, (name, pair) in enumerate(order):
        if done == len(names) and not any(map(any, ends.values())):
            break  # what none loads needs no statistics
        if pair and done % len(names) == 0 and is_enough():
            total = done
            break
        if len(ends[name]) > 1 and not any(ends[name]):
            continue  # twice, and never loaded: that is its result
        which = "warm-up" if pair is None else f"pair {pair + 1}{of_how_many}"
        _report(progress, done, total, f"{name}, {which}")
        measurement = loads[name]()
        ends[name].append(measurement.ok)
        yield Sample(name, pair, measurement)
    _report(progress, total, total, "done")


def _report(progress: _ProgressCallback | None, done: int, total: int, label: str) -> None:
    if progress is not None and progress(done, total, label) is False:
        raise Cancelled(f"stopped after {done} of {plural(total, 'run')}")


def _open(source: _Source) -> Checkpoint:
    checkpoint = Checkpoint.open(source, download=True)
    refuse_gguf(checkpoint.format, checkpoint.source)
    return checkpoint


def _require_same_model(original: Checkpoint, other: Checkpoint) -> None:
    between = f"between {original.source} and {other.source}; same_model=False compares them anyway"
    first, second = ({(t.name, t.shape) for t in one.tensors.values()} for one in (original, other))
    if differ := sorted(dict(first ^ second)):
        raise ShardkitError(
            f"not the same model: {plural(len(differ), 'tensor')} differ in name or shape ({listed(differ)}) "
            f"{between}"
        )
    names, crew = _sample_of(original), Crew(worker_count(None))
    ours, theirs = (
        replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in names}, aliases={})
        for checkpoint in (original, other)
    )
    found = compare_tensors(ours, theirs, crew)
    # The original may itself be the cast of what it is compared with.
    if not found.equal and not compare_tensors(theirs, ours, crew).equal:
        raise ShardkitError(
            f"not the same model: of {plural(len(names), 'tensor')} read, {len(found.mismatches)} differ in "
            f"their values ({listed(m.tensor for m in found.mismatches)}) {between}"
        )


def _sample_of(checkpoint: Checkpoint) -> list[str]:
    """Return names of tensors spread over the model, within the budget, but never none."""
    spread = sorted(checkpoint.tensors)[:: -(-len(checkpoint.tensors) // _COMPARED_TENSORS) or 1]
    sizes = {name: checkpoint.tensors[name].nbytes for name in spread}
    names, left = [], _COMPARED_BYTES
    for name in spread:
        if sizes[name] <= left:
            names.append(name)
            left -= sizes[name]
    return names or sorted(spread, key=sizes.__getitem__)[:1]
