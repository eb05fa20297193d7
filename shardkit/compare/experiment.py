"""The experiment: both checkpoints loaded in turn, in fresh processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shardkit.base.errors import (
    Cancelled,
    CheckpointError,
    MeasurementError,
    MissingPackageError,
    ShardkitError,
)
from shardkit.base.jobs import Crew, worker_count
from shardkit.base.record import listed, plural
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.compare.comparison import Comparison
from shardkit.compare.variant import ORIGINAL, SHARDED, Sample, Variant
from shardkit.measure.launch import check_load, measure_load
from shardkit.shard.verify import compare_tensors

_ProgressCallback = Callable[[int, int, str], bool | None]
_Source = str | os.PathLike[str]

# Tensors read to see whether two checkpoints hold the same model: this many, of about this size in all.
_COMPARED_TENSORS, _COMPARED_BYTES = 32, 256_000_000


def compare_loads(
    original: _Source,
    sharded: _Source,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    cache: str = "cold",
    repeats: int = 5,
    margin: float = 0.05,
    progress: _ProgressCallback | None = None,
    generate: int = 1,
    prefetch: bool = False,
    memory_limit: int | str | None = None,
    python: _Source | None = None,
    timeout: float | None = None,
    options: Mapping[str, Any] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    same_model: bool = True,
    seed: int = 0,
    on_sample: Callable[[Comparison], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Comparison:
    """Load two checkpoints (or more) in turn, each in fresh processes, and say what differs.

    One warm-up of each comes first and counts for nothing; then pairs in ABBA order, so that a drift of
    the machine favours neither.

    Parameters
    ----------
    original, sharded
        As `source` of `measure_load`; models on the Hub are downloaded before anything is measured.
    dtype, device, cache, generate, prefetch, memory_limit, python, timeout, options
        As for `measure_load`, for every load.
    repeats
        Number of pairs.
    margin
        Smallest difference that matters: 0.05 for 5 %.
    progress
        Called with (runs done, runs in all, what comes next); returning False stops the experiment.
    others
        More variants by name, each with arguments of `measure_load` that differ from the common ones; where
        it names no source, it is that of the sharded: ``{"prefetched": {"prefetch": True}}``. Where one
        prefetches, and so works before its load, all times count from the start of the process.
    same_model
        Whether to refuse checkpoints that do not hold the same model: tensors that differ in name or
        shape, or, in a sample of them, in their values (up to a cast).
    seed
        Of the bootstrap.
    on_sample
        Called with the comparison so far, after each run.
    stop
        Asked a few times a second; True stops the experiment, in the middle of a load if need be.

    Raises
    ------
    ShardkitError
        If the checkpoints do not hold the same model, or an argument is not understood.
    Cancelled
        If `progress` or `stop` asked for it.
    """
    _check_experiment(repeats, margin, seed, others or {})
    common = {
        "dtype": dtype,
        "device": device,
        "cache": cache,
        "generate": generate,
        "prefetch": prefetch,
        "memory_limit": memory_limit,
        "python": python,
        "timeout": timeout,
        "options": options or {},
    }
    wanted = {ORIGINAL: {"source": original}, SHARDED: {"source": sharded}, **(others or {})}
    asked = {name: _options(name, common, changes) for name, changes in wanted.items()}
    sources = {name: changes.get("source", sharded) for name, changes in wanted.items()}
    opened = {name: Checkpoint.open(source, download=True) for name, source in sources.items()}
    if same_model:
        for name in [*opened][1:]:
            _require_same_model(opened[ORIGINAL], opened[name])
    variants = tuple(_variant(name, checkpoint, asked[name]) for name, checkpoint in opened.items())
    notes = () if same_model else ("the variants were not required to hold the same model",)
    found = Comparison(variants, margin, seed, (), (), notes)
    # A model of the Hub is loaded from where it was downloaded to, and shown by its id.
    paths = {name: c.source if os.path.exists(c.source) else c.folder for name, c in opened.items()}
    try:
        for sample in _run_all(variants, paths, repeats, progress, stop):
            if sample.pair is None:
                found = replace(found, warm_ups=(*found.warm_ups, sample))
            else:
                found = replace(found, samples=(*found.samples, sample))
            if on_sample is not None:
                on_sample(found)
    except CheckpointError as error:  # it could be opened, and now it cannot
        if not found.warm_ups:
            raise
        found = replace(found, notes=(*found.notes, f"ended before its time: {error}"))
    changed = (
        f"the files of {name} changed while they were compared: the figures mix both"
        for name, checkpoint in opened.items()
        if checkpoint.has_changed()
    )
    return replace(found, notes=(*found.notes, *changed))


def _check_experiment(repeats: object, margin: object, seed: object, others: object) -> None:
    if type(repeats) is not int or repeats < 1:
        raise MeasurementError(f"repeats is {repeats!r}: give a number of pairs")
    if not (isinstance(margin, (int, float)) and 0 < margin < math.inf):
        raise MeasurementError(f"margin is {margin!r}: give a share above zero, 0.05 for 5 %")
    if type(seed) is not int or seed < 0:
        raise MeasurementError(f"seed is {seed!r}: give a whole number, 0 or above")
    if not isinstance(others, Mapping) or not all(
        isinstance(variant, Mapping) for variant in others.values()
    ):
        raise MeasurementError(f"others is {others!r}: give arguments by name, for each variant by its name")
    for name in others:
        if not isinstance(name, str) or not name or name in (ORIGINAL, SHARDED):
            raise MeasurementError(
                f"a variant of others is named {name!r}: give a text other than {ORIGINAL} and {SHARDED}"
            )


def _options(name: str, common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a variant's loads, checked before anything is opened."""
    own = {key: value for key, value in changes.items() if key != "source"}
    if unknown := sorted(map(str, own.keys() - common.keys())):
        raise MeasurementError(f"variant {name!r}: {listed(unknown)} is no argument of measure_load")
    options = {**common, **own}
    try:
        check_load(**{key: value for key, value in options.items() if key != "prefetch"})
    except MissingPackageError:  # of no variant's making
        raise
    except ShardkitError as error:
        raise MeasurementError(f"variant {name!r}: {error}") from None
    python = options["python"] and os.fspath(options["python"])
    return {**options, "python": python, "options": dict(options["options"] or {})}


