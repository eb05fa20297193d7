"""Parameters of notebooks, checked before any work begins; what sharding takes; what many notebooks found.

Papermill only warns of a name that the notebook does not know, and runs on with the default.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardkit.base.record import listed, plural, printable
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.estimate import RUNTIME_BYTES
from shardkit.checkpoint.hosts import memory_limits
from shardkit.compare.comparison import Comparison, merge_comparisons
from shardkit.compare.parameters import RULES, ParameterError, check_values
from shardkit.formats.tensor import LoadDtypeLike
from shardkit.load.load_model import loader_names
from shardkit.measure.launch import measure_load
from shardkit.measure.quantities import QUANTITIES
from shardkit.measure.samples import Sample, Samples, Variant
from shardkit.show.plots import HIGHEST, LOWEST
from shardkit.sources.resolve import is_on_hub

if TYPE_CHECKING:
    import pandas as pd

# Prints seconds without imports, and the kernel's own peak of the process.
_WAYS = """
import json, os, sys, time
way, source, target, dtype, size, loaders = json.loads(sys.argv[1])
if way == "shardkit":
    from shardkit import shard_checkpoint
else:
    import transformers
    loader = next(found for name in loaders if (found := getattr(transformers, name, None)))
start = time.perf_counter()
if way == "shardkit":
    shard_checkpoint(source, target, dtype=dtype, max_shard_size=size, verify=False)
else:
    loader.from_pretrained(source, dtype=dtype).save_pretrained(target, max_shard_size=size)
