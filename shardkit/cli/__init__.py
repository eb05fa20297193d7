"""The command line: the package's functions under the same names, and nothing else.

Exit status: 0 done; 1 it could not be done, or did not verify; 2 wrong usage, a value that is none among it;
130 stopped by Ctrl-C. Whatever is not 0 says why in one line on stderr.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

from shardkit.base.errors import ShardkitError, SizeError, SourceError
from shardkit.cli import commands as commands
from shardkit.cli import trying as trying
from shardkit.cli.arguments import parse
from shardkit.cli.terminal import say


def run(words: Sequence[str]) -> None:
    """Do what the words of a command line say; wrong usage ends in status 2."""
    asked = parse(words)
    asked.pop("command")(**asked)


def main() -> None:
    """Run the command line; every error that is not a bug ends in one line."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by whoever started us
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few characters is no error
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the Hub's client is imported
    warnings.showwarning = lambda message, *_: say(str(message))
    try:
        run(sys.argv[1:])
        sys.exit(0)
    except ShardkitError as error:
        say("; ".join((str(error), *getattr(error, "__notes__", ()))))
        sys.exit(2 if isinstance(error, (SizeError, SourceError)) else 1)
    except KeyboardInterrupt as error:
        say(str(error) or "stopped; nothing was saved")
        os._exit(130)  # without waiting for a disk that is busy with what is to be written again
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        say(f"{error.filename or 'system'}: {error.strerror or error}")
        sys.exit(1)