def _variant(name: str, checkpoint: Checkpoint, options: dict[str, Any]) -> Variant:
    files, nbytes = len(checkpoint.files), checkpoint.total_bytes
    return Variant(name, checkpoint.source, files, nbytes, checkpoint.dtypes, options)


def _run_all(
    variants: Sequence[Variant],
    paths: Mapping[str, str],
    repeats: int,
    progress: _ProgressCallback | None,
    stop: Callable[[], bool] | None,
) -> Iterator[Sample]:
    order: list[tuple[Variant, int | None]] = [(variant, None) for variant in variants]
    for number in range(repeats):
        order += [(variant, number) for variant in (variants if number % 2 == 0 else variants[::-1])]
    ends: dict[str, list[bool]] = {variant.name: [] for variant in variants}
    for done, (variant, pair) in enumerate(order):
        if done == len(variants) and not any(map(any, ends.values())):
            break  # what none loads needs no statistics
        if len(ends[variant.name]) > 1 and not any(ends[variant.name]):
            continue  # twice, and never loaded: that is its result
        which = "warm-up" if pair is None else f"pair {pair + 1}"
        _report(progress, done, len(order), f"{variant.name}, {which}")
        measurement = measure_load(paths[variant.name], **variant.options, stop=stop)
        ends[variant.name].append(measurement.ok)
        yield Sample(variant.name, pair, measurement)
    _report(progress, len(order), len(order), "done")


def _report(progress: _ProgressCallback | None, done: int, total: int, label: str) -> None:
    if progress is not None and progress(done, total, label) is False:
        raise Cancelled(f"stopped as asked, after {done} of {plural(total, 'run')}")


def _require_same_model(original: Checkpoint, other: Checkpoint) -> None:
    anyway = "same_model=False (--no-same-model) compares them anyway"
    between = f"between {original.source} and {other.source}; {anyway}"
    first, second = _shapes(original), _shapes(other)
    if differ := sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)):
        raise ShardkitError(
            f"not the same model: {plural(len(differ), 'tensor')} differ in name or shape ({listed(differ)}) "
            f"{between}"
        )
    names, crew = _sample_of(original, other), Crew(worker_count(None))
    ours, theirs = (_with_only(checkpoint, names) for checkpoint in (original, other))
    found = compare_tensors(ours, theirs, crew)
    # The original may itself be the cast of what it is compared with.
    if not found.equal and not compare_tensors(theirs, ours, crew).equal:
        raise ShardkitError(
            f"not the same model: of {plural(len(names), 'tensor')} read, {len(found.mismatches)} differ in "
            f"their values ({listed(m.tensor for m in found.mismatches)}) {between}"
        )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _sample_of(*checkpoints: Checkpoint) -> list[str]:
    """Return names of tensors that all hold: spread over the model, within the budget, but never none."""
    common = sorted(set.intersection(*(set(checkpoint.tensors) for checkpoint in checkpoints)))
    spread = common[:: -(-len(common) // _COMPARED_TENSORS) or 1]
    sizes = {name: checkpoints[0].tensors[name].nbytes for name in spread}
    names, left = [], _COMPARED_BYTES
    for name in spread:
        if sizes[name] <= left:
            names.append(name)
            left -= sizes[name]
    return names or sorted(spread, key=sizes.__getitem__)[:1]


def _with_only(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    return replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in names}, aliases={})
