"""A Hub that fails, and runs that are killed on the way from Hub to Hub: its head is never half a model."""

import filecmp
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shardkit.base.errors import ShardkitError
from shardkit.demo import make_demo_checkpoint
from shardkit.shard.engine import shard_checkpoint, shard_on_hub
from shardkit.shard.push import push_checkpoint
from shardkit.shard.report import ShardReport
from tests.loopback_hub import LoopbackHub
from tests.support import disk_watched
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen, told
from tests.torture.child import ROOT

SOURCE, TARGET = "org/model", "me/target"
WORKERS = 2
KILLS = 10
_TRIPS, _KILLED = 100, 21
_BIG = _KILLED - 1  # the number of the trial that moves 4 GB
_MOST_MEMORY = 100_000_000
_RATES = (0.02, 0.05, 0.1, 0.2)

_RESHARD = """
import json, sys, shardkit
from tests.unasked import ask_no_models
ask_no_models()
spec = json.loads(sys.argv[1])
report = shardkit.shard_on_hub(**spec)
print(json.dumps(report.to_dict()))
"""


def _prepare_trips(shared: Path) -> None:
    source = make_demo_checkpoint(shared / "source", size="5MB").source
    shard_checkpoint(source, shared / "sharded", max_shard_size="600KB")


@cache
def _files(folder: Path) -> dict[str, Any]:
    names = {path.name for path in folder.iterdir()} - {"README.md"}
    return {name: _content(name, (folder / name).read_bytes()) for name in names}


def _content(name: str, data: bytes) -> Any:
    """What two files must have in common: not what an index says of how its files came about."""
    return json.loads(data)["weight_map"] if name.endswith(".index.json") else data


