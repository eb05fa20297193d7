"""One model run by several processes, each of which is measured as any load is.

They are started as torchrun starts its own, and find each other on this machine; what divides the model among
them is transformers: gloo connects processors, nccl GPUs, of which each process has one.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from threading import Event
from typing import Any, Literal

from shardkit.base.errors import Cancelled, MeasurementError, PlanError
from shardkit.base.machine import cores
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.ranks import check_ranks
from shardkit.formats.tensor import LoadDtypeLike
from shardkit.measure.child import ChildEnd, run_child
from shardkit.measure.launch import run_in
from shardkit.measure.measurement import LoadMeasurement
from shardkit.measure.spec import Cache, LoadSpec, Rule, check, one_of, optional, whole_number

By = Literal["tensor", "layer"]
_SIZES: dict[By, str] = {"tensor": "tp_size", "layer": "pp_size"}
_LEAST = 5, 23
_RULES: dict[str, Rule] = {
    "ranks": whole_number(1),
    "by": one_of(*_SIZES),
    "threads": optional(whole_number(1)),
}
# The model's own `generate` counts positions; a process that lacks the first layer would count none.
_POSITIONS = {"use_cache": True}


def measure_parallel(
    source: str | os.PathLike[str],
    ranks: int = 2,
    *,
    by: By = "tensor",
    mapped: bool = False,
    dtype: LoadDtypeLike | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    cache: Cache = "cold",
    generate: int = 1,
    threads: int | None = None,
    prompt: str | None = None,
    timeout: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[LoadMeasurement, ...]:
    """Load a model in several processes at once, have them generate together, and measure each.

    Parameters
    ----------
    source, dtype, cache, generate, prompt, timeout, stop
        As for `measure_load`; the source may be written for `ranks` (see `plan_shards`).
    ranks
        How many processes.
    threads
        With how many each computes on the CPU (default: an equal share of the cores).
    by
        What is divided: "tensor", every matrix (each process computes a part of every layer, by the plan that
        transformers has for the model); or "layer", the model (each has some layers).
    mapped
        Load with plain `from_pretrained`, which maps the files; not with `load_model`, which reads of them
        what each process needs.
    device
        "cuda": a GPU for each process.

    Returns
    -------
    A measurement for each process, by rank; all of them are "ok".

    Raises
    ------
    PlanError
        If so many processes cannot share the model: "tensor" divides its heads, "layer" its layers.
    MeasurementError
        If an argument is invalid; or if a process failed: says which and why, and the others are stopped.
    Cancelled, CheckpointError, MissingPackageError
        As `measure_load`.

    Examples
    --------
    >>> [run.ok for run in measure_parallel("mistral-demo", 2, by="layer")]
    [True, True]
    """
    check({"ranks": ranks, "by": by, "threads": threads}, _RULES)
    checkpoint = Checkpoint.open(source, download=True)
    options = {"distributed_config": {_SIZES[by]: ranks}}
    spec = LoadSpec(
        dtype, device, cache, generate, timeout=timeout, options=options, prompt=prompt, generation=_POSITIONS
    )
    _check(checkpoint.config or {}, ranks, by)
    ends: dict[int, ChildEnd] = {}  # in the order in which they come
    with socket.socket() as meeting:
        # Bound but not listening: nobody else is given the port, and the first rank may listen there.
        meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meeting.bind(("127.0.0.1", 0))
        share = threads or max(1, cores() // ranks)
        places = [_place(rank, ranks, meeting.getsockname()[1], device, share) for rank in range(ranks)]
        together = partial(_run_together, spec=spec, places=places, stop=stop, ends=ends)
        loads = run_in(source, spec, together, by_shardkit=not mapped)
    runs = dict(zip(ends, loads, strict=True))
    # One that was killed is the cause of errors in those that it left; of errors, the first is.
    wrong = sorted((r for r, run in runs.items() if not run.ok), key=lambda r: runs[r].outcome != "killed")
    if wrong:
        why = f"rank {wrong[0]} of {ranks} {runs[wrong[0]].end}"
        raise MeasurementError(f"{why}; the other processes were stopped")
    return tuple(runs[rank] for rank in range(ranks))


def _check(config: Mapping[str, Any], ranks: int, by: By) -> None:
    layers = config.get("num_hidden_layers")
    if by == "tensor":
        check_ranks(config, ranks)
    elif isinstance(layers, int) and ranks > layers:
        raise PlanError(f"{ranks} processes cannot share the {layers} layers of this model: one each at most")
    version = metadata.version("transformers")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _LEAST:
        # It would ignore what it does not know, and load all of the model everywhere.
        least = ".".join(map(str, _LEAST))
        raise MeasurementError(
            f"only transformers {least} or newer divides a model so: {version} is installed"
        )


def _place(rank: int, ranks: int, port: int, device: str, threads: int) -> dict[str, str]:
    """Return a rank's environment, as torchrun sets it; a GPU is the only one that its process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ranks)))
    gpu = visible.split(",")[rank : rank + 1] if device == "cuda" else []
    place = {
        "RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    place |= {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "".join(gpu)}
    return {name: str(value) for name, value in place.items()}


def _run_together(
    command: Sequence[str],
    job: Mapping[str, Any],
    *,
    spec: LoadSpec,
    places: Sequence[Mapping[str, str]],
    stop: Callable[[], bool] | None,
    ends: dict[int, ChildEnd],
) -> list[ChildEnd]:
    """Run a process for each place; return how those ended that no failure of another stopped."""
    is_over = Event()

    def run(rank: int) -> None:
        try:
            ends[rank] = run_child(
                command, job, spec, lambda: is_over.is_set() or (stop is not None and stop()), places[rank]
            )
        except Cancelled:
            if not is_over.is_set():
                raise
            return
        if not ends[rank].events["done"]:
            is_over.set()

    with ThreadPoolExecutor(len(places)) as pool:
        try:
            list(pool.map(run, range(len(places))))
        finally:
            is_over.set()
    return [*ends.values()]
