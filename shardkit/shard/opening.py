"""What is sharded, and how: the source as it is opened or streamed, and its plan."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from shardkit.base.errors import CheckpointError, DestinationError, DownloadNeededError, PlanError
from shardkit.checkpoint.belonging import needed_files
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.ranks import for_ranks
from shardkit.formats.columns import COLUMN_BLOCKS
from shardkit.plan.plan import USUAL, ShardPlan, plan_shards
from shardkit.shard.destination import refuse_leftover, refuse_only_copy, resolve
from shardkit.shard.in_parts import Part, check_part
from shardkit.sources.resolve import hub_name, is_address, is_on_hub

_USUAL = {"max_shard_size": USUAL[0], "strategy": USUAL[1], "dtype": None, "files": None, "ranks": None}


def refuse_early(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], free_source: bool, part: Part | None
) -> None:
    """Refuse what is wrong whatever the source contains."""
    if part:
        check_part(part, free_source=free_source)
    if not is_address(destination):
        refuse_leftover(source, target := resolve(destination))
        refuse_only_copy(target, resumed=source if free_source else "")
    elif free_source or part:
        given = "free_source" if free_source else "part"
        raise DestinationError(f"{destination} is not a folder on this machine: leave out {given}")


def planned(source: str | os.PathLike[str], checkpoint: Checkpoint, **requested: Any) -> ShardPlan:
    """Return the plan of a checkpoint; one that was given as the source, if it still is one of it."""
    if not isinstance(source, ShardPlan):
        return plan_shards(checkpoint, **requested)
    if _USUAL | requested != _USUAL:
        raise PlanError(f"{', '.join(_USUAL)} are those of the plan: leave them out")
    if ranks := source.metadata.get(COLUMN_BLOCKS):
        checkpoint = for_ranks(checkpoint, int(ranks))
    if {t.source.name: t.source for shard in source.shards for t in shard.tensors} != checkpoint.tensors:
        raise PlanError(f"{checkpoint.source} has changed since it was planned: plan it again")
    return source


def is_streamed(
    checkpoint: Checkpoint, plan: ShardPlan, destination: str | os.PathLike[str], stream: bool | None
) -> bool:
    """Whether a model that is not here is streamed: as requested, or unless disks are to hold both."""
    if not is_on_hub(checkpoint.place.name):
        if stream is False:
            raise CheckpointError("cannot be downloaded, only streamed", file=checkpoint.source)
        stream = True
    from shardkit.sources.hub_cache import must_stream

    nbytes = plan.disk_bytes
    wanted = stream
    if wanted is None:
        wanted = is_address(destination) or must_stream(checkpoint.place, needed_files, nbytes, destination)
    if wanted:
        try:
            tensors = {t.source.name: t.source for shard in plan.shards for t in shard.tensors}
            replace(checkpoint, tensors=tensors).check_streamable()
            return True
        except DownloadNeededError:
            if stream:
                raise
    return False


def open_there(source_id: str | os.PathLike[str], revision: str | None, token: str | None) -> Checkpoint:
    """Open a model on the Hub that is streamed; refuse what is here, and what cannot be."""
    name = os.fspath(source_id)
    if os.path.exists(name):
        raise CheckpointError("is a local path: shard it to a folder, then push that", file=name)
    source = name if is_address(name) else hub_name(name)
    opened = source_id if isinstance(source_id, Checkpoint) else source
    checkpoint = Checkpoint.open(opened, revision=revision, token=token)
    try:
        return checkpoint.check_streamable()
    except DownloadNeededError as error:
        raise CheckpointError(
            f"tensor {error.tensor} is not contiguous, and too large to stream: shard it to a folder, then "
            "push that",
            file=source,
        ) from error
