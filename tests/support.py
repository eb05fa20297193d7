"""What the tests share: checkpoints made by hand, and read back by the readers that everybody else uses.

Nothing here calls shardkit, so that a wrong idea of the format in the package cannot hide behind the same
wrong idea in its tests.
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import safetensors
from hypothesis import strategies as st


class Tensor(NamedTuple):
    """What has to survive: dtype (in safetensors' words), shape, and every byte."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]
FreshFolder = Callable[[], AbstractContextManager[Path]]


def format_dtypes() -> tuple[str, ...]:
    """Every dtype that the safetensors library knows: its error for an unknown one lists them."""
    try:
        safetensors.deserialize(safetensors_bytes({"t": Tensor("unknown", (0,), b"")}))
    except safetensors.SafetensorError as error:
        return tuple(name for name in re.findall(r"`(\w+)`", str(error)) if name != "unknown")
    raise AssertionError("the library accepted an unknown dtype")


def bits(dtype: str) -> int:
    """Bits of an element, which every dtype but BOOL has in its name."""
    return 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """The header of a file with these tensors, in this order."""
    header, begin = {}, 0
    for name, tensor in tensors.items():
        end = begin + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    return header


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file from a header (JSON data, or the raw bytes) and its data, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, neither padded nor aligned: legal, and unlike what writers write."""
    header = {"__metadata__": dict(metadata)} if metadata is not None else {}
    return file_bytes(header | header_of(tensors), b"".join(tensor.data for tensor in tensors.values()))


def sparse_file(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16") -> int:
    """Write a safetensors file of these shapes whose data is a hole, which takes no disk; return its size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * bits(dtype) // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    size = path.write_bytes(file_bytes(header)) + end
    os.truncate(path, size)
    return size


def write_checkpoint(folder: Path, files: Sequence[Mapping[str, Tensor]], stem: str = "model") -> Path:
    """Write one safetensors file, or several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(files) == 1:
        (folder / f"{stem}.safetensors").write_bytes(safetensors_bytes(files[0]))
        return folder
    names = [f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        (folder / name).write_bytes(safetensors_bytes(tensors))
    weight_map = {t: name for name, tensors in zip(names, files, strict=True) for t in tensors}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read in a folder, by its own reading of the index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    from transformers.utils.hub import get_checkpoint_shard_files

    files, _ = get_checkpoint_shard_files(str(folder), str(index))
    return [Path(file) for file in files]


def read_file(path: Path) -> Tensors:
    """The tensors of one file, by the safetensors library."""
    with safetensors.safe_open(path, framework="numpy") as reader:
        seen = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  not a dict
        said = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in seen.items()}
    tensors = {
        name: Tensor(value["dtype"], tuple(value["shape"]), bytes(value["data"]))
        for name, value in safetensors.deserialize(path.read_bytes())
    }
    assert said == {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return tensors


def read_checkpoint(folder: Path) -> Tensors:
    """Every tensor of a folder, as transformers and safetensors see it; none may be there twice."""
    union: Tensors = {}
    for path in weight_files(folder):
        tensors = read_file(path)
        assert not union.keys() & tensors.keys()
        union |= tensors
    index = folder / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text(encoding="utf-8"))
        assert document["weight_map"].keys() == union.keys()
        assert document["metadata"]["total_size"] == sum(len(t.data) for t in union.values())
        assert all(name in read_file(folder / file) for name, file in first_of_each(document["weight_map"]))
    return union


def first_of_each(weight_map: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """One tensor of each file of an index."""
    yield from {file: (name, file) for name, file in weight_map.items()}.values()


def data_offsets(path: Path) -> dict[str, int]:
    """First byte of every tensor, counted from the start of the file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


DTYPES = format_dtypes()
_PREFIXES = (
    "t", "model.embed_tokens.", "model.layers.0.w", "model.layers.1.w", "model.layers.10.w", "lm_head.",
    'quoted "and" \\slashed ', "größe.", "層.", "a name with spaces ", "<b>&amp;",
)  # fmt: skip


def _group(dtype: str) -> int:
    """How many elements make up whole bytes."""
    return {4: 2, 6: 4}.get(bits(dtype), 1)


def make_tensor(dtype: str, shape: Sequence[int], source: random.Random) -> Tensor:
    """Make a tensor of random bytes; one axis more where elements would not fill whole bytes."""
    whole = (*shape, _group(dtype)) if _group(dtype) > 1 else tuple(shape)
    return Tensor(dtype, whole, source.randbytes(prod(whole) * bits(dtype) // 8))


_SHAPES = st.lists(st.one_of(st.integers(1, 9), st.integers(0, 40)), max_size=3)


@st.composite
def tensors(draw: st.DrawFn, max_size: int = 300) -> Tensors:
    """Draw tensors of any dtype and shape, scalars and empty ones among them.

    Few are drawn one by one, so that a failure shrinks; many, and all bytes, follow from a seed.
    """
    source = random.Random(draw(st.integers(0, 2**16)))
    dtypes = draw(st.one_of(st.just(DTYPES), st.sampled_from(DTYPES).map(lambda dtype: (dtype,))))
    if draw(st.integers(0, 2)) or max_size <= 12:
        few = st.lists(
            st.tuples(st.sampled_from(_PREFIXES), st.sampled_from(dtypes), _SHAPES),
            min_size=1,
            max_size=min(12, max_size),
        )
        chosen = draw(few)
    else:
        chosen = [
            (
                source.choice(_PREFIXES),
                source.choice(dtypes),
                source.choices(range(20), k=source.randint(0, 3)),
            )
            for _ in range(draw(st.integers(13, max_size)))
        ]
    return {f"{p}{i}": make_tensor(dtype, shape, source) for i, (p, dtype, shape) in enumerate(chosen)}


@st.composite
def checkpoints(draw: st.DrawFn, max_size: int = 300) -> list[Tensors]:
    """Draw the tensors of each file of a checkpoint, of one to four files."""
    made = list(draw(tensors(max_size=max_size)).items())
    cuts = draw(st.lists(st.integers(0, len(made)), max_size=3).map(sorted))
    files = [dict(made[a:b]) for a, b in pairwise([0, *cuts, len(made)])]
    return [file for file in files if file]


def union(files: Sequence[Tensors]) -> Tensors:
    """All tensors of a checkpoint, in its order."""
    return {name: tensor for file in files for name, tensor in file.items()}


@st.composite
def limits(draw: st.DrawFn, made: Tensors) -> int:
    """Draw a `max_shard_size`, from smaller than any file to larger than the model."""
    sizes = sorted(len(tensor.data) for tensor in made.values())
    headers = 200 * len(made)
    return draw(
        st.one_of(
            st.integers(1, 400),
            st.integers(1, sizes[-1] + 400),
            st.integers(sizes[-1] + 1, sum(sizes) + headers + 2),
            st.just(2 * sum(sizes) + 2 * headers + 100),
        )
    )


@contextmanager
def disk_watched(folder: Path) -> Iterator[list[int]]:
    """Give a list whose one item is, in the end, the most bytes of weights that a folder held."""
    most, done = [0], Event()

    def watch() -> None:
        while not done.wait(0.01):
            held = 0
            with suppress(FileNotFoundError):  # of a folder that was just dropped
                for path in folder.rglob("*.safetensors"):
                    with suppress(FileNotFoundError):  # or a file
                        held += path.stat().st_blocks * 512
            most[0] = max(most[0], held)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
