"""Headers, indexes and configs with something wrong: refused, or opened as everybody else reads them."""

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors

from shardkit.base.errors import CheckpointError, ShardkitError
from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.formats.safetensors import MAX_HEADER_BYTES
from shardkit.plan.plan import plan_shards
from tests.support import Tensors, header_of, make_tensor
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen, peak, told

_SECONDS, _MONSTER_SECONDS, _MEGABYTES = 1.0, 5.0, 300.0  # seconds of a processor
_NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX, _CONFIG = "model.safetensors.index.json", "config.json"
_LINKS = ("/etc/hostname", "..", "nowhere", _NAMES[0], _CONFIG, "/dev/zero", "../outside.safetensors")

# Values out of place in a header, an index or a config; then text that no value would be written as.
_ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 1.0, 0.5, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
    "", "F32", "BF16", "F4", "f32", "é", "a\0b", "\n", "\u200b", "\ud800", "\U0010ffff", "a" * 300,
    ".", "..", "../outside.safetensors", "/etc/passwd", "C:\\x", "~", "./" + _NAMES[0], "x/../" + _NAMES[0],
    "a/" * 3000, _INDEX, [], {}, [[]], [0], [1, 2, 3], [2**32, 2**32], [0, 2**64], [2**63, 2, 0], [1] * 5000,
    [2] * 70, [-1, 0], [1, 0], [0.0, 4.0], ["0", "4"], [None, None], [True, False], {"dtype": "F32"},
)  # fmt: skip
_TEXT = (
    "-0", "1e0", "1E400", "-1e-400", "0x1", "01", "+1", "1_0", "NaN", "-Infinity", "nul", "", "9" * 5000,
    "9" * 4000, '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x41"', '"\t"', "'a'", "[1,]", "{,}",
    "[" * 400 + "]" * 400, "[" * 100_000, '{"a":' * 400 + "1" + "}" * 400, '{"a":1,"a":1}', '{"":{}}',
    "/**/1", "\ufeff1", "[0,0],[0,0]", '0,"dtype":"U8"', '{},"a0":{}', '0,"weight_map":{}',
)  # fmt: skip


def _tensors(dice: random.Random, prefix: str) -> Tensors:
    dtypes = ("F32", "BF16", "I64", "U8", "BOOL", "F4", "F8_E4M3")
    shapes = ((), (0,), (2,), (3, 4), (1, 0, 5))
    count = dice.randint(0, 4)
    return {f"{prefix}{n}": make_tensor(dice.choice(dtypes), dice.choice(shapes), dice) for n in range(count)}


