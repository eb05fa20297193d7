"""All that is not a shard: copied as it is, but for a config that a cast has made untrue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shardkit.base.jobs import Crew
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.config import adapted_config, config_dtype
from shardkit.plan.plan import ShardPlan
from shardkit.shard.copy import file_tasks, run_task, whole_file
from shardkit.shard.verify import digest_pairs


def write_side_files(
    checkpoint: Checkpoint, plan: ShardPlan, folder: Path, hear: Callable[[], None]
) -> list[str]:
    """Write all that is not a shard, the index last; return what it was. `hear` may stop it by raising."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.side_files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == checkpoint.config_file and (text := _new_config(checkpoint, plan)):
            target.write_bytes(text.encode())  # as text, Windows would end its lines otherwise
        else:
            source = whole_file(checkpoint.place.fetched(file), checkpoint.side_files[file])
            target.touch()
            for task in file_tasks(source, str(target)):
                run_task(task)
                hear()
    if plan.index is not None and plan.index_file is not None:
        (folder / plan.index_file).write_bytes(plan.index.encode())
    return [*checkpoint.side_files, *filter(None, [plan.index_file])]


def _new_config(checkpoint: Checkpoint, plan: ShardPlan) -> str | None:
    """Return the config that the shards need in place of the source's; None where that fits as it is."""
    config = checkpoint.config or {}
    is_unsaid = config_dtype(config) is None and bool(config.keys() & {"architectures", "model_type"})
    auto = checkpoint.auto_dtype if is_unsaid and checkpoint.auto_dtype != plan.auto_dtype else None
    return adapted_config(config, plan.dtype, auto)


def altered_files(checkpoint: Checkpoint, plan: ShardPlan, folder: Path, crew: Crew) -> list[str]:
    """Return which of the files that are copied as they are do not hold what the source does."""
    adapted = checkpoint.config_file if _new_config(checkpoint, plan) else None
    sizes = {file: size for file, size in checkpoint.side_files.items() if file != adapted}
    pairs = [
        (whole_file(checkpoint.place.fetched(file), size), whole_file(folder / file, size))
        for file, size in sizes.items()
    ]
    digests = digest_pairs(pairs, replace(crew, progress=None), "verify")
    return [file for file, (ours, theirs) in zip(sizes, digests, strict=True) if ours != theirs]
