"""All that is not a shard: copied as it is, but for a config that a cast has made untrue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shardkit.checkpoint.config import adapted_config, config_dtype
from shardkit.shard.copy import run_task
from shardkit.shard.store import Job
from shardkit.shard.tasks import Task, cut, file_range
from shardkit.shard.verify import is_same_file


def write_side_files(job: Job, folder: Path, hear: Callable[[], None]) -> list[str]:
    """Write all that is not a shard, the index last; return what it was. `hear` may stop it by raising."""
    checkpoint, plan = job.checkpoint, job.plan
    for file in checkpoint.side_files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == checkpoint.config_file and (text := _new_config(job)):
            target.write_bytes(text.encode())  # as text, Windows would end its lines otherwise
        else:
            source = file_range(checkpoint.place.fetched(file), checkpoint.side_files[file])
            target.touch()
            for part in cut(source):
                run_task(Task(str(target), (part,)))
                hear()
    if plan.index is not None and plan.index_file is not None:
        (folder / plan.index_file).write_bytes(plan.index.encode())
    return [*checkpoint.side_files, *filter(None, [plan.index_file])]


def _new_config(job: Job) -> str | None:
    """Return the config that the shards need in place of the source's; None where that fits as it is."""
    config, auto = job.checkpoint.config or {}, job.checkpoint.auto_dtype
    is_unsaid = config_dtype(config) is None and bool(config.keys() & {"architectures", "model_type"})
    return adapted_config(config, job.plan.dtype, auto if is_unsaid and auto != job.plan.auto_dtype else None)


def altered_files(job: Job, folder: Path) -> list[str]:
    """Return which of the files that are copied as they are do not hold what the source does."""
    checkpoint, adapted = job.checkpoint, job.checkpoint.config_file if _new_config(job) else None
    return [
        file
        for file, size in checkpoint.side_files.items()
        if file != adapted and not is_same_file(checkpoint.place.fetched(file), folder / file, size)
    ]