def _model(dice: random.Random) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON documents of a small sound checkpoint, and the data that follows each header."""
    names = _NAMES if dice.random() < 0.6 else ("model.safetensors",)
    parts = {name: _tensors(dice, f"{'ab'[place]}.") for place, name in enumerate(names)}
    metadata = {"__metadata__": {"format": "pt"}}
    documents: dict[str, Any] = {n: header_of(p) | dice.choice([{}, metadata]) for n, p in parts.items()}
    if len(names) > 1:
        weight_map = {tensor: name for name, part in parts.items() for tensor in part}
        documents[_INDEX] = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    documents[_CONFIG] = {"architectures": ["M"], "torch_dtype": "float32", "text_config": {"dtype": "F16"}}
    return documents, {n: b"".join(tensor.data for tensor in part.values()) for n, part in parts.items()}


def _mutate_tree(tree: Any, dice: random.Random, texts: list[str]) -> Any:
    """Change one node: remove, rename, copy, shift or replace it; mark where odd text is to be put."""
    nodes: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (dict, list)):
            nodes += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
            pending += node.values() if isinstance(node, dict) else node
    if not nodes or dice.random() < 0.02:
        return copy.deepcopy(dice.choice(_ODD))
    (parent, key), (other, its_key) = dice.choice(nodes), dice.choice(nodes)
    action = dice.randrange(7)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[dice.choice([odd for odd in _ODD if isinstance(odd, str)])] = parent.pop(key)
    elif action == 2:
        parent[key] = copy.deepcopy(other[its_key])
    elif action in (3, 4) and type(parent[key]) is int:
        parent[key] += dice.choice([-8, -4, -1, 1, 4, 8, 1 << 32, 1 << 60, 1 << 64])
    elif action == 5:
        texts.append(dice.choice(_TEXT))
        parent[key] = f"<{len(texts) - 1}>"
    else:
        parent[key] = copy.deepcopy(dice.choice(_ODD))
    return tree


def _mutate_bytes(raw: bytes, dice: random.Random) -> bytes:
    """Flip, remove, repeat or insert a few bytes."""
    at, some = dice.randint(0, len(raw)), dice.randint(1, 4)
    part = raw[at : at + some]
    flipped = bytes(byte ^ 1 << dice.randrange(8) for byte in part)
    return raw[:at] + dice.choice([flipped, b"", part * 2, dice.randbytes(some)]) + raw[at + some :]


def _write(folder: Path, dice: random.Random) -> None:
    """Write a checkpoint with one to three things wrong."""
    documents, data = _model(dice)
    texts: list[str] = []
    wrong = dice.choices(
        ["tree", "bytes", "length", "cut", "link"], [10, 3, 1, 1, 1], k=dice.choice([1, 1, 1, 2, 3])
    )
    for name in dice.choices(list(documents), k=wrong.count("tree")):
        documents[name] = _mutate_tree(documents[name], dice, texts)
    for name, document in documents.items():
        text = json.dumps(document, ensure_ascii=dice.random() < 0.5, separators=(",", ":"))
        for mark, odd in enumerate(texts):
            text = text.replace(f'"<{mark}>"', odd)
        raw = text.encode("utf-8", "surrogatepass")
        if "bytes" in wrong and dice.random() < 0.5:
            raw = _mutate_bytes(raw, dice)
        if name in data:
            lengths = [
                0,
                1,
                max(0, len(raw) - 1),
                len(raw) + 1,
                100_000_001,
                2**63,
                2**64 - 1,
                dice.getrandbits(64),
            ]
            length = dice.choice(lengths) if "length" in wrong else len(raw)
            raw = length.to_bytes(8, "little") + raw + data[name]
        if "cut" in wrong and dice.random() < 0.5:
            raw = raw[: dice.randint(0, len(raw))] if dice.random() < 0.7 else raw + dice.randbytes(3)
        (folder / name).write_bytes(raw)
    if "link" in wrong:
        path = folder / dice.choice(list(documents))
        path.unlink()
        dice.choice([lambda: path.symlink_to(dice.choice(_LINKS)), path.mkdir, lambda: os.mkfifo(path)])()


def _mutated(place: Place) -> Iterator[Finding]:
    folder = place.work / "model"
    folder.mkdir()
    (place.work / "outside.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    _write(folder, place.dice)
    yield from _judge(folder, None if place.number % 2 else "float16")


def _judge(folder: Path, dtype: str | None, limit: float = _SECONDS) -> Iterator[Finding]:
    """Open it; what opens must lie in its folder, be read by safetensors, and can be shown and planned."""
    checkpoint, begun = None, time.process_time()
    with peak() as risen, suppress(CheckpointError):
        checkpoint = Checkpoint.open(folder)
    seconds = time.process_time() - begun
    yield from (Most("s", seconds), Most("MB", risen[0]), Seen("opened" if checkpoint else "refused"))
    if seconds > limit or risen[0] > _MEGABYTES:
        yield Fault(f"took {seconds:.2f} s and {risen[0]:.0f} MB to open")
    if checkpoint is None or checkpoint.format != "safetensors":
        return
    held: set[str] = set()
    for file in checkpoint.files:
        # A link in place of the one file is the user's own; what an index names may be anybody's.
        if file != "model.safetensors" and not Path(checkpoint.path(file)).resolve().is_relative_to(folder):
            yield Fault(f"opened {file}, which is outside its folder")
        with safetensors.safe_open(checkpoint.path(file), framework="numpy") as reader:
            held |= set(reader.keys())
    if held != checkpoint.tensors.keys():
        yield Fault(f"opened with {sorted(checkpoint.tensors)}, safetensors reads {sorted(held)}")
    json.dumps(checkpoint.to_dict())
    str(checkpoint).encode()
    with suppress(ShardkitError):
        plan_shards(checkpoint, max_shard_size=1, dtype=dtype)


def _repeat(before: str, part: str, after: str) -> Callable[[int, int], str]:
    """A header of repeated parts: of a size, or of as many parts as may be."""
    return lambda size, most: before + part * min(most // 2, size // len(part.encode()) - 9) + after


def _many(entry: str) -> Callable[[int, int], str]:
    return lambda size, most: (
        f"{{{','.join(entry % n for n in range(min(most // 8, size // (len(entry) + 6))))}}}"
    )


_EMPTY = '"dtype":"U8","data_offsets":[0,0],"shape":['
_MONSTERS = {
    "flat lists": _repeat('{"a":[', "[],", "0]}"),
    "a shape of zeros": _repeat(f'{{"a":{{{_EMPTY}', "0,", "0]}}"),
    "metadata": _repeat('{"__metadata__":{"', 'a":"b","', 'c":""}}'),
    "a long name of wide characters": _repeat('{"', "\U00020000" * 9, f'":{{{_EMPTY}0]}}}}'),
    "many empty tensors": _many(f'"%d":{{{_EMPTY}0]}}'),
    "long numbers": _repeat('{"a":[', "9" * 4299 + ",", "0]}"),
    "nested lists": _repeat('{"a":', "[", ""),
    "flat objects": _repeat('{"a":[', "{},", "0]}"),
    "a shape of ones": _repeat(f'{{"a":{{{_EMPTY}', "1,", "0]}}"),
    "a long name": _repeat('{"', "abcdefgh" * 9, f'":{{{_EMPTY}0]}}}}'),
    "one name again and again": _repeat("{", '"a":0,', '"a":0}'),
    "spaces": _repeat("{", " " * 99, "}"),
    "many names": _many('"%d":0'),
}


def _monster(place: Place) -> Iterator[Finding]:
    """A header as large as the package still reads, or as large as the format allows."""
    beyond, number = divmod(place.number, len(_MONSTERS))
    name = list(_MONSTERS)[number]
    raw = _MONSTERS[name](*((99_000_000, 1 << 40) if beyond else (MAX_HEADER_BYTES, 1_990_000))).encode()
    (place.work / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    where = f"{name}, {len(raw) / 1_000_000:.0f} MB"
    del raw
    yield from told(where, _judge(place.work, None, _MONSTER_SECONDS))


MUTATED = Kind("mutated headers, indexes and configs", _mutated, 100_000, 2_000)
MONSTROUS = Kind("monstrous headers", _monster, 2 * len(_MONSTERS), 6)
