"""shardkit where a test is not about what a model gets: transformers, which takes seconds, is not asked."""

import subprocess
import sys

COMMAND = (sys.executable, "-P", __file__)  # the command line


def run(*words, command=COMMAND, **options):
    """Run the command line, and return how that ended."""
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, check=False, **options
    )


def ask_no_models() -> None:
    """Leave transformers out of this process and what it starts."""
    from shardkit.checkpoint import kept
    from shardkit.load import seen

    assert callable(kept._asked)
    assert callable(seen._why_not)
    kept._asked = lambda *_: None
    seen._why_not = lambda *_: "no test is about that"


if __name__ == "__main__":
    ask_no_models()
    from shardkit.__main__ import main

    main()
