"""How commands are declared: what is no value is wrong usage, and what is not given, the package decides.

Python's own argparse, because Typer with what it needs would be a fifth of all that is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn

import shardkit
from shardkit.base.cluster import DASK, check_address
from shardkit.base.errors import ShardkitError, meant, misspelled
from shardkit.base.sizes import parse_size
from shardkit.checkpoint.budget import MOST
from shardkit.cli.terminal import say
from shardkit.formats.tensor import dtype_name
from shardkit.measure.samples import AUTO, MOST_PAIRS
from shardkit.measure.spec import RULES
from shardkit.plan.packing import STRATEGIES, packing
from shardkit.plan.plan import USUAL
from shardkit.shard.in_parts import FINISH, check_part

Argument = tuple[str, dict[str, Any]]

_FEW_BYTES = 1_000_000


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every error is said."""

    def error(self, message: str) -> NoReturn:
        say(f"{message.removesuffix('?')}; see `{self.prog} --help`")
        sys.exit(2)


_PARSER = _Parser(
    prog="shardkit",
    description="Reshard any Hugging Face checkpoint without loading it, and verify that nothing was lost.",
    epilog="to begin: shardkit demo; it says what may come next, as most commands do. Ctrl-C stops any.",
    allow_abbrev=False,
)
_PARSER.add_argument(
    "--version", action="version", version=shardkit.__version__, help="Print the version and exit."
)
_COMMANDS = _PARSER.add_subparsers(title="commands", metavar="COMMAND", required=True)


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Return what a command line asks for; wrong usage ends in status 2."""
    if not words:
        _PARSER.print_help()
        sys.exit(2)
    if not words[0].startswith("-") and words[0] not in _COMMANDS.choices:
        _PARSER.error(misspelled("command", words[0], _COMMANDS.choices))
    asked, unknown = _PARSER.parse_known_args(words)
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
        near = meant(option, _COMMANDS.choices[words[0]]._option_string_actions)
        wrong_usage(words[0], f"unrecognized arguments: {' '.join(unknown)}{near}")
    return vars(asked)


def wrong_usage(command: str, message: str) -> NoReturn:
    """End in status 2 for arguments that do not go together."""
    parser: argparse.ArgumentParser = _COMMANDS.choices[command]
    parser.error(message)


def argument(name: str, said: str, **options: Any) -> Argument:
    """Declare an argument, or an option if its name begins with dashes; its default is shown in its help."""
    shown = " (default: %(default)s)" if "default" in options else ""
    return name, {"help": said.replace("%", "%%") + shown, **options}


def switch(name: str, said: str, means: object = True, **options: Any) -> Argument:
    """Declare an option without a value: what it means where it is given."""
    return name, {"help": said, "action": "store_const", "const": means, **options}


def without(option: str, said: str) -> Argument:
    """Declare an option that only switches something off."""
    return switch(f"--no-{option}", said, False, dest=option.replace("-", "_"))


def command(
    *arguments: Argument, examples: str = "", destination: str = "", is_required: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function; its docstring is the help, its parameters are the arguments.

    One that has a `destination` takes it by its place or as --output, whichever comes to mind.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        said = dedent(f"    {function.__doc__ or ''}").strip().replace("%", "%%")
        parser = _COMMANDS.add_parser(
            function.__name__,
            help=said.partition("\n")[0],
            description=said,
            epilog="examples:\n" + "\n".join(f"  shardkit {line.strip()}" for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        for name, options in arguments:
            parser.add_argument(name, **options)
        if destination:
            either = parser.add_mutually_exclusive_group(required=is_required)
            either.add_argument("destination", nargs="?", help=destination)
            either.add_argument(
                "--output", dest="destination", metavar="DESTINATION", help="Another way to give it."
            )
        parser.set_defaults(command=function)
        return function

    return add


def _valued(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make wrong usage of what is none of the values that an option has."""

    def value(text: str) -> Any:
        try:
            return convert(text)
        except ShardkitError as error:
            words = str(error).removeprefix("dtype ").removeprefix("strategy ")  # which argparse says itself
            raise argparse.ArgumentTypeError(words) from None

    return value


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Return what takes text as it was typed, unless a check refuses it."""

    @_valued
    def value(text: str) -> str:
        check(text)
        return text

    return value


def _or(word: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return what takes a word as well."""

    def value(text: str) -> Any:
        try:
            return text if text == word else convert(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or {word}") from None

    return value


def _at_least_one(text: str) -> int:
    """Return a whole number above zero, as `Sequences` takes it."""
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number above zero, at most {MOST:,}")
    return int(text)


@_valued
def _seconds(text: str) -> float:
    """Return a number of seconds."""
    if not text.replace(".", "", 1).isdecimal():
        raise ShardkitError(f"{text!r} is not a number of seconds, such as 90 or 0.5")
    return float(text)


@_valued
def _size(text: str) -> str:
    """Return a size as it was typed; few bytes without a unit are megabytes that lack it."""
    if parse_size(text) < _FEW_BYTES and text.strip().isdecimal():
        raise ShardkitError(f"{text} has no unit: for megabytes, type {text}MB; for bytes, {text}B")
    return text


NUMBER: dict[str, Any] = {"type": _at_least_one, "metavar": "N"}
SIZE: dict[str, Any] = {"type": _size, "metavar": "SIZE"}
device = _checked(RULES["device"])
rate = _or("measure", lambda text: _size(text.removesuffix("/s")))


@_valued
def part(text: str) -> tuple[int, int]:
    """Return the number of a part, and of how many."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ShardkitError(f"{text!r} is not I/N, such as 3/8")
    check_part((int(number), int(of)))
    return int(number), int(of)


def file(*endings: str) -> Callable[[str], Path]:
    """Return what takes the name of a file to write, which has to end in one of these."""

    @_valued
    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in endings:
            raise ShardkitError(f"{text} must end in {' or '.join(endings[:2])}")
        return Path(text)

    return path


A_SOURCE = (
    "A folder, a weights file, s3://bucket/name, or a model on the Hub: org/name, org/name@revision; or on "
    "Kaggle: kaggle://owner/model/framework/variation."
)
SOURCE = argument("source", A_SOURCE)
MAX_SHARD_SIZE = argument(
    "--max-shard-size", f"Maximum size of a file: 500MB, 2G, 1.5GiB (default: {USUAL[0]}).", **SIZE
)
STRATEGY = argument(
    "--strategy",
    "; ".join(f"{name}: {packing.words}" for name, packing in STRATEGIES.items())
    + f" (default: {USUAL[1]}).",
    type=_checked(packing),
    metavar=f"{{{','.join(STRATEGIES)}}}",
)
FILES = argument(
    "--files", "Instead of size and strategy: so many files of nearly equal size; 1 merges.", **NUMBER
)
RANKS = argument(
    "--ranks",
    "For so many processes of tensor parallelism: each reads only its part; plain from_pretrained cannot.",
    **NUMBER,
)
LAYOUT = (MAX_SHARD_SIZE, STRATEGY, FILES, RANKS)
_DTYPES = "float16, bfloat16 or float32; also fp16, half, bf16, fp32."
DTYPE = argument(
    "--dtype", f"Cast floating-point tensors: {_DTYPES}", type=_valued(dtype_name), metavar="DTYPE"
)
LOAD_DTYPE = argument(
    "--dtype",
    f"Load dtype: {_DTYPES}",
    type=_valued(lambda text: text if text == "auto" else dtype_name(text)),
    metavar="DTYPE",
)
MAX_MEMORY = argument("--max-memory", "Memory that the process may need: 2GB.", **SIZE)
REPEATS = (
    argument(
        "--repeats",
        "Pairs of loads; auto: as many as every verdict needs, up to --most.",
        type=_or(AUTO, _at_least_one),
        default=5,
        metavar="N|auto",
    ),
    argument("--most", f"Most pairs with --repeats auto (default: {MOST_PAIRS}).", **NUMBER),
    argument(
        "--most-seconds",
        "With --repeats auto: begin no pair after so long.",
        type=_seconds,
        metavar="SECONDS",
    ),
)
WORKERS = argument("--workers", "Number of threads (default: up to 4).", **NUMBER)
EXECUTOR = argument(
    "--executor",
    f"Dask's scheduler, whose workers do the work: {DASK}HOST:PORT.",
    type=_valued(check_address),
    metavar="ADDRESS",
)
PARTS = (
    argument(
        "--part",
        "Make one part of the files, as a task of a job array; the last to finish publishes all.",
        type=part,
        metavar="I/N",
    ),
    switch("--finish", "Publish the parts, once all are made.", FINISH, dest="part"),
)
PUBLIC = switch("--public", "The Hub repository is public, or is created as public.", False, dest="private")
JSON = switch("--json", "Print one JSON object and nothing else.", dest="as_json")
TRUST_REMOTE_CODE = switch(
    "--trust-remote-code",
    "Run custom code from the checkpoint; only if you trust it.",
    {"trust_remote_code": True},
    dest="options",
)
