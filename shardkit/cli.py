"""The command line: the package's functions under the same names, and nothing else.

Exit status: 0 done; 1 it could not be done, or did not verify (one line on stderr); 2 wrong usage.

Python's own argparse, because Typer with what it needs would be a fifth of all that is installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shardkit
from shardkit.base.errors import ShardkitError
from shardkit.base.extras import require
from shardkit.base.record import Record, listed, printable
from shardkit.base.sizes import format_size
from shardkit.plan.packing import STRATEGIES, Strategy
from shardkit.shard.destination import free_bytes, leftovers, remove_leftovers
from shardkit.show.progress import ProgressBar
from shardkit.sources.resolve import is_on_hub

if TYPE_CHECKING:
    from shardkit.compare.fit import LimitedRun

Argument = tuple[str, dict[str, Any]]

# What messages advise in Python's words, in those of the command line.
_IN_THE_TERMINAL = {
    'options={"trust_remote_code": True}': "--trust-remote-code",
    "allow_overflow=True": "--allow-overflow",
    "overwrite=True": "--overwrite",
    "private=False": "--public",
    "same_model=False": "--no-same-model",
    "stream=True": "--stream",
}

_PARSER = argparse.ArgumentParser(
    prog="shardkit",
    description="Reshard any Hugging Face checkpoint without loading it, and verify that nothing was lost.",
    allow_abbrev=False,
)
_PARSER.add_argument(
    "--version", action="version", version=shardkit.__version__, help="Print the version and exit."
)
_COMMANDS = _PARSER.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _argument(name: str, told: str, **options: Any) -> Argument:
    """Declare an argument, or an option if its name begins with dashes; its default is shown in its help."""
    shown = " (default: %(default)s)" if options.get("default") not in (None, argparse.SUPPRESS) else ""
    return name, {"help": told.replace("%", "%%") + shown, **options}


def _switch(name: str, told: str, **options: Any) -> Argument:
    """Declare an option without a value."""
    return name, {"help": told, "action": "store_true", **options}


def _without(option: str, told: str) -> Argument:
    """Declare an option that only switches something off."""
    return _switch(f"--no-{option}", told, action="store_false", dest=option.replace("-", "_"))


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _command(*arguments: Argument) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function; its docstring is the help, its parameters are the arguments."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        told = (function.__doc__ or "").replace("%", "%%")
        parser = _COMMANDS.add_parser(
            function.__name__, help=told.partition("\n")[0], description=told, allow_abbrev=False
        )
        for name, options in arguments:
            parser.add_argument(name, **options)
        parser.set_defaults(command=function)
        return function

    return add


_A_SOURCE = "A folder, a weights file, or a model on the Hub: org/name, org/name@revision."
SOURCE = _argument("source", _A_SOURCE)
MAX_SHARD_SIZE = _argument(
    "--max-shard-size", 'Maximum size of a file: "500MB", "1.5GiB".', default="2GB", metavar="SIZE"
)
STRATEGY = _argument(
    "--strategy",
    "; ".join(f"{name}: {packing.words}" for name, packing in STRATEGIES.items()) + ".",
    choices=list(STRATEGIES),
    default="size",
)
DTYPE = _argument("--dtype", "Cast floating-point tensors: float16, bfloat16 or float32.")
LOAD_DTYPE = _argument("--dtype", "Load dtype: float16, bfloat16 or float32.")
WORKERS = _argument("--workers", "Number of threads (default: up to 4).", type=_at_least_one, metavar="N")
PUBLIC = _switch("--public", "The Hub repository is public, or is created as public.")
JSON = _switch("--json", "Print one JSON object and nothing else.", dest="as_json")
TRUST_REMOTE_CODE = _switch(
    "--trust-remote-code", "Run custom code from the checkpoint; only if you trust it."
)


def _load_options(trust_remote_code: bool) -> dict[str, Any] | None:
    return {"trust_remote_code": True} if trust_remote_code else None


@_command(SOURCE, LOAD_DTYPE, JSON)
def inspect(source: str, dtype: str | None, as_json: bool) -> None:
    """Show what a checkpoint contains and how much memory loading it takes, from its headers."""
    if left := leftovers(source):
        _say(
            f"an interrupted run left {listed(map(str, left))}: run the same `shardkit shard` again to "
            f"resume, or `shardkit clean {source}` to remove it"
        )
    checkpoint = shardkit.Checkpoint.open(source)
    estimate = checkpoint.estimate(dtype)
    _show(checkpoint, as_json, estimate, estimate=estimate.to_dict())


@_command(SOURCE, MAX_SHARD_SIZE, STRATEGY, DTYPE, JSON)
def plan(source: str, max_shard_size: str, strategy: Strategy, dtype: str | None, as_json: bool) -> None:
    """Dry run: show the files that would be written."""
    checkpoint = shardkit.Checkpoint.open(source)
    made = shardkit.plan_shards(checkpoint, max_shard_size=max_shard_size, strategy=strategy, dtype=dtype)
    free = free_bytes(".")
    verdict = "enough" if free >= made.disk_bytes else "NOT enough"
    room = f"{format_size(free)} free on the disk of this folder: {verdict}"
    room = room if free < sys.maxsize else "free space on the disk of this folder is unknown"
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


@_command(
    SOURCE,
    _argument("destination", "A new or empty folder, or hf://owner/name."),
    MAX_SHARD_SIZE,
    STRATEGY,
    DTYPE,
    WORKERS,
    _switch("--overwrite", "Replace an existing checkpoint, once the new one is complete."),
    _without("resume", "Start over instead of resuming."),
    _without("verify", "Skip the verification at the end."),
    _switch("--allow-overflow", "Allow a cast that turns finite values infinite."),
    _switch("--stream", "Stream a model from the Hub into shards, without downloading it.", default=None),
    _switch(
        "--download",
        "Download it first (default: if the disk has room for both).",
        action="store_false",
        dest="stream",
        default=None,
    ),
    PUBLIC,
    JSON,
)
def shard(
    source: str,
    destination: str,
    overwrite: bool,
    resume: bool,
    stream: bool | None,
    public: bool,
    as_json: bool,
    **common: Any,
) -> None:
    """Rewrite a checkpoint as shards, without loading it, and verify them."""
    wrong_usage = _COMMANDS.choices["shard"].error
    with _told_how_to_go_on(), _progress_bar() as bar:
        common["progress"] = bar
        if is_on_hub(destination):
            if overwrite or not resume or stream is not None:
                wrong_usage("--overwrite, --no-resume, --stream, --download only apply to folders")
            report = shardkit.shard_on_hub(source, destination[5:], private=not public, **common)
        else:
            if public:
                wrong_usage("--public only applies to hf:// destinations")
            common |= {"overwrite": overwrite, "resume": resume, "stream": stream}
            report = shardkit.shard_checkpoint(source, destination, **common)
    _show(report, as_json)


@_command(
    _argument("folder", "A folder written by shardkit, or one like it."),
    _argument("repo_id", "owner/name; created as private if it does not exist.", metavar="repo-id"),
    PUBLIC,
)
def push(folder: str, repo_id: str, public: bool) -> None:
    """Push a sharded checkpoint to the Hub in one commit, and print its URL."""
    with _told_how_to_go_on(), _progress_bar() as bar:
        url = shardkit.push_checkpoint(folder, repo_id, private=not public, progress=bar)
    print(url)


@_command(SOURCE, _argument("destination", _A_SOURCE), WORKERS, JSON)
def verify(source: str, destination: str, workers: int | None, as_json: bool) -> None:
    """Compare the tensors of two checkpoints, however they are sharded; after a cast, source first."""
    with _progress_bar() as bar:
        found = shardkit.verify_checkpoint(source, destination, workers=workers, progress=bar)
    _show(found, as_json)
    if not found.equal:
        raise ShardkitError(f"{destination} does not match {source}: {found.why_unequal}")


@_command(_argument("destination", "The destination of the interrupted run."))
def clean(destination: str) -> None:
    """Remove what interrupted runs left next to a destination; the destination itself is kept."""
    removed = remove_leftovers(destination)
    print(
        "\n".join(f"removed {printable(str(path))}" for path in removed)
        or f"nothing to remove next to {printable(destination)}"
    )


@_command(
    _argument("original", _A_SOURCE),
    _argument("sharded", _A_SOURCE),
    LOAD_DTYPE,
    _argument("--repeats", "Pairs of loads.", type=_at_least_one, default=5, metavar="N"),
    _argument("--cache", "cold: read from the disk; warm: from the page cache.", default="cold"),
    _argument("--device", "Device to load to: cpu, cuda, cuda:1, auto.", default="cpu"),
    _argument("--memory-limit", 'Memory limit of each load: "12.7GB" to simulate Colab\'s limit.'),
    _argument("--max-memory", 'Budget of each load, which streams what does not fit: "2GB".', metavar="SIZE"),
    _argument("--generate", "Tokens after each load.", type=_at_least_one, default=1, metavar="N"),
    _switch(
        "--prefetch",
        "Also load the shards with their files prefetched; times then count from process start.",
    ),
    TRUST_REMOTE_CODE,
    _without("same-model", "Compare even if the models differ."),
    _argument("--output", "Save all results here: .json, or .html to share.", type=Path, metavar="FILE"),
    _argument("--plot", "Save a plot here: .png or .svg.", type=Path, metavar="FILE"),
    JSON,
)
def compare(
    original: str,
    sharded: str,
    memory_limit: str | None,
    prefetch: bool,
    trust_remote_code: bool,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Load two checkpoints in turn, each time in a fresh process, and report what differs."""
    _require_writable(output, plot)

    def progress(done: int, total: int, label: str) -> None:
        print(f"  {done}/{total} {label}", file=sys.stderr)

    found = shardkit.compare_loads(
        original,
        sharded,
        **asked,
        memory_limit=memory_limit,
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


@_command(SOURCE, LOAD_DTYPE, TRUST_REMOTE_CODE, JSON)
def fit(source: str, dtype: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Find the smallest memory limit under which a checkpoint loads, by real loads; takes minutes.

    A load that takes five times as long as without a limit, and at least a minute, counts as failed.
    """

    def progress(run: LimitedRun) -> None:
        print(f"  {format_size(run.limit_bytes)}: {run.end}", file=sys.stderr)

    options = _load_options(trust_remote_code)
    _show(shardkit.minimum_memory(source, dtype=dtype, options=options, progress=progress), as_json)


@_command(
    SOURCE,
    _argument("--prompt", "Text to continue.", required=True, metavar="TEXT"),
    _argument("--max-memory", 'Memory that the process may need: "2GB".', metavar="SIZE"),
    _argument("--max-new-tokens", "Tokens to add.", type=_at_least_one, default=32, metavar="N"),
    LOAD_DTYPE,
    JSON,
)
def generate(source: str, dtype: str | None, as_json: bool, **asked: Any) -> None:
    """Continue a prompt, token by token, with a model that may be larger than its memory."""
    from shardkit.load.generate import generate_text

    show = None if as_json else partial(print, end="", flush=True)
    found = generate_text(source, dtype=dtype or "auto", on_text=show, **asked)
    if as_json:
        _show(found, as_json)
    else:
        print()
        _say(found.status)


@_command(
    _argument("--output", "Destination folder.", type=Path, default=Path("mistral-demo")),
    _argument("--size", "Size of the weights, from 5MB to 14.5GB.", default="512MB"),
    JSON,
)
def demo(output: Path, size: str, as_json: bool) -> None:
    """Make a small Mistral checkpoint with random weights and a tokenizer, to try things out."""
    _show(shardkit.make_demo_checkpoint(output, size=size), as_json)


def _require_writable(output: Path | None, plot: Path | None) -> None:
    """Refuse files that could not be written or drawn: now, not after minutes of loads."""
    for path, endings in ((output, (".json", ".html", ".htm")), (plot, (".png", ".svg"))):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ShardkitError(f"{path}: the folder does not exist")
        if path.is_dir():
            raise ShardkitError(f"{path} is a folder: choose a file in it")
        if path.suffix.lower() not in endings:
            raise ShardkitError(f"{path} must end in {' or '.join(endings[:2])}")
        if path.suffix.lower() != ".json":
            require("notebook", f"drawing {path}", "matplotlib")


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; run the same command again to resume")
        os._exit(130)  # without waiting for a disk that is busy with what is to be written again


def _progress_bar() -> ProgressBar:
    columns, lines = shutil.get_terminal_size()  # the usual, where a terminal says that it has none
    return ProgressBar(disable=not sys.stderr.isatty(), ncols=min(columns, 100), nrows=lines)


def _show(record: Record, as_json: bool, *more: object, **fields: object) -> None:
    """Print a record and more as text, or as JSON with the fields that stand for more."""
    text = "\n\n".join(map(str, (record, *more)))
    print(json.dumps(record.to_dict() | fields) if as_json else _in_the_terminal(text))


def run(words: Sequence[str]) -> None:
    """Do what the words of a command line say; wrong usage ends in status 2."""
    if not words:
        _PARSER.print_help()
        sys.exit(2)
    asked = vars(_PARSER.parse_args(words))
    asked.pop("command")(**asked)


def main() -> None:
    """Run the command line; every error that is not a bug ends in one line and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters is no error
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the Hub's client is imported
    try:
        run(sys.argv[1:])
        sys.exit(0)
    except ShardkitError as error:
        _say("; ".join((str(error), *getattr(error, "__notes__", ()))))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _say(f"{error.filename or 'system'}: {error.strerror or error}")
    sys.exit(1)


def _say(message: str) -> None:
    print(f"shardkit: {printable(_in_the_terminal(message))}", file=sys.stderr)


def _in_the_terminal(text: str) -> str:
    for words, here in _IN_THE_TERMINAL.items():
        text = text.replace(words, here)
    return text
