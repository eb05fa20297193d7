"""Checkpoints whose files have pieces of tensors: what torch's ranks write, and what no rank should."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shardkit import Checkpoint, load_model, shard_checkpoint, verify_checkpoint
from shardkit.errors import CheckpointError, VerificationError
from tests.support import FreshFolder, Tensor, Tensors, read_checkpoint, read_file, safetensors_bytes

# One of two ranks, which saves tensors cut in all ways, and what they are when complete.
RANK = """
import os, sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7)).to(torch.bfloat16)
full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
cut = {
    "rows": (torch.randn(8, 3), Shard(0)),
    "columns": (torch.randn(3, 8).half(), Shard(1)),
    "uneven": (torch.randn(5, 2, 7), Shard(2)),
    "middle": (torch.arange(3 * 5 * 2).reshape(3, 5, 2), Shard(1)),
    "one row": (torch.randn(1, 4), Shard(0)),
    "all": (torch.randn(4, 4), Replicate()),
}
state = {name: distribute_tensor(tensor, mesh, [place]) for name, (tensor, place) in cut.items()}
state |= fully_shard(model, mesh=mesh).state_dict()
full |= {name: tensor for name, (tensor, _) in cut.items()} | {"scalar": torch.tensor(2.5)}
several = {name: 1 + number % 2 for number, name in enumerate(full)} if sys.argv[3] == "several" else None
writer = HuggingFaceStorageWriter(f"{folder}/pieces", several, save_distributed=True)
checkpoint.save(state | {"scalar": full["scalar"]}, storage_writer=writer)
if rank == 0:
    save_file(full, f"{folder}/full.safetensors")
