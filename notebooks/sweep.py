"""Run a notebook over a grid of its parameters, one measurement at a time on a machine; merge the results.

    python notebooks/sweep.py runs model=models/a,models/b max_shard_size=500MB,2GB repeats=5

Each combination has a folder below `runs`, with the notebook as it was executed; one that is finished is not
run again. What is as large as a model is removed. On a cluster that sees the same disk:
`--executor dask://HOST:PORT`, best with a worker of one thread on each machine. In a job array:
`--part $SLURM_ARRAY_TASK_ID/8`. Whoever finishes last writes the report.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from shardkit.base.cluster import executor_at
from shardkit.base.jobs import run_all
from shardkit.cli.arguments import part

HERE = Path(__file__).resolve().parent
NOTEBOOK, REPORT = HERE / "01_shard_and_compare.ipynb", HERE / "batch_report.ipynb"
TRIES = 3  # a kernel binds ports that were free when its client looked, and may find them in use
NO_KERNEL = re.compile("Kernel (didn't respond|died before replying)")


class Run(NamedTuple):
    """A combination of parameters, and the folder that its results go to."""

    folder: Path
    parameters: tuple[tuple[str, str], ...]

    @property
    def executed(self) -> Path:
        """The notebook, once it has run to its end."""
        return self.folder / "notebook.ipynb"


def grid(folder: Path, words: list[str]) -> list[Run]:
    """Return a run for each combination of ``name=value,value``."""
    axes = {name: values.split(",") for name, _, values in (word.partition("=") for word in words)}
    runs = []
    for values in product(*axes.values()):
        varied = [value for value, (_, choices) in zip(values, axes.items(), strict=True) if len(choices) > 1]
        name = re.sub(r"[^\w.]+", "-", "-".join(varied)).strip("-") or "run"
        runs.append(Run(folder / name, tuple(zip(axes, values, strict=True))))
    return runs


def papermill(notebook: Path, output: Path, parameters: tuple[tuple[str, str], ...]) -> str:
    """Run a notebook, again where its kernel did not start; return its last words if it failed."""
    given = [word for name, value in parameters for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(output), *given]
    for _ in range(TRIES):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode or not NO_KERNEL.search(done.stderr):
            break
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def measure(run: Run) -> str:
    """Carry out a run, unless it is finished; nothing else of a sweep runs on this machine meanwhile."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(Path(tempfile.gettempdir(), "shardkit-sweep.lock")):
        if run.executed.exists():
            return ""
        running = run.executed.with_suffix(".running.ipynb")
        failed = papermill(NOTEBOOK, running, (*run.parameters, ("output_folder", str(run.folder))))
        for made in (path for path in run.folder.iterdir() if path.is_dir()):
            shutil.rmtree(made)
        running.rename(run.folder / "failed.ipynb" if failed else run.executed)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("grid", nargs="+", metavar="NAME=VALUE,VALUE", help="parameters of the notebook")
    parser.add_argument("--executor", help="Dask's scheduler: dask://HOST:PORT")
    parser.add_argument(
        "--part", type=part, default=(1, 1), metavar="I/N", help="every Nth run, from the Ith on"
    )
    asked = parser.parse_args()
    folder, (number, of) = asked.folder.resolve(), asked.part
    runs, failures = grid(folder, asked.grid), 0
    if len({run.folder for run in runs}) < len(runs) or not all("=" in word for word in asked.grid):
        parser.error(f"no grid of distinct values, each as NAME=VALUE,VALUE: {' '.join(asked.grid)}")
    with (
        executor_at(asked.executor) as executor,
        run_all(measure, runs[number - 1 :: of], None if executor else 1, executor) as results,
    ):
        for run, failed in results:
            failures += bool(failed)
            print(f"{run.folder.name}: {failed or 'done'}", flush=True)
    if all(run.executed.exists() for run in runs):
        where = (("results", str(folder)), ("output_folder", str(folder)))
        with FileLock(folder / ".report.lock"):
            failed = papermill(REPORT, folder / "report.ipynb", where)
        failures += bool(failed)
        print(failed or f"report: {folder / 'report.ipynb'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
