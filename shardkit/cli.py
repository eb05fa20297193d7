"""The command line: the package's functions under the same names, and nothing else.

Exit status: 0 done; 1 it could not be done, or did not verify (one line on stderr); 2 wrong usage.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import shardkit
from shardkit.base.errors import ShardkitError
from shardkit.base.extras import require
from shardkit.base.record import Record, listed, printable
from shardkit.base.sizes import format_size
from shardkit.plan.plan import Strategy
from shardkit.shard.destination import free_bytes, leftovers, remove_leftovers
from shardkit.show.progress import ProgressBar
from shardkit.sources.resolve import is_on_hub

if TYPE_CHECKING:
    from shardkit.compare.fit import LimitedRun

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Reshard any Hugging Face checkpoint without loading it, and prove that nothing was lost."""
    if show:
        print(shardkit.__version__)
        raise typer.Exit


Source = Annotated[
    str, typer.Argument(help="A folder, a weights file, or a model on the Hub: org/name, org/name@revision.")
]
MaxShardSize = Annotated[str, typer.Option(help='The most bytes a file may have: "500MB", "1.5GiB".')]
StrategyOption = Annotated[
    Strategy, typer.Option(help="Fill files in order, write one per layer, or few of nearly equal size.")
]
Dtype = Annotated[str | None, typer.Option(help="Cast floating-point tensors: float16, bfloat16 or float32.")]
LoadDtype = Annotated[str | None, typer.Option(help="What to load in: float16, bfloat16 or float32.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads at work (default: up to 4).")]
Public = Annotated[bool, typer.Option("--public", help="The repository on the Hub is, or shall be, public.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that the checkpoint brings: only if you trust it."
    ),
]


def _load_options(trust_remote_code: bool) -> dict[str, Any] | None:
    return {"trust_remote_code": True} if trust_remote_code else None


def _without(option: str, told: str) -> Any:
    """Declare an option that only switches something off."""
    return typer.Option(f" /{option}", show_default=False, help=told)


@app.command()
def inspect(source: Source, dtype: LoadDtype = None, as_json: Json = False) -> None:
    """Show what a checkpoint contains, and what loading it takes, from its headers alone."""
    if left := leftovers(source):
        _say(
            f"an interrupted run left {listed(map(str, left))}: `shardkit clean {source}` removes it; "
            "the same `shardkit shard` as before goes on from there"
        )
    checkpoint = shardkit.Checkpoint.open(source)
    estimate = checkpoint.estimate(dtype)
    _show(checkpoint, as_json, estimate, estimate=estimate.to_dict())


@app.command()
def plan(
    source: Source,
    max_shard_size: MaxShardSize = "2GB",
    strategy: StrategyOption = "size",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Dry run: show the files that would be written."""
    checkpoint = shardkit.Checkpoint.open(source)
    made = shardkit.plan_shards(checkpoint, max_shard_size=max_shard_size, strategy=strategy, dtype=dtype)
    free = free_bytes(".")
    verdict = "enough" if free >= made.disk_bytes else "NOT enough"
    room = f"{format_size(free)} free on the disk of this folder: {verdict}"
    room = room if free < sys.maxsize else "how much is free on the disk of this folder is unknown"
    now = checkpoint.estimate(dtype)
    then = made.estimate(now.dtype, config=checkpoint.config, side_files=checkpoint.side_files)
    _show(
        made,
        as_json,
        f"  {room}\n"
        f"  {then.needed} of anonymous memory (cannot be evicted) to load the shards as "
        f"{now.dtype or 'stored'}, {now.needed} to load the checkpoint as it is now",
        disk_bytes=made.disk_bytes,
        free_bytes=free if free < sys.maxsize else None,
        estimate={"before": now.to_dict(), "after": then.to_dict()},
    )


@app.command()
def shard(
    source: Source,
    destination: Annotated[
        str, typer.Argument(help="A folder that does not exist yet, or is empty; or hf://owner/name.")
    ],
    max_shard_size: MaxShardSize = "2GB",
    strategy: StrategyOption = "size",
    dtype: Dtype = None,
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is there, once this one is whole.")
    ] = False,
    resume: Annotated[bool, _without("--no-resume", "Write again what an interrupted run finished.")] = True,
    verify: Annotated[bool, _without("--no-verify", "Skip reading both sides again at the end.")] = True,
    allow_overflow: Annotated[
        bool, typer.Option("--allow-overflow", help="Let a cast turn finite values into infinities.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--download",
            show_default=False,
            help="Make shards of a model on the Hub straight from ranged reads, or download it first "
            "(default: where the disk has room for both).",
        ),
    ] = None,
    public: Public = False,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint as shards, without loading it, and verify them."""
    common: dict[str, Any] = {"max_shard_size": max_shard_size, "strategy": strategy, "dtype": dtype}
    common |= {"workers": workers, "verify": verify, "allow_overflow": allow_overflow}
    with _told_how_to_go_on(), _progress_bar() as bar:
        common["progress"] = bar
        if is_on_hub(destination):
            if overwrite or not resume or stream is not None:
                raise typer.BadParameter("--overwrite, --no-resume, --stream, --download are for folders")
            report = shardkit.shard_on_hub(source, destination[5:], private=not public, **common)
        else:
            if public:
                raise typer.BadParameter("--public is for hf:// destinations")
            common |= {"overwrite": overwrite, "resume": resume, "stream": stream}
            report = shardkit.shard_checkpoint(source, destination, **common)
    _show(report, as_json)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A folder that shardkit has written, or like one.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name; made, private, where it is not there.")],
    public: Public = False,
) -> None:
    """Put a sharded checkpoint on the Hub, in one commit, and print its URL."""
    with _told_how_to_go_on(), _progress_bar() as bar:
        url = shardkit.push_checkpoint(folder, repo_id, private=not public, progress=bar)
    print(url)