dist.destroy_process_group()
os._exit(0)  # a thread of torch's may not have ended, and Python's own end would be an abort
"""


@pytest.mark.parametrize("files", ["one", "several"])
def test_what_two_ranks_of_torch_wrote_becomes_ordinary_shards(files: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path), files], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
    written = [path.name for path in (tmp_path / "pieces").iterdir()]
    assert len(written) == (2 if files == "one" else 4)
    full, out = load_file(tmp_path / "full.safetensors"), tmp_path / "out"
    report = shard_checkpoint(tmp_path / "pieces", out, max_shard_size="1KB")
    assert report.verification is not None
    assert report.verification.equal
    copy = {name: tensor for file in report.files for name, tensor in load_file(out / file).items()}
    assert copy.keys() == full.keys()
    for name, tensor in full.items():
        assert copy[name].dtype == tensor.dtype
        assert torch.equal(copy[name], tensor), name
    assert verify_checkpoint(tmp_path / "pieces", out).equal
    assert verify_checkpoint(tmp_path / "full.safetensors", out).equal


def in_pieces(tensors: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Sequence[int]]]) -> list[Tensors]:
    """Cut tensors along a grid; each rank has one cell of each, as long as there are any."""
    ranks: list[Tensors] = []
    for name, (dtype, shape, data) in tensors.items():
        size = len(data) // max(1, int(np.prod(shape)))
        whole = np.frombuffer(data, f"V{size}").reshape(shape)
        edges = [[0, *cut, length] for cut, length in zip(cuts[name], shape, strict=True)]
        for rank, cell in enumerate(product(*map(pairwise, edges))):
            part = whole[tuple(slice(*edge) for edge in cell)]
            ranks += [{} for _ in range(rank + 1 - len(ranks))]
            starts = json.dumps([begin for begin, _ in cell])
            ranks[rank][f"{name}@{starts}"] = Tensor(dtype, part.shape, part.tobytes())
    return ranks


def write_ranks(folder: Path, ranks: Sequence[Tensors]) -> Path:
    """Write what ranks have, called ``name@starts``, as torch does."""
    folder.mkdir(parents=True)
    for rank, tensors in enumerate(ranks, start=1):
        named = {text.rpartition("@")[0]: tensor for text, tensor in tensors.items()}
        offsets = {name: {"saved_offsets": json.loads(starts)} for name, _, starts in
                   (text.rpartition("@") for text in tensors)}  # fmt: skip
        data = safetensors_bytes(named, {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
        (folder / f"shard-{rank:05}-model-00001-of-00001.safetensors").write_bytes(data)
    return folder


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Tensors, dict[str, list[list[int]]]]:
    tensors, cuts = {}, {}
    for number in range(draw(st.integers(1, 4))):
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)]))
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
        nbytes = int(np.prod(shape)) * size
        data = np.random.default_rng(number).bytes(nbytes)
        name = f"t{number}"
        tensors[name] = Tensor(dtype, shape, data)
        places = [st.sets(st.integers(1, max(1, n - 1)), max_size=min(3, n - 1)) for n in shape]
        cuts[name] = [sorted(draw(place)) for place in places]
    return tensors, cuts


@given(cut=cut_tensors())
def test_pieces_of_any_grid_are_put_together(
    cut: tuple[Tensors, dict[str, list[list[int]]]], fresh_folder: FreshFolder
) -> None:
    tensors, cuts = cut
    with fresh_folder() as folder:
        source = write_ranks(folder / "in", in_pieces(tensors, cuts))
        assert shard_checkpoint(source, folder / "out", max_shard_size="1KB").verification.equal
        assert read_checkpoint(folder / "out") == tensors


SQUARE = {"w": Tensor("F32", (4, 6), np.arange(24, dtype="<f4").tobytes())}
QUARTERS = in_pieces(SQUARE, {"w": [[2], [3]]})


def replaced(rank: int, **how: object) -> list[Tensors]:
    """The quarters, with one of them changed."""
    ((text, tensor),) = QUARTERS[rank].items()
    other = Tensor(str(how.get("dtype", tensor.dtype)), how.get("shape", tensor.shape), tensor.data)
    data = other.data[: int(np.prod(other.shape)) * 4].ljust(int(np.prod(other.shape)) * 4, b"\0")
    changed = {f"w@{how.get('starts', text.rpartition('@')[2])}": other._replace(data=data)}
    return [*QUARTERS[:rank], changed, *QUARTERS[rank + 1 :]]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (QUARTERS[1:], r"tensor 'w' has no piece that begins at \[0, 0\]: is the file of a rank missing"),
        (QUARTERS[:3], r"tensor 'w' has no piece that begins at \[2, 3\]"),
        (in_pieces(SQUARE, {"w": [[1, 2], []]})[::2], r"ends at 1 of dimension 0, .* at 2: a piece between"),
        (replaced(0, shape=(3, 3)), r"shard-00001.*ends at 3 of dimension 0, .* 2: two pieces"),
        (replaced(3, starts="[0, 3]"), r"shard-0000[24].*begins at \[0, 3\], as does one in shard-0000[24]"),
        (replaced(1, dtype="I32"), r"shard-00002.*fit: I32 \[2, 3\] here, but F32 \[2, 3\] in shard-00001"),
        (replaced(1, starts="[0]"), r"shard-00002.*has shape \[2, 3\], but DCP_SHARDING_INFO has no saved"),
        (replaced(1, starts='["0", 3]'), r"has no saved_offsets that fit"),
        (replaced(1, starts="[0, 1152921504606846976]"), r"2\*\*60 elements or more"),
    ],
)  # fmt: skip
def test_pieces_that_do_not_make_up_a_tensor_are_refused(
    ranks: list[Tensors], words: str, tmp_path: Path
) -> None:
    write_ranks(tmp_path / "in", ranks)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path / "in")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cuts", [[[4000], []], [[], [4000]]], ids=["rows", "columns"])
def test_pieces_are_put_together_in_little_memory(cuts: list[list[int]], tmp_path: Path) -> None:
    tensor = Tensor("F32", (8000, 8000), bytes(8000 * 8000 * 4))
    source = write_ranks(tmp_path / "in", in_pieces({"w": tensor}, {"w": cuts}))
    del tensor
    report = shard_checkpoint(source, tmp_path / "out", workers=2)
    assert report.peak_bytes is not None
    assert report.before_bytes is not None
    assert report.peak_bytes - report.before_bytes < 24 << 20


@pytest.fixture
def ranks_of_demo(demo: Path, tmp_path: Path) -> Path:
    """The demo model as two ranks would have written it, every matrix cut along its rows."""
    files = [read_file(path) for path in demo.glob("*.safetensors")]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    cuts = {name: [[t.shape[0] // 2], *([] for _ in t.shape[1:])] for name, t in tensors.items()}
    folder = write_ranks(tmp_path / "ranks", in_pieces(tensors, cuts))
    for path in demo.iterdir():
        if ".safetensors" not in path.name:
            shutil.copy(path, folder)
    return folder


def test_a_model_comes_out_as_it_was_before_ranks_cut_it(
    ranks_of_demo: Path, demo: Path, tmp_path: Path
) -> None:
    report = shard_checkpoint(ranks_of_demo, tmp_path / "out", max_shard_size="5MB", dtype="float16")
    assert verify_checkpoint(demo, tmp_path / "out").equal
    assert "MistralForCausalLM gets the same" in str(report)
    opened = Checkpoint.open(ranks_of_demo)
    assert "from pieces in 2 files; no file says how many ranks wrote them" in opened.notes[0]
    assert Checkpoint.from_dict(json.loads(json.dumps(opened.to_dict()))) == opened
    there = fsspec.filesystem("memory")
    there.put(f"{ranks_of_demo}/", "/ranks/", recursive=True)
    shard_checkpoint("memory://ranks", tmp_path / "streamed", max_shard_size="5MB", dtype="float16")
    assert read_checkpoint(tmp_path / "streamed") == read_checkpoint(tmp_path / "out")
    there.rm("/ranks", recursive=True)


def test_a_file_of_a_rank_that_is_missing_shows_where_a_config_says_how_large_tensors_are(
    ranks_of_demo: Path, tmp_path: Path
) -> None:
    (ranks_of_demo / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"another shape than config\.json gives: is a file missing"):
        shard_checkpoint(ranks_of_demo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pieces_are_neither_loaded_nor_freed(ranks_of_demo: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pieces of tensors, which transformers does not load"):
        load_model(ranks_of_demo)
    with pytest.raises(CheckpointError, match="put together, not freed; leave out free_source"):
        shard_checkpoint(ranks_of_demo, tmp_path / "out", free_source=True)


def test_pieces_stay_behind_where_they_have_been_put_together(ranks_of_demo: Path, demo: Path) -> None:
    for path in demo.glob("*.safetensors*"):
        shutil.copy(path, ranks_of_demo)
    opened = Checkpoint.open(ranks_of_demo)
    assert opened.tensors.keys() == Checkpoint.open(demo).tensors.keys()
    assert set(opened.left_out.values()) == {"the same weights in another format"}
    assert len(opened.left_out) == 2
