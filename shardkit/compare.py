"""The experiment: both checkpoints loaded in turn, in fresh processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from shardkit.checkpoint import Checkpoint
from shardkit.errors import Cancelled, MeasurementError, ShardkitError
from shardkit.measure import measure_load
from shardkit.measure.comparison import ARMS, Arm, ArmName, Comparison, Ratio, Sample
from shardkit.record import listed, plural

__all__ = ["Arm", "Comparison", "Ratio", "Sample", "compare_loads"]

_ProgressCallback = Callable[[int, int, str], bool | None]


def compare_loads(
    original: str | os.PathLike[str],
    sharded: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str = "cpu",
    cache: str = "cold",
    repeats: int = 5,
    margin: float = 0.05,
    progress: _ProgressCallback | None = None,
    generate: int = 1,
    python: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    same_model: bool = True,
    seed: int = 0,
) -> Comparison:
    """Load two checkpoints in turn, each in fresh processes, and say what differs.

    One warm-up of each comes first and counts for nothing; then pairs in ABBA order, so that a drift of
    the machine favours neither.

    Parameters
    ----------
    original, sharded
        Folders, or models on the Hub, which are downloaded before anything is measured.
    dtype, device, cache, generate, python, timeout
        As for `measure_load`, for every load.
    repeats
        Number of pairs.
    margin
        Smallest difference that matters: 0.05 for 5 %.
    progress
        Called with (runs done, runs in all, what comes next); returning False stops the experiment.
    same_model
        Whether to refuse checkpoints whose tensors differ in name or shape.
    seed
        Of the bootstrap.

    Raises
    ------
    ShardkitError
        If the checkpoints do not hold the same model, or an argument is not understood.
    Cancelled
        If `progress` asked to stop.
    """
    if repeats < 1 or margin <= 0:
        raise MeasurementError(f"repeats is {repeats}, margin {margin}: both must be above zero")
    arms: dict[ArmName, Checkpoint] = {
        "original": Checkpoint.open(original, download=True),
        "sharded": Checkpoint.open(sharded, download=True),
    }
    notes = () if same_model else ("the two were not required to hold the same model",)
    if same_model:
        _require_same_model(arms["original"], arms["sharded"])
    options: dict[str, Any] = {"dtype": dtype, "device": device, "cache": cache, "generate": generate}
    samples = _run_all(arms, repeats, progress, {**options, "python": python, "timeout": timeout})
    return Comparison(
        original=_arm("original", arms["original"]),
        sharded=_arm("sharded", arms["sharded"]),
        **options,
        margin=margin,
        seed=seed,
        samples=tuple(sample for sample in samples if sample.pair is not None),
        warm_ups=tuple(sample for sample in samples if sample.pair is None),
        notes=notes,
    )


def _run_all(
    arms: dict[ArmName, Checkpoint], repeats: int, progress: _ProgressCallback | None, options: dict[str, Any]
) -> list[Sample]:
    order: list[tuple[ArmName, int | None]] = [(arm, None) for arm in ARMS]
    for number in range(repeats):
        order += [(arm, number) for arm in (ARMS if number % 2 == 0 else ARMS[::-1])]
    samples: list[Sample] = []
    for done, (arm, pair) in enumerate(order):
        if done == len(ARMS) and not any(sample.measurement.ok for sample in samples):
            break  # what neither loads needs no statistics
        _report(progress, done, len(order), f"{arm}, {'warm-up' if pair is None else f'pair {pair + 1}'}")
        samples.append(Sample(arm, pair, measure_load(arms[arm].folder, **options)))
    _report(progress, len(order), len(order), "done")
    return samples


def _arm(name: ArmName, checkpoint: Checkpoint) -> Arm:
    return Arm(name, checkpoint.source, len(checkpoint.files), checkpoint.total_bytes, checkpoint.dtypes)


def _report(progress: _ProgressCallback | None, done: int, total: int, label: str) -> None:
    if progress is not None and progress(done, total, label) is False:
        raise Cancelled(f"stopped as asked, after {done} of {plural(total, 'run')}")


def _require_same_model(original: Checkpoint, sharded: Checkpoint) -> None:
    first, second = _shapes(original), _shapes(sharded)
    if differ := sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name)):
        raise ShardkitError(
            f"not the same model: {plural(len(differ), 'tensor')} differ in name or shape ({listed(differ)}) "
            f"between {original.source} and {sharded.source}; same_model=False compares them all the same"
        )


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return shapes | {alias: shapes[kept] for alias, kept in checkpoint.aliases.items()}
