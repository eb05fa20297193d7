"""`python -m shardkit`, and the command `shardkit`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is no traceback, even while Python still imports."""
    try:
        from shardkit import cli

        cli.main()
    except KeyboardInterrupt:
        print("shardkit: stopped before anything began", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
