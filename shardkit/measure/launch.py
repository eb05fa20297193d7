"""One load, run in a fresh process and made into a `LoadMeasurement`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardkit.base.errors import CheckpointError
from shardkit.base.sizes import format_size
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.layout import read_config
from shardkit.checkpoint.ranks import is_for_ranks
from shardkit.formats.tensor import LoadDtypeLike
from shardkit.load.load_model import (
    FILE_OPTIONS,
    loaded_files,
    loader_names,
    prefetch_bytes,
    read_into_memory,
)
from shardkit.measure import page_cache
from shardkit.measure.child import ChildEnd, run_child
from shardkit.measure.environment import describe_machine
from shardkit.measure.measurement import LOAD, LoadMeasurement, Outcome, Phase
from shardkit.measure.sampler import Reading
from shardkit.measure.spec import Cache, LoadSpec
from shardkit.sources.local import LocalFiles

WORKER = Path(__file__).with_name("worker.py")
# transformers names what its own function would be given.
UNTRUSTED = (
    'it needs custom code, which runs only if you trust it: allow it with options={"trust_remote_code": True}'
)
_KILLED = (-9, 128 + 9)  # by SIGKILL; as a wrapper's shell says it
_SIGNALS = {int(number): number.name for number in signal.Signals}
_NOT_STARTED = (126, 127)  # as a shell says it
_REQUESTED = ("dtype", "device", "generate", "prefetch", "prompt", "memory_limit_bytes", "max_memory_bytes")


def measure_load(
    source: str | os.PathLike[str],
    *,
    dtype: LoadDtypeLike | None = None,
    device: str = "cpu",
    cache: Cache = "cold",
    generate: int = 1,
    prefetch: bool = False,
    memory_limit: int | str | None = None,
    python: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    options: Mapping[str, Any] | None = None,
    max_memory: int | str | None = None,
    loader: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    generation: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LoadMeasurement:
    """Load a checkpoint with `from_pretrained` in a fresh process, and measure it.

    A load that raises, is killed or takes too long is a result, not an error; the process never
    outlives the call, or its caller. (A daemon that it starts in a session of its own does, unless there
    is a memory limit.)

    Parameters
    ----------
    source
        A checkpoint's folder, or the weights or index file in it that transformers loads; or a model on
        the Hub, which is downloaded first.
    dtype
        What `from_pretrained` is given: "float16", "bfloat16", "float32", "auto"; None leaves it out.
    device
        "cpu", or a `device_map` of transformers: "cuda", "cuda:1", "auto".
    cache
        State of the page cache before the load: "cold" evicts the weights from memory, "warm" reads
        them; either is proven, or the result says that it could not be.
    generate
        Tokens after the load. The first is a forward pass of a fixed prompt, which includes work that the
        load deferred (for a model that cannot generate, only a forward pass); 0 skips it.
    prefetch
        Prefetch the files from the start of the process, as `load_model` does.
    memory_limit
        Maximum memory of the process: "12.7GB", or a number of bytes. The kernel counts anonymous memory and
        file pages that it cannot drop, and kills what needs more.
    python
        The interpreter that loads, if not the current one: its environment may have other versions.
    timeout
        Seconds.
    options
        Passed to `from_pretrained` as they are: text, numbers, booleans, None, and lists, tuples and dicts of
        them; anything else is refused. With ``trust_remote_code=True`` the checkpoint's own code runs.
    max_memory
        Load with `load_model` instead, whose budget this is; on the CPU.
    loader
        A Python file whose function ``load(folder, **options)`` loads instead, and returns the model; it gets
        the dtype as torch's own, the `device_map`, and `options`. What the file imports is not clocked.
    prompt
        Text to continue, if not the fixed prompt; without a tokenizer there is none.
    generation
        Arguments of the model's `generate`, which then makes the tokens after the first:
        ``{"prompt_lookup_num_tokens": 8}``. As `options`; without it, they are made greedily, one in a pass.
    stop
        Called a few times a second; True stops the load.

    Returns
    -------
    LoadMeasurement
        Times in seconds, peaks in bytes, and how it ended.

    Raises
    ------
    Cancelled
        If `stop` asked to stop.
    MeasurementError
        If an argument is invalid, or memory cannot be limited here.
    CheckpointError
        If `source` is not a checkpoint, or is a file that transformers would not load.
    MissingPackageError
        If a package that loads or measures is not installed.

    Examples
    --------
    >>> measure_load("sharded", dtype="float16").ok
    True
    """
    spec = LoadSpec(
        dtype, device, cache, generate, prefetch, memory_limit, python, timeout, options or {}, max_memory,
        loader, prompt, generation or {},
    )  # fmt: skip
    return run_load(source, spec, stop=stop)


def run_load(
    source: str | os.PathLike[str], spec: LoadSpec, *, stop: Callable[[], bool] | None = None
) -> LoadMeasurement:
    """Load a checkpoint as `measure_load` does, its arguments checked before."""
    return run_in(source, spec, lambda command, job: [run_child(command, job, spec, stop)])[0]


def run_in(
    source: str | os.PathLike[str],
    spec: LoadSpec,
    run: Callable[[Sequence[str], Mapping[str, Any]], list[ChildEnd]],
    by_shardkit: bool = False,
) -> list[LoadMeasurement]:
    """Load a checkpoint in the processes that `run` starts, given a command and its job, and waits for."""
    folder, files = loaded_files(source)
    by_shardkit = by_shardkit or spec.max_memory is not None
    with suppress(CheckpointError):  # the load itself says what is wrong
        by_shardkit = by_shardkit or is_for_ranks(Checkpoint.open(folder))
    ahead = _ahead(Checkpoint.open(folder), files, spec) if spec.prefetch else {}
    trusted = bool(spec.options.get("trust_remote_code"))
    job = {
        **{name: getattr(spec, name) for name in ("dtype", "device", "generate", "prompt")},
        "folder": folder,
        "options": repr(spec.options),  # JSON would make text of the numbers of GPUs
        "loader": spec.loader and os.path.abspath(spec.loader),
        "generation": repr(spec.generation),
        "loaders": loader_names(read_config(LocalFiles(folder)), trusted),
        "prefetch": ahead,
        "max_memory": spec.max_memory_bytes,
        "by_shardkit": by_shardkit,
    }
    command = [os.path.expanduser(spec.python or sys.executable), str(WORKER)]
    state = page_cache.prepare(files, spec.cache)
    loads = [_measurement(folder, spec, state, end) for end in run(command, job)]
    reads = [load.read_bytes for load in loads if load.ok and not spec.prefetch]
    is_known = len(reads) == len(loads) and None not in reads
    state = page_cache.conclude(state, files, sum(filter(None, reads)) if is_known else None)
    if chosen := [name for name in FILE_OPTIONS if name in spec.options]:
        state = page_cache.doubt(state, f"with {', '.join(chosen)} other files may have been loaded")
    return [replace(load, cache=state, into_memory=bool(ahead.get("into_memory"))) for load in loads]


def _ahead(checkpoint: Checkpoint, files: list[str], spec: LoadSpec) -> dict[str, Any]:
    """Return how the worker reads what it loads from the start of its process, as `load_model` does."""
    limit = spec.memory_limit_bytes
    place = {} if spec.device == "cpu" else {"device_map": spec.device}
    # Another interpreter may lack what shardkit needs.
    into = None if spec.python else read_into_memory(checkpoint, spec.dtype, {**place, **spec.options}, limit)
    most = prefetch_bytes(checkpoint, spec.dtype, limit)
    return {"files": files, "limit_bytes": most, "into_memory": into}


def _measurement(folder: str, spec: LoadSpec, cache: page_cache.CacheState, end: ChildEnd) -> LoadMeasurement:
    limit = spec.memory_limit_bytes
    last = {kind: events[-1] for kind, events in end.events.items() if events}
    begun = [event for event in end.events["begin"] if event["name"] == LOAD][-1:]
    # Where it never came to the load, what it held before says at least how far it came.
    load: dict[str, Any] = begun[0] if begun else {"at": end.started_at, "peak_reset": True}
    peaks = _peaks(end, load["at"], load["peak_reset"])
    outcome, reason = _outcome(end, limit, peaks)
    if outcome == "failed" and "trust_remote_code" in reason and not spec.options.get("trust_remote_code"):
        reason = f"{UNTRUSTED}{_where(end)}"
    return LoadMeasurement(
        **{name: getattr(spec, name) for name in _REQUESTED},
        source=folder,
        options=dict(spec.options),
        loader=Path(spec.loader).name if spec.loader else None,
        generation=dict(spec.generation),
        outcome=outcome,
        reason=reason,
        phases=tuple(_phase(event, end) for event in end.events["end"]),
        load_start_seconds=load["at"] - end.started_at if begun else None,
        **peaks,
        peak_device_bytes=last.get("device", {}).get("peak_bytes"),
        cache=cache,
        model_class=last.get("model", {}).get("name"),
        token_ids=tuple(last.get("tokens", {}).get("ids", ())),
        first_tokens=last.get("first", {}).get("tokens", 1),
        curve=end.curve(),
        sampler=end.sampler_cost(load["at"]),
        environment=describe_machine(folder, limit, **last.get("stack", {})),
        output="" if outcome == "ok" else end.output,
        notes=_notes(end, peaks["peak_is_kernels"]),
    )


def _notes(end: ChildEnd, is_kernels: bool) -> tuple[str, ...]:
    notes = [event["text"] for event in end.events["note"]]
    if not is_kernels:
        notes.append("the kernel's own memory peak is unknown: peaks are sampled, short ones may be missing")
    if end.events["hello"] and not end.readings and not end.portable_readings:
        notes.append(
            "the loading process could not be sampled (a wrapper must `exec` it): its peaks of anonymous "
            "and file memory are unknown"
        )
    return tuple(notes)


def _outcome(end: ChildEnd, limit: int | None, peaks: Mapping[str, int | None]) -> tuple[Outcome, str]:
    where = _where(end)
    when = f"{where}, {end.ended_at - end.started_at:.1f} s after its start"
    memory, anonymous = _at(peaks["peak_total_bytes"]), _at(peaks["peak_anonymous_bytes"])
    last = (end.output.strip().splitlines() or [""])[-1].strip()[:300]
    if end.return_code is None or (end.return_code in _NOT_STARTED and not end.events["hello"]):
        return "failed", f"the interpreter could not be started: {last or 'no reason given'}"
    if end.timed_out:
        return "timeout", f"stopped{when}{memory}"
    if errors := end.events["error"]:
        return "failed", f"{errors[-1]['reason']}{where}"
    if end.return_code in _KILLED and end.limit_kills and limit is not None:
        held = f"{anonymous} anonymous" if anonymous else ""
        return "killed", f"by the kernel at its memory limit of {format_size(limit)}{when}{held}"
    if end.return_code < 0:
        name = _SIGNALS.get(-end.return_code, f"signal {-end.return_code}")
        hint = ": as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return "killed", f"by {name}{when}{memory}{hint}"
    if end.events["done"] and end.return_code == 0:
        return "ok", ""
    said = f"; it last printed: {last}" if last else ""
    return "failed", f"ended with status {end.return_code}{where} and no result{said}"


def _where(end: ChildEnd) -> str:
    """Say how far it got: " during load", " after first token"."""
    begun, ended = ([event["name"] for event in end.events[kind]] for kind in ("begin", "end"))
    if begun and begun[-1:] != ended[-1:]:
        return f" during {begun[-1]}"
    return f" after {ended[-1]}" if ended else ""


def _at(peak: int | None) -> str:
    return f", at {format_size(peak)}" if peak is not None else ""


def _phase(event: Mapping[str, Any], end: ChildEnd) -> Phase:
    start, stop = event["at"], event["at"] + event["wall_seconds"]
    inside = [reading for reading in end.readings if start <= reading.at <= stop]
    reported = {name: value for name, value in event.items() if name in Phase.__annotations__}
    return Phase(start_seconds=start - end.started_at, **reported, **_split_peaks(end, [event], inside))


def _peaks(end: ChildEnd, load_at: float, was_reset: bool) -> dict[str, Any]:
    phases = [event for event in end.events["end"] if event["at"] >= load_at]
    readings = [reading for reading in end.readings if reading.at >= load_at]
    total = [reported["peak_total_bytes"] for reported in phases]
    # A phase that was cut short reports nothing: its running peak, as last seen, stands in.
    total += [reading.peak_total_bytes for reading in readings[-1:]]
    is_whole = bool(readings or not end.portable_readings or (end.events["done"] and None not in total))
    is_kernels = was_reset and is_whole
    if not is_kernels:
        total = [size for at, size in end.portable_readings if at >= load_at]
        total += [reading.anonymous_bytes + reading.file_bytes for reading in readings]
    split = _split_peaks(end, phases, readings)
    return {"peak_total_bytes": _largest(total), "peak_is_kernels": is_kernels, **split}


def _split_peaks(
    end: ChildEnd, phases: Sequence[Mapping[str, Any]], readings: Sequence[Reading]
) -> dict[str, Any]:
    if not end.readings:  # what the worker itself saw is no peak where nobody else watched
        return {"peak_anonymous_bytes": None, "peak_file_bytes": None}
    # But it counts too: a phase may be shorter than a pause.
    return {
        f"peak_{part}": _largest([*(p[part] for p in phases), *(getattr(r, part) for r in readings)])
        for part in ("anonymous_bytes", "file_bytes")
    }


def _largest(numbers: Iterable[int | None]) -> int | None:
    return max((number for number in numbers if number is not None), default=None)
