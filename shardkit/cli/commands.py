"""The commands: each is a function of its arguments; options that it only passes on are not named again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import shardkit
from shardkit.base.cluster import executor_at
from shardkit.base.errors import DestinationError, ShardkitError
from shardkit.base.extras import require
from shardkit.base.machine import free_bytes
from shardkit.base.record import Summary, listed, printable
from shardkit.base.sizes import format_size
from shardkit.checkpoint.scan import GGUF
from shardkit.cli.arguments import (
    A_SOURCE,
    DTYPE,
    EXECUTOR,
    JSON,
    LAYOUT,
    LOAD_DTYPE,
    MAX_MEMORY,
    NUMBER,
    PARTS,
    PUBLIC,
    REPEATS,
    SIZE,
    SOURCE,
    TRUST_REMOTE_CODE,
    WORKERS,
    argument,
    command,
    device,
    file,
    rate,
    switch,
    without,
    wrong_usage,
)
from shardkit.cli.terminal import in_part, limited_runs, next_step, progress_bar, say, show, show_run, typed
from shardkit.formats.tensor import CAST_DTYPES, Dtype, LoadDtype
from shardkit.measure.samples import AUTO
from shardkit.measure.spec import CACHES
from shardkit.shard.bucket_store import discard_in_bucket
from shardkit.shard.destination import default_destination, leftovers, remove_leftovers
from shardkit.shard.in_parts import is_part
from shardkit.sources.resolve import is_address, is_on_hub

_OF_FOLDERS = {"overwrite", "resume", "stream", "free_source", "ranks", "part"}
_ONLY_FOLDERS = "--overwrite, --no-resume, --stream, --download, --free-source, --ranks, --part, --finish"


@command(
    SOURCE,
    LOAD_DTYPE,
    MAX_MEMORY,
    argument("--context-tokens", "Longest sequence.", **NUMBER),
    argument("--batch-size", "Sequences at a time.", default=1, **NUMBER),
    argument("--disk-rate", "Bytes a second: 1.2GB; or measure.", type=rate, metavar="RATE"),
    JSON,
    examples="""inspect mistral-demo
        inspect mistralai/Mistral-7B-v0.1 --dtype fp16
        inspect mistral-demo --max-memory 700MB --disk-rate measure""",
)
def inspect(source: str, dtype: LoadDtype | None = None, as_json: bool = False, **asked: Any) -> None:
    """Show what a checkpoint contains and how much memory loading it takes, from its headers."""
    left = list(map(str, leftovers(source)))
    if left:
        say(f"an interrupted run left {listed(left)}: repeat it, or remove that: `shardkit clean {source}`")
    checkpoint = shardkit.Checkpoint.open(source)
    estimate = checkpoint.estimate(dtype, **asked)
    following = next_step("plan", source, dtype=dtype if dtype in CAST_DTYPES else None)
    if budget := asked.get("max_memory"):
        plan = estimate.within.plan if estimate.within else None
        budget = budget if plan and plan.streamed_bytes else None  # where all stays, mapped files need less
        following = next_step("generate", source, prompt="...", max_memory=budget, dtype=dtype) * bool(plan)
    following *= checkpoint.format != GGUF
    more = {"estimate": estimate.to_dict(), "leftovers": left}
    show(checkpoint, estimate, as_json=as_json, following=following, **more)


@command(
    SOURCE,
    *LAYOUT,
    DTYPE,
    JSON,
    examples="""plan mistral-demo --max-shard-size 100MB
        plan mistral-demo --strategy layer --dtype fp16""",
)
def plan(source: str, dtype: Dtype | None = None, as_json: bool = False, **layout: Any) -> None:
    """Dry run: show the files that would be written; in a pipe, all of them."""
    checkpoint = shardkit.Checkpoint.open(source)
    made = shardkit.plan_shards(checkpoint, dtype=dtype, **layout)
    free = free_bytes(".")
    verdict = "enough" if free >= made.disk_bytes else "NOT enough"
    room = f"{format_size(free)} free on the disk of this folder: {verdict}"
    room = room if free < sys.maxsize else "free space on the disk of this folder is unknown"
    now = checkpoint.estimate(dtype)
    then = made.estimate(now.dtype, config=checkpoint.config, side_files=checkpoint.side_files)
    shards = f"{then.needed} of anonymous memory (cannot be evicted) for the shards"
    needs = f"{shards}, {now.needed} for the source, both loaded in {now.dtype or 'their dtypes'}"
    show(
        made,
        Summary("On this machine", (("disk", room), ("to load", needs))),
        as_json=as_json,
        following=next_step("shard", source, **layout, dtype=dtype),
        free_bytes=free if free < sys.maxsize else None,
        estimate={"before": now.to_dict(), "after": then.to_dict()},
    )


@command(
    SOURCE,
    *LAYOUT,
    DTYPE,
    WORKERS,
    EXECUTOR,
    *PARTS,
    switch("--overwrite", "Replace an existing checkpoint, once the new one is complete."),
    without("resume", "Start over instead of resuming."),
    without("verify", "Skip the verification at the end."),
    switch("--allow-overflow", "Allow a cast that turns finite values infinite."),
    switch("--stream", "Stream a model from the Hub into shards, without downloading it."),
    switch("--download", "Download it first (default: if the disk has room for both).", False, dest="stream"),
    switch("--free-source", "Free the source's disk space meanwhile: its weights are gone in the end."),
    PUBLIC,
    JSON,
    destination="A new or empty folder, s3://bucket/name, or hf://owner/name (default: SOURCE-sharded).",
    is_required=False,
    examples="""shard mistral-demo
        shard mistral-demo sharded --max-shard-size 100MB --dtype fp16
        shard org/name hf://me/name --executor dask://localhost:8786
        shard mistral-demo sharded --max-shard-size 100MB --part 3/8""",
)
def shard(
    source: str,
    destination: str | None = None,
    executor: str | None = None,
    as_json: bool = False,
    **asked: Any,
) -> None:
    """Rewrite a checkpoint as shards, without loading it, and verify them."""
    destination = destination or default_destination(source)
    on_hub = is_on_hub(destination)
    if on_hub and asked.keys() & _OF_FOLDERS:
        wrong_usage("shard", f"{_ONLY_FOLDERS} only apply to folders")
    if not on_hub and "private" in asked:
        wrong_usage("shard", "--public only applies to hf:// destinations")
    make, target = (
        (shardkit.shard_on_hub, destination[5:]) if on_hub else (shardkit.shard_checkpoint, destination)
    )
    with executor_at(executor) as workers, progress_bar() as bar:
        report = make(source, target, **asked, executor=workers, progress=bar)
    following = next_step("compare", source, destination, dtype=asked.get("dtype"))
    if report.freed or is_address(report.source) or is_address(destination) or is_part(report.destination):
        following = "" if is_part(report.destination) else next_step("inspect", destination)
    show(report, as_json=as_json, following=following)


@command(
    argument("folder", "A folder written by shardkit, or one like it."),
    argument("repo_id", "owner/name; created as private if it does not exist.", metavar="repo-id"),
    PUBLIC,
    examples="push sharded me/name",
)
def push(folder: str, repo_id: str, private: bool = True) -> None:
    """Push a sharded checkpoint to the Hub in one commit, and print its URL."""
    with progress_bar() as bar:
        url = shardkit.push_checkpoint(folder, repo_id, private=private, progress=bar)
    print(url)


@command(
    SOURCE,
    WORKERS,
    EXECUTOR,
    JSON,
    destination="What is compared with it, likewise.",
    examples="verify mistral-demo mistral-demo-sharded",
)
def verify(
    source: str, destination: str, executor: str | None = None, as_json: bool = False, **asked: Any
) -> None:
    """Compare the tensors of two checkpoints, however they are sharded; after a cast, source first."""
    with executor_at(executor) as workers, progress_bar() as bar:
        found = shardkit.verify_checkpoint(source, destination, **asked, executor=workers, progress=bar)
    show(found, as_json=as_json, equal=found.equal)
    if not found.equal:
        what_next = "do not use it: shard the source again, with --overwrite"
        if found.is_perhaps_another:
            what_next = f"{destination} may be of another model; find out before you overwrite anything"
        elif found.is_perhaps_swapped:
            swapped = f"if {destination} is what was cast, give it first"
            what_next = f"{swapped}; find out before you overwrite anything"
        raise ShardkitError(f"{destination} does not match {source}: {found.why_unequal}; {what_next}")


@command(destination="The destination of the interrupted run.", examples="clean mistral-demo-sharded")
def clean(destination: str) -> None:
    """Remove what interrupted runs left next to a destination; the destination itself is kept."""
    is_here = not is_address(destination)
    removed = remove_leftovers(destination) if is_here else discard_in_bucket(destination)
    if not removed and is_here and not os.path.exists(os.path.expanduser(destination)):
        raise DestinationError(f"{destination} does not exist, and no interrupted run left anything there")
    print(
        "\n".join(f"removed {printable(str(path))}" for path in removed)
        or f"nothing to remove next to {printable(destination)}"
    )


@command(
    argument("original", A_SOURCE),
    argument("sharded", A_SOURCE),
    LOAD_DTYPE,
    *REPEATS,
    argument("--cache", "cold: from the disk; warm: from the page cache.", choices=CACHES, default="cold"),
    argument("--device", "Device to load to: cpu, cuda, cuda:1, auto.", default="cpu", type=device),
    argument("--memory-limit", "Memory limit of each load: 12.7GB to simulate Colab's limit.", **SIZE),
    argument("--max-memory", "Budget of each load, which streams what does not fit.", **SIZE),
    argument("--generate", "Tokens after each load.", default=1, **NUMBER),
    switch(
        "--prefetch",
        "Also load the shards with their files prefetched; times then count from process start.",
        {"prefetched": {"prefetch": True}},
        dest="others",
    ),
    argument(
        "--python", "Another interpreter to load with, such as that of `shardkit stack`.", metavar="FILE"
    ),
    TRUST_REMOTE_CODE,
    without("same-model", "Compare even if the models differ."),
    argument(
        "--output",
        "Save all results here: .json, or .html to share.",
        type=file(".json", ".html", ".htm"),
        metavar="FILE",
    ),
    argument("--plot", "Save a plot here: .png or .svg.", type=file(".png", ".svg"), metavar="FILE"),
    JSON,
    examples="""compare mistral-demo mistral-demo-sharded
        compare mistral-demo sharded --dtype fp16 --output result.html --plot result.png
        compare mistral-demo sharded --dtype fp16 --memory-limit 700MB --repeats 3""",
)
def compare(
    original: str,
    sharded: str,
    output: Path | None = None,
    plot: Path | None = None,
    as_json: bool = False,
    **asked: Any,
) -> None:
    """Load two checkpoints in turn, each time in a fresh process, and report what differs."""
    if asked["repeats"] != AUTO and asked.keys() & {"most", "most_seconds"}:
        wrong_usage("compare", "--most and --most-seconds only apply to --repeats auto")
    _require_writable(output, plot)
    with in_part(output, as_json) as keep, progress_bar() as bar:
        progress = bar if sys.stderr.isatty() else show_run
        found = shardkit.compare_loads(original, sharded, **asked, progress=progress, on_sample=keep)
    show(found, as_json=as_json)
    if output is not None:
        found.save(output)
    if plot is not None:
        found.plot(plot)
    # That a variant dies under a limit is what was asked for; that it does not load at all is not.
    if found.failures and ("memory_limit" not in asked or len(found.failures) == len(found.variants)):
        raise ShardkitError(found.verdict)


@command(SOURCE, LOAD_DTYPE, TRUST_REMOTE_CODE, JSON, examples="fit mistral-demo-sharded --dtype fp16")
def fit(source: str, as_json: bool = False, **asked: Any) -> None:
    """Find the smallest memory limit under which a checkpoint loads, by real loads; takes minutes.

    A load that takes five times as long as without a limit, and at least a minute, counts as failed.
    """
    show(shardkit.minimum_memory(source, **asked, progress=limited_runs()), as_json=as_json)


@command(
    SOURCE,
    argument("--prompt", "Text to continue.", required=True, metavar="TEXT"),
    MAX_MEMORY,
    argument("--max-new-tokens", "Tokens to add.", default=32, **NUMBER),
    LOAD_DTYPE,
    JSON,
    examples="generate sharded --prompt 'The quick brown fox' --max-memory 700MB",
)
def generate(source: str, as_json: bool = False, **asked: Any) -> None:
    """Continue a prompt, token by token, with a model that may be larger than its memory."""
    from shardkit.load.generate import generate_text

    with typed(as_json) as on_text:
        found = generate_text(source, **asked, on_text=on_text)
    if as_json:
        show(found, as_json=True)
    else:
        say(found.status)


def _require_writable(output: Path | None, plot: Path | None) -> None:
    """Refuse files that could not be written or drawn: now, not after minutes of loads."""
    for path in filter(None, (output, plot)):
        if not path.absolute().parent.is_dir():
            raise ShardkitError(f"{path} cannot be written: its folder does not exist")
        if path.is_dir():
            raise ShardkitError(f"{path} is a folder: choose a file in it")
        if path.suffix.lower() != ".json":
            require("notebook", f"drawing {path}", "matplotlib")
