"""Bit rot: one bit of one tensor, on either side, is found, and the tensor named."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.demo import make_demo_checkpoint
from shardkit.shard.engine import shard_checkpoint
from shardkit.shard.verify import verify_checkpoint
from tests.torture.bench import Fault, Finding, Kind, Place, Seen

# What is compared with the source, and which of both rots. What a cast drops is no loss, so the source of a
# cast may change unseen; its copy may not.
_PAIRS = (("shards", 0), ("shards", 1), ("one file", 0), ("one file", 1), ("cast", 1))
_SIDES = ("source", "destination")


def _prepare(shared: Path) -> None:
    source = make_demo_checkpoint(shared / "source", size="6MB").source
    shard_checkpoint(source, shared / "shards", max_shard_size="500KB")
    shard_checkpoint(source, shared / "one file")
    shard_checkpoint(source, shared / "cast", max_shard_size="2MB", dtype="float32")


def _flipped(place: Place) -> Iterator[Finding]:
    copy, side = _PAIRS[place.number % len(_PAIRS)]
    folders = [
        shutil.copytree(place.shared / n, place.work / n, copy_function=os.link) for n in ("source", copy)
    ]
    checkpoint = Checkpoint.open(folders[side])
    tensor = place.dice.choice([tensor for tensor in checkpoint.tensors.values() if tensor.nbytes])
    bit = place.dice.randrange(8 * tensor.nbytes)
    path = folders[side] / tensor.file
    raw = bytearray(path.read_bytes())
    raw[(tensor.offset or 0) + bit // 8] ^= 1 << bit % 8
    path.unlink()  # a link to what others share
    path.write_bytes(raw)
    found = verify_checkpoint(*folders)
    wrong = [mismatch.tensor for mismatch in found.mismatches]
    if wrong != [tensor.name] or found.equal or found.missing or found.extra:
        yield Fault(f"({copy}, {_SIDES[side]}, bit {bit} of {tensor.name}) verify found {wrong or 'nothing'}")
    yield Seen(f"in the {_SIDES[side]}")


FLIPS = Kind("flips of one bit, found by verify", _flipped, 1_000, 40, _prepare)