os.sync()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([time.perf_counter() - start, int(peak.split()[1]) * 1024 / 1e6]))
"""
# The article's model, Mistral-7B-v0.1; and the least limit in which Python, torch and transformers give a
# token, which does not shrink with a model: RUNTIME_BYTES, and pages of their files, which limits count.
_ARTICLE_BYTES, _LEAST_LIMIT = 14_483_464_192, RUNTIME_BYTES + 49_000_000
_ProgressCallback = Callable[[int, int, str], object]
_DRIVE = "/content/drive"
_CACHED = (
    "Google Drive: what is written there also fills Colab's disk, until it is uploaded in the background; "
    "loads from it are slow; before the session ends, run google.colab.drive.flush_and_unmount()"
)
_INJECTED = "# Parameters"  # how papermill begins the cell that it writes


def check_parameters(names: Mapping[str, Any]) -> None:
    """Refuse parameters that a notebook does not know, and values that it cannot use.

    The parameters are those that its cells annotate: ``repeats: int = 5``; the names are its `globals()`.
    """
    cells: Sequence[str] = names.get("In", ())
    known = dict.fromkeys(name for cell in cells for name in _assigned(cell, ast.AnnAssign))
    given = [name for cell in cells if cell.startswith(_INJECTED) for name in _assigned(cell, ast.Assign)]
    if unknown := [name for name in given if name not in known]:
        raise ParameterError(
            f"{plural(len(unknown), 'unknown parameter')} ({listed(unknown)}): "
            f"this notebook has {listed(known, len(known))}"
        )
    check_values({name: names[name] for name in known.keys() & RULES.keys()})


def _assigned(cell: str, kind: type[ast.Assign | ast.AnnAssign]) -> list[str]:
    """Return the names that a cell assigns at its top level, with or without an annotation."""
    with suppress(SyntaxError):
        found = (node for node in ast.parse(cell).body if isinstance(node, kind))
        targets = (node.targets[0] if isinstance(node, ast.Assign) else node.target for node in found)
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def made_folder(name: str) -> Path:
    """Return a folder to write to, made; where it lies in Google Drive, Colab mounts that first."""
    if "google.colab" in sys.modules and Path(_DRIVE) in Path(name).parents and not Path(_DRIVE).is_mount():
        from google.colab import drive

        drive.mount(_DRIVE)
        print(_CACHED)
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def hub_user(checkpoint: Checkpoint) -> str | None:
    """Return whose token there is for the Hub that a checkpoint is of; None where either is missing."""
    from huggingface_hub import HfApi

    from shardkit.sources.hub_client import ask, find_token

    if not is_on_hub(checkpoint.source) or (token := find_token()) is None:
        return None
    return str(ask(lambda: HfApi(token=token).whoami()["name"], "the Hub"))


def measure_sharding(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str,
    max_shard_size: int | str,
    progress: _ProgressCallback | None = None,
) -> pd.DataFrame:
    """Shard a model in two ways, each in a fresh process: as articles do it, and as shardkit does.

    Each writes to a temporary folder in `folder`, which takes as much disk as the model, and syncs it;
    neither verifies. `progress` is called as that of `compare_loads`.

    Returns
    -------
    A row for each way: seconds without imports, the peak of its process in megabytes, and how it ended: one
    that dies, as for want of memory, is a result.
    """
    import pandas as pd

    checkpoint, rows = Checkpoint.open(source, download=True), {}
    loaders = loader_names(checkpoint.config, trusted=False)
    for way in _counted(("from_pretrained, save_pretrained", "shardkit"), progress):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            job = json.dumps([way, checkpoint.folder, f"{scratch}/shards", dtype, max_shard_size, loaders])
            command = [sys.executable, "-c", _WAYS, job]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        died = f"ended with status {done.returncode}" * bool(done.returncode)
        end = done.stderr.strip().rpartition("\n")[2] or died if died else "ok"
        seconds, peak = (None, None) if died else json.loads(done.stdout.splitlines()[-1])
        rows[way] = {"seconds": seconds, "peak (MB)": peak, "end": end}
    return pd.DataFrame.from_dict(rows, orient="index")


def load_within(
    memory_limit: int,
    sources: Mapping[str, str | os.PathLike[str]],
    *,
    dtype: LoadDtypeLike,
    progress: _ProgressCallback | None = None,
) -> Samples:
    """Load checkpoints, given by name, once each under a limit in bytes: those that die have a curve, too.

    `progress` is called as that of `compare_loads`; `MeasurementError` where no limit can be set.
    """
    opened = {name: Checkpoint.open(source, download=True) for name, source in sources.items()}
    variants = tuple(
        Variant(name, one.source, len(one.files), one.total_bytes, one.dtypes, {"dtype": dtype})
        for name, one in opened.items()
    )
    runs = Samples(variants, 0.05, (), ())
    for name in _counted(tuple(sources), progress):
        run = measure_load(sources[name], dtype=dtype, memory_limit=memory_limit)
        runs = runs.with_sample(Sample(name, 0, run))
    return runs


def _counted(names: Sequence[str], progress: _ProgressCallback | None) -> Iterator[str]:
    """Yield names, and report each before its turn, and the end."""
    report = progress or (lambda *_: None)
    for number, name in enumerate(names):
        report(number, len(names), name)
        yield name
    report(len(names), len(names), "done")


def scaled_limits(checkpoint: Checkpoint) -> dict[str, int]:
    """Return a limit in bytes for each host: to this model what its memory is to Mistral-7B in 16 bits."""
    share = checkpoint.total_bytes / _ARTICLE_BYTES
    limits = memory_limits().items()
    return {host: int(_LEAST_LIMIT + share * (memory - _LEAST_LIMIT)) for host, memory in limits}


def read_results(folder: str) -> tuple[dict[str, Comparison], pd.DataFrame]:
    """Return every comparison below a folder by its file's name, and their runs, a row each.

    Warm-ups are left out, unless a variant has nothing else.
    """
    files = {str(path): path for path in sorted(Path(folder).rglob("*comparison.json"))}
    runs = merge_comparisons(files)
    names = {file: printable(str(path.relative_to(folder))) for file, path in files.items()}
    runs.insert(0, "result", runs["file"].map(names))
    counted = runs.groupby(["file", "variant"])["pair"].transform("count")
    found = {name: Comparison.load(file) for file, name in names.items()}
    return found, runs[runs["pair"].notna() | (counted == 0)]


def mean_figures(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the main figures by model, size, dtype, result and variant, of the counted loads that succeeded.

    They are in seconds and gigabytes, as the columns' names say: geometric means, as in the verdicts ("load
    time (s)"), and the lowest and highest run ("lowest load time (s)"). Times of results in which a variant
    prefetches, and so works before its load, count from process start.
    """
    import pandas as pd

    loaded = runs[(runs["outcome"] == "ok") & runs["pair"].notna()].copy()
    first = runs.groupby("result", sort=False).first()
    loaded["model"] = loaded["result"].map(first["source"].map(lambda name: "/".join(Path(name).parts[-2:])))
    loaded["of"] = loaded["result"].map(first["bytes"])
    loaded["size"] = loaded["of"].map(format_size)
    loaded = loaded.sort_values(["model", "of", "dtype"], kind="stable")
    ahead = loaded.groupby("result")["prefetch"].transform("any").astype(bool)
    by = [loaded[name].fillna("no dtype") for name in ("model", "size", "dtype", "result", "variant")]
    columns = {}
    for quantity in QUANTITIES.values():
        is_main = "main" in (quantity.plain, quantity.ahead if ahead.any() else None)
        values = loaded[quantity.name].astype("Float64").astype(float)
        if is_main and (values.notna().any() or not quantity.is_optional):
            one, unit = (1, "s") if quantity.unit == "seconds" else (1e9, "GB")
            counts = (values > 0) & (~ahead | (quantity.ahead == "main"))
            name, grouped = f"{quantity.label} ({unit})", (values.where(counts) / one).groupby(by, sort=False)
            columns[name] = grouped.agg(lambda known: known.map(math.log).mean()).map(math.exp)
            columns |= {f"{LOWEST}{name}": grouped.min(), f"{HIGHEST}{name}": grouped.max()}
    return pd.DataFrame(columns)