@app.command()
def verify(source: Source, destination: Source, workers: Workers = None, as_json: Json = False) -> None:
    """Compare the tensors of two checkpoints, however they are laid out; after a cast, source first."""
    with _progress_bar() as bar:
        found = shardkit.verify_checkpoint(source, destination, workers=workers, progress=bar)
    _show(found, as_json)
    if not found.equal:
        raise ShardkitError(f"{destination} is not what {source} is: {found.why_unequal}")


@app.command()
def clean(destination: Annotated[str, typer.Argument(help="The folder that was being written.")]) -> None:
    """Remove what interrupted runs have left beside a destination; the destination itself stays."""
    removed = remove_leftovers(destination)
    print("\n".join(f"removed {printable(str(path))}" for path in removed) or "nothing to be removed")


@app.command()
def compare(
    original: Source,
    sharded: Source,
    dtype: LoadDtype = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of loads.")] = 5,
    cache: Annotated[str, typer.Option(help="cold: read from the disk; warm: from the page cache.")] = "cold",
    device: Annotated[str, typer.Option(help="Where both are loaded to: cpu, cuda, cuda:1, auto.")] = "cpu",
    memory_limit: Annotated[
        str | None, typer.Option(help='Memory that each load may have: "12.7GB" to simulate Colab\'s limit.')
    ] = None,
    prefetch: Annotated[
        bool,
        typer.Option(
            "--prefetch",
            help="Load the sharded a third way, its files read ahead; times then count from process start.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    same_model: Annotated[bool, _without("--no-same-model", "Compare different models all the same.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Write everything here: .json, or .html to share.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it here: .png or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """Load both in turn, each time in a fresh process, and say what differs."""
    _require_writable(output, plot)

    def progress(done: int, total: int, label: str) -> None:
        print(f"  {done}/{total} {label}", file=sys.stderr)

    found = shardkit.compare_loads(
        original,
        sharded,
        dtype=dtype,
        repeats=repeats,
        cache=cache,
        device=device,
        memory_limit=memory_limit,
        same_model=same_model,
        others={"prefetched": {"prefetch": True}} if prefetch else None,
        options=_load_options(trust_remote_code),
        progress=progress,
    )
    _show(found, as_json)
    if output is not None:
        found.save(output)
    if plot is not None:
        found.plot(plot)
    # That a variant dies under a limit is what was asked for; that it does not load at all is not.
    if found.failures and (memory_limit is None or len(found.failures) == len(found.variants)):
        raise ShardkitError(found.verdict)


@app.command()
def fit(
    source: Source,
    dtype: LoadDtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the smallest memory limit under which it loads, by real loads: it takes minutes.

    A load that takes five times as long as without a limit, and at least a minute, counts as failed.
    """

    def progress(run: LimitedRun) -> None:
        print(f"  {format_size(run.limit_bytes)}: {run.end}", file=sys.stderr)

    options = _load_options(trust_remote_code)
    _show(shardkit.minimum_memory(source, dtype=dtype, options=options, progress=progress), as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The folder to make it in.")] = Path("mistral-demo"),
    size: Annotated[str, typer.Option(help="Bytes of its weights, from 5MB to 14.5GB.")] = "512MB",
    as_json: Json = False,
) -> None:
    """Make a small Mistral checkpoint with random weights and a tokenizer, to try things on."""
    _show(shardkit.make_demo_checkpoint(output, size=size), as_json)


def _require_writable(output: Path | None, plot: Path | None) -> None:
    """Refuse files that could not be written or drawn: now, not after minutes of loads."""
    for path, endings in ((output, (".json", ".html", ".htm")), (plot, (".png", ".svg"))):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ShardkitError(f"{path}: its folder does not exist")
        if path.is_dir():
            raise ShardkitError(f"{path}: is a folder: give the name of a file in it")
        if path.suffix.lower() not in endings:
            raise ShardkitError(f"{path}: give a name that ends in {' or '.join(endings[:2])}")
        if path.suffix.lower() != ".json":
            require("notebook", f"drawing {path}", "matplotlib")


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        os._exit(130)  # without waiting for a disk that is busy with what is to be written again


def _progress_bar() -> ProgressBar:
    columns, lines = shutil.get_terminal_size()  # the usual, where a terminal says that it has none
    return ProgressBar(disable=not sys.stderr.isatty(), ncols=min(columns, 100), nrows=lines)


def _show(record: Record, as_json: bool, *more: object, **fields: object) -> None:
    """Print a record and more as text, or as JSON with the fields that stand for more."""
    print(json.dumps(record.to_dict() | fields) if as_json else "\n\n".join(map(str, (record, *more))))


def main() -> None:
    """Run the command line; every error that is not a bug ends in one line and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters is no error
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the Hub's client is imported
    try:
        app()  # which ends in an exit of its own
    except ShardkitError as error:
        _say("; ".join((str(error), *getattr(error, "__notes__", ()))))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _say(f"{error.filename or 'system'}: {error.strerror or error}")
    sys.exit(1)


def _say(message: str) -> None:
    print(f"shardkit: {printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    main()
