"""Loads that never happened, for statistics and pictures; and interpreters that load nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np

from shardkit.checkpoint import asking
from shardkit.compare.comparison import Comparison
from shardkit.measure.environment import Environment
from shardkit.measure.launch import WORKER
from shardkit.measure.measurement import LoadMeasurement, MemoryCurve, Phase, SamplerCost
from shardkit.measure.page_cache import CacheState
from shardkit.measure.samples import ORIGINAL, SHARDED, Sample, Variant

MB = 10**6


VARIANTS = (ORIGINAL, SHARDED)


def fake_load(wall=2.0, anonymous=700 * MB, *, first=1.0, token=None, read=None, outcome="ok", **changes):
    """Return a measurement with the given load time and peak; a first token takes 1 s.

    If `token` is given, three more tokens follow, of so many seconds, each of which reads `read` bytes.
    """
    cpu = 3.0 + 0.9 * wall
    load = Phase("load", 3.0, wall, 0.8 * wall, 0.1 * wall, 900 * MB, anonymous, 500 * MB, 3, 400 * MB, cpu)
    imports = Phase("imports", 0.1, 2.9, 2.5, 0.4, 300 * MB, 200 * MB, 100 * MB, 0, 0, 3.0)
    peaks, end = (950 * MB, anonymous, 600 * MB), 3.0 + wall + first
    phases = [imports, load, Phase("first token", 3.0 + wall, first, 2.0, 0.1, *peaks, 0, 0, cpu + 2.1)]
    if token:
        phases += [Phase("further tokens", end, 3 * token, token, 0.1, *peaks, 0, 3 * read, cpu + 3.0)]
    seconds = tuple(float(s) for s in np.linspace(0, 4 + wall, 200))
    fields = {
        "source": "/models/original",
        "dtype": "float16",
        "device": "cpu",
        "generate": 4 if token else 1,
        "outcome": outcome,
        "reason": "" if outcome == "ok" else "by SIGKILL during load",
        "phases": tuple(phases) if outcome == "ok" else (imports,),
        "load_start_seconds": 3.0,
        "peak_total_bytes": anonymous + 250 * MB,
        "peak_anonymous_bytes": anonymous,
        "peak_file_bytes": 600 * MB,
        "peak_is_kernels": True,
        "peak_device_bytes": None,
        "cache": CacheState("cold", True, "", 500 * MB, 0, 400 * MB),
        "model_class": "MistralForCausalLM",
        "token_ids": (7, 8, 9, 5) if token else (7,),
        "curve": MemoryCurve(
            seconds,
            tuple(int(200 * MB + (anonymous - 200 * MB) * min(1, s / (3 + wall))) for s in seconds),
            tuple(int(100 * MB + 500 * MB * max(0, (s - 3) / (1 + wall))) for s in seconds),
            (0.5, 3.5, 4.0),
            (200 * MB, 400 * MB, 600 * MB),
        ),
        "sampler": SamplerCost(200, 0.02, 0.01),
        "environment": Environment(
            "Linux", "a processor", 4, 8 * 10**9, None, "ext4", {"transformers": "5.0", "torch": "2.5"}
        ),
    }
    return LoadMeasurement(**{**fields, **changes})


def fake_variant(name, dtype, *, source=None, files=9, nbytes=500 * MB):
    """Return a variant that stores all its bytes in one dtype."""
    return Variant(name, source or f"/models/{name}", files, nbytes, {dtype: nbytes}, {"dtype": "float16"})


def fake_comparison(ratio=1.0, noise=0.01, repeats=5, seed=0, anonymous=(700 * MB, 700 * MB), **changes):
    """Return a comparison whose load times differ by a known ratio, with log-normal noise."""
    noises = np.random.default_rng(seed).normal(0, noise, (repeats, 2))
    samples = [
        Sample(variant, pair, fake_load(float(base * np.exp(noises[pair, place])), anonymous[place]))
        for pair in range(repeats)
        for place, (variant, base) in enumerate(zip(VARIANTS, (2.0, 2.0 * ratio), strict=True))
    ]
    fields = {
        "variants": (fake_variant("original", "BF16", files=2), fake_variant("sharded", "F16")),
        "margin": 0.05,
        "samples": tuple(samples),
        "warm_ups": (Sample("original", None, fake_load()), Sample("sharded", None, fake_load())),
    }
    fields |= changes
    names = [variant.name for variant in fields["variants"]]
    fields |= {runs: tuple(s for s in fields[runs] if s.variant in names) for runs in ("samples", "warm_ups")}
    return Comparison(**fields)


def fake_interpreter(folder: Path, script: str, name: str = "python") -> Path:
    """Return a program that runs `script` in place of the worker, with the worker's own tools at hand."""
    path = folder / name
    head = f"""\
        #!{sys.executable}
        import json, os, signal, subprocess, sys, time
        sys.path.insert(0, {str(WORKER.parent)!r})
        import worker
        job = json.load(open(sys.argv[-1]))
        reporter = worker.Reporter(job["results"])
    """
    path.write_text(dedent(head) + dedent(script))
    path.chmod(0o755)
    return path


@contextmanager
def asked_here() -> Iterator[Callable[..., Callable[[], dict[str, Any]]]]:
    """Ask transformers in this process what a model gets, which takes no seconds of imports each time."""
    yield lambda job, _=0: lambda: asking.asked_here(json.loads(json.dumps(job)))


def ask_here() -> None:
    """Let this process ask transformers itself."""
    assert callable(asking.asked)
    asking.asked = asked_here


def no_load(source, spec, **_):
    """Return a load that never happened, as if it had been asked for."""
    cache = CacheState(spec.cache, True, "", 500 * MB, 0, 0)
    return fake_load(source=str(source), dtype=spec.dtype, cache=cache)


def load_nothing() -> None:
    """Let this process compare loads that never happened."""
    from shardkit.compare import experiment
    from shardkit.measure import launch

    assert callable(experiment.run_load)
    experiment.run_load = launch.run_load = no_load


def happens(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true within a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within a time; a zombie has ended."""

    def has_ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return happens(has_ended, seconds)
