"""What a person sees in a terminal: color, lines that fit its width, progress; in a pipe, plain text."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from shardkit.base.errors import Interrupted
from shardkit.base.record import Record, Summary, printable, shown_path
from shardkit.base.sizes import format_size
from shardkit.compare.comparison import Comparison
from shardkit.compare.fit import LimitedRun, loads_left
from shardkit.measure.quantities import format_seconds
from shardkit.show.progress import ProgressBar

# What messages advise in Python's words, in those of the command line.
_IN_THE_TERMINAL = {
    'options={"trust_remote_code": True}': "--trust-remote-code",
    "load_model(max_memory=...)": "`shardkit generate --max-memory`",
    "private=False": "--public",
    "same_model=False": "--no-same-model",
    "verify=False": "--no-verify",
}
_ARGUMENT = re.compile(
    r"(?<![\w/])(\w+(?==True)|max_memory|max_shard_size|free_source|(?<=leave out )(?:dtype|part)"
    r"|files(?= divides)|(?<=max_shard_size and )strategy)(?![\w/])(?:=True)?"
)
_RED, _YELLOW, _GREEN, _BOLD = "31", "33", "32", "1"
_RATIO = r"(?<!between )(?<!and )\b[\d.]+(?:x| %)"
_NO = r"NOT EQUAL|NOT enough|DIFFERENT|\bdo(?:es)? not (?:fit|load)|(?<=  )(?:needs \S+ .?B|too slow)"
_VERDICTS = {
    _RED: rf"{_NO}|{_RATIO} (?:slower|larger|more)\b",
    _YELLOW: r"(?<=  )reads \S+ .?B|(?<=  )download fits|inconclusive|not (?:checked|proven)|NOT proven|^  !",
    _GREEN: rf"(?<=  )(?:equal|fits)\b|\b(?:gets the same|enough)\b|{_RATIO} (?:faster|smaller|less)\b",
    _BOLD: r"^[A-Z][a-z ]+$|^next:",
}
_VERDICT = re.compile("|".join(f"(?P<c{code}>{words})" for code, words in _VERDICTS.items()), re.MULTILINE)


def is_colored(stream: TextIO) -> bool:
    """Whether color is seen there, and wanted: see https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, stream: TextIO) -> str:
    """Return text with its verdicts in color, where color is seen."""
    if not is_colored(stream):
        return text
    return _VERDICT.sub(lambda found: f"\x1b[{str(found.lastgroup)[1:]}m{found[0]}\x1b[0m", text)


def say(message: str) -> None:
    """Print a line to stderr, in place of a bar that is there."""
    head = "\r\x1b[K" if sys.stderr.isatty() else ""
    name = "\x1b[1;31mshardkit:\x1b[0m" if is_colored(sys.stderr) else "shardkit:"
    print(f"{head}{name} {printable(in_the_terminal(message))}", file=sys.stderr)


def show(
    record: Record, *more: Record | Summary, as_json: bool, following: str = "", **fields: object
) -> None:
    """Print records as text, or the first as JSON, with the fields that stand for the others.

    A pipe gets all rows of their tables, a terminal what fits on a screen.
    """
    if as_json:
        print(json.dumps(record.to_dict() | fields))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    summaries = (
        part if isinstance(part, Summary) else part.complete_summary() if width is None else part.summary()
        for part in (record, *more)
    )
    text = "\n\n".join([*(summary.text(width) for summary in summaries), *filter(None, [following])])
    print(painted(in_the_terminal(text), sys.stdout))


def next_step(*words: object, **options: object) -> str:
    """Return the command that may come next, as it is typed."""
    given = {name: value for name, value in options.items() if value is not None}
    typed = (text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value))
    return f"next: shardkit {shlex.join(map(str, (*words, *typed)))}"


def in_the_terminal(text: str) -> str:
    """Return text with what it advises in the words of the command line."""
    for words, here in _IN_THE_TERMINAL.items():
        text = text.replace(words, here)
    return _ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')}", text)


def progress_bar() -> ProgressBar:
    """Return a bar that is there in a terminal only."""
    columns, lines = shutil.get_terminal_size()  # the usual, where a terminal says that it has none
    return ProgressBar(disable=not sys.stderr.isatty(), ncols=min(columns, 100), nrows=lines)


@contextmanager
def in_part(output: Path | None, as_json: bool) -> Iterator[Callable[[Comparison], None]]:
    """Give a function that keeps what was measured; of a comparison that is stopped, show and save that."""
    last: deque[Comparison] = deque(maxlen=1)
    try:
        yield last.append
    except KeyboardInterrupt as error:
        found = next(iter(last), None)
        if found is None or len(found.samples) < len(found.variants):
            raise
        if output is not None:
            found.save(output)
        if not as_json:
            show(replace(found, notes=(*found.notes, "stopped before its end")), as_json=False)
            sys.stdout.flush()
        kept = f"; {shown_path(str(output))} has what was measured" * (output is not None)
        raise Interrupted(f"stopped{kept}") from error


@contextmanager
def typed(as_json: bool) -> Iterator[Callable[[str], None] | None]:
    """Give what prints text piece by piece; what follows begins a line, also where Ctrl-C ends it."""
    if as_json:
        yield None
        return
    try:
        yield partial(print, end="", flush=True)
    except KeyboardInterrupt as error:
        print(flush=True)
        raise Interrupted("stopped") from error
    print()


def show_run(done: int, total: int, label: str) -> None:
    """Print what the next of many runs is: for a pipe, which a bar is not made for."""
    print(f"  {done}/{total} {label}", file=sys.stderr)


def limited_runs() -> Callable[[LimitedRun], None]:
    """Return what prints each load under a limit, and once there is a bracket, how long others may take."""
    runs: list[LimitedRun] = []
    began = time.monotonic()
    print("  loading without a limit first ...", file=sys.stderr)

    def show_limited(run: LimitedRun) -> None:
        runs.append(run)
        each = (time.monotonic() - began) / (len(runs) + 1)
        left = loads_left(runs)
        words = f", {left} more or so, {format_seconds(each * left)}" if left else ""
        print(f"  {format_size(run.limit_bytes)}: {run.end}{words}", file=sys.stderr)

    return show_limited