def _trip(place: Place) -> Iterator[Finding]:
    """Push, or go from Hub to Hub, with faults; then load by id, with faults; then again without."""
    rate = _RATES[place.number % len(_RATES)]
    kind = ("push", "hub to hub")[place.number // len(_RATES) % 2]
    expected = _files(place.shared / "sharded")

    def move() -> None:
        if kind == "push":
            push_checkpoint(place.shared / "sharded", TARGET)
        else:
            shard_on_hub(SOURCE, TARGET, max_shard_size="600KB", work_folder=place.work / "disk")

    with LoopbackHub(place.work / "hub") as hub, hub.believed(place.work / "home"):
        hub.add_model(SOURCE, place.shared / "source")
        hub.chaos(random.Random(place.dice.random()), rate)
        yield from told(f"{kind}, {rate:.0%} faults", _moved(hub, move, expected))
        yield from told(f"load, {rate:.0%} faults", _loaded(place, "faulty"))
        hub.chaos(place.dice, 0)
        yield from told(f"{kind}, then without faults", _moved(hub, move, expected, must=True))
        yield from told("load, then without faults", _loaded(place, "sound", must=True))
        yield from (Fault(f"the Hub itself broke: {trace[-300:]}") for trace in hub.broken)


def _moved(
    hub: LoopbackHub, move: Callable[[], None], expected: dict[str, Any], *, must: bool = False
) -> Iterator[Finding]:
    try:
        move()
        ended = "whole"
    except ShardkitError as error:
        ended = "refused, and said why"
        if must or "\n" in str(error) or "hf://" not in str(error):
            yield Fault(f"ended in {type(error).__name__}: {str(error)[:300]}")
    yield from map(Fault, hub.half_heads(TARGET) if TARGET in hub.store.repos else [])
    shown = {*hub.files(TARGET)} - {"README.md", ".gitattributes"} if TARGET in hub.store.repos else set()
    if shown and {name: _content(name, hub.read(TARGET, name)) for name in shown} != expected:
        yield Fault("the head shows other files than were sent")
    if not shown and ended == "whole":
        yield Fault("said to be done, and nothing is there")
    if not must:
        yield Seen(ended)


def _loaded(place: Place, cache_name: str, *, must: bool = False) -> Iterator[Finding]:
    """Load by id with plain transformers, and hold the tensors and an output against the source's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(name: str | Path, **options: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        tokens = AutoTokenizer.from_pretrained(name, **options)("Sharding is", return_tensors="pt")
        return model.state_dict(), model(**tokens).logits

    try:
        with patch("transformers.utils.hub._hf_api", None):  # it remembers the Hub of the trial before
            state, output = load(TARGET, cache_dir=place.work / cache_name)
    except Exception as error:
        yield Fault(f"{type(error).__name__}: {str(error)[:200]}") if must else Seen("load refused")
        return
    wanted, wanted_output = load(place.shared / "source")
    same = state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    if not same or not torch.equal(output, wanted_output):
        yield Fault("what is loaded is not what was sharded")


def _killed(place: Place) -> Iterator[Finding]:
    """Kill a run again and again on the way from Hub to Hub; what is there at the end is equal."""
    is_big = place.number == _BIG
    size, limit = ("4GB", 125_000_000) if is_big else ("30MB", 1_000_000)
    plan = {"max_shard_size": limit, "dtype": None if is_big else (None, "float16")[place.number % 2]}
    source, disk = make_demo_checkpoint(place.work / "source", size=size, shards=3), place.work / "disk"
    expected = shard_checkpoint(source.source, place.work / "expected", **plan)
    job = {"source_id": SOURCE, "target_id": TARGET, "workers": WORKERS, "work_folder": str(disk)}
    with LoopbackHub(place.work / "hub") as hub, disk_watched(disk) as most:
        hub.add_model(SOURCE, place.work / "source")
        environment = {**os.environ, **hub.environment(place.work / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _RESHARD, json.dumps(plan | job)]
        kills, status, peak = -1, -1, 0
        while status < 0:
            kills += 1
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, env=environment, text=True, **pipes)
            goal = place.dice.uniform(0.01, 0.09) * source.total_bytes if kills < KILLS else inf
            peak = max(peak, _followed(process, hub, goal))
            output, errors = process.communicate()
            status = process.returncode
            yield from map(Fault, hub.half_heads(TARGET) if TARGET in hub.store.repos else [])
        if status:
            yield Fault(f"after {kills} kills: {errors[-300:]}")
            return
        report = ShardReport.from_dict(json.loads(output))
        yield from _ended(hub, report, expected, disk)
    largest = max(expected.files.values())
    if most[0] > (WORKERS + 1) * (largest + 8192):
        yield Fault(f"{most[0]:,} bytes on the disk, more than {WORKERS + 1} shards of {largest:,}")
    if peak > _MOST_MEMORY:
        yield Fault(f"{peak:,} bytes of memory at its peak")
    yield Most(f"MB on disk of {size}", most[0] / 1e6)
    yield Most(f"MB of memory of {size}", peak / 1e6)
    yield Most(f"kills of {size}", kills)
    yield Seen("went on from there" if report.reused else "reused nothing")


def _ended(hub: LoopbackHub, report: ShardReport, expected: ShardReport, disk: Path) -> Iterator[Finding]:
    """Hold what the target shows against what sharding here has made."""
    if report.verification.digests != expected.verification.digests:
        yield Fault("the digests are not those of the source")
    for name in expected.files:
        blob = hub.files(TARGET).get(name)
        if not (blob and filecmp.cmp(hub.store.path(blob.sha256), Path(expected.destination, name), False)):
            yield Fault(f"{name} is not what sharding here makes")
    if set(hub.repo(TARGET).branches) != {"main"} or any(disk.iterdir()):
        yield Fault(f"left behind: {[*hub.repo(TARGET).branches, *disk.iterdir()]}")


def _followed(process: "subprocess.Popen[str]", hub: LoopbackHub, goal: float) -> int:
    """Kill a run once the Hub has received so many bytes more; return its peak memory."""
    before, peak = hub.received("PUT storage"), 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if found := status.read_text().partition("VmHWM:")[2].split():
            peak = max(peak, int(found[0]) * 1024)
        if hub.received("PUT storage") - before > goal:
            process.kill()
        time.sleep(0.01)
    return peak


TRIPS = Kind("round trips by a Hub that fails", _trip, _TRIPS, 1, _prepare_trips, seconds=600)
KILLED = Kind("SIGKILL on the way from Hub to Hub", _killed, _KILLED, 1, seconds=1500)
