"""Try everything in full, print one table, and exit with 1 if anything was found.

``python -m tests.torture [KIND ...] [--seed N] [--trial N] [--count N]``
"""

import argparse
import signal
import sys
import time

from tests.torture.bench import Bench, Outcome
from tests.torture.kinds import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="another seed tries other things (default: 0)")
    parser.add_argument("--trial", type=int, help="run this one trial again")
    parser.add_argument("--count", type=int, help="how many of each kind (default: all that make it up)")
    wanted = parser.parse_args()
    if unknown := set(wanted.kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(unknown)}")
    # A shell that starts us in the background has interrupts ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes: list[Outcome] = []
    with Bench() as bench:
        for name in wanted.kinds or KINDS:
            kind, begun = KINDS[name], time.perf_counter()
            numbers = range(wanted.count or kind.full)
            if wanted.trial is not None:
                numbers = range(wanted.trial, wanted.trial + 1)
            outcomes.append(bench.run(name, kind, numbers, wanted.seed))
            print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    print(table(outcomes, wanted.seed))
    return 1 if any(len(outcome.faults) > outcome.tolerated for outcome in outcomes) else 0


def table(outcomes: list[Outcome], seed: int) -> str:
    """What was tried, how often, what was found; then each fault in a line."""
    rows = [(o.what, f"{o.tried:,}", f"{len(o.faults):,}", o.note) for o in outcomes]
    rows.insert(0, (f"what was tried (seed {seed})", "times", "faults", "seen"))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{what:<{wide[0]}}  {n:>{wide[1]}}  {found:>{wide[2]}}  {note}".rstrip()
        for what, n, found, note in rows
    ]
    return "\n".join([*lines, *(fault for outcome in outcomes for fault in outcome.faults)])


if __name__ == "__main__":
    sys.exit(main())
