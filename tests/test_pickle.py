"""Pickles: what is in them survives, aliases as transformers treats them, and nothing in them is executed."""

import collections
import gc
import importlib
import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shardkit import Checkpoint, shard_checkpoint, verify_checkpoint
from shardkit.errors import CheckpointError
from shardkit.formats import strided
from shardkit.formats.tensor import DTYPE_NAMES
from shardkit.shard import tasks
from tests.torch_files import raw, same

ZIP, LEGACY = True, False
FORMATS = pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])


def save(state: object, path: Path, zipped: bool = ZIP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path.parent


def save_sharded(states: list[dict[str, torch.Tensor]], folder: Path, zipped: bool = ZIP) -> Path:
    names = [f"pytorch_model-{n:05d}-of-{len(states):05d}.bin" for n in range(1, len(states) + 1)]
    for name, state in zip(names, states, strict=True):
        save(state, folder / name, zipped)
    weight_map = {key: name for name, state in zip(names, states, strict=True) for key in state}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sharded(source: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Shard a folder, and read the result with safetensors' own reader."""
    report = shard_checkpoint(source, out, **{"max_shard_size": 2000} | options)
    assert report.verification is not None
    return {name: tensor for file in report.files for name, tensor in load_file(out / file).items()}


def every_kind(zipped: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 10, generator=generator)
    new = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16", "uint32", "uint64"]
    byte_dtypes = ["bfloat16", "int8", *(new if zipped else [])]  # the legacy format knows no new ones
    raw = torch.randint(0, 255, (64,), dtype=torch.uint8, generator=generator)
    return {
        "large": torch.randn(40, 30, generator=generator),
        "scalar": torch.tensor(3.5),
        "bool scalar": torch.tensor(True),
        "empty": torch.empty(0, 7),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "parameter": torch.nn.Parameter(torch.randn(5, generator=generator)),
        "int64": torch.arange(9),
        "complex64": torch.view_as_complex(torch.randn(3, 2, generator=generator)),
        **{name: raw.clone().view(getattr(torch, name)) for name in byte_dtypes},
    }


@FORMATS
def test_tensors_of_every_kind_survive(zipped: bool, tmp_path: Path) -> None:
    state = every_kind(zipped)
    found = sharded(save(state, tmp_path / "source" / "pytorch_model.bin", zipped), tmp_path / "out")
    assert found.keys() == state.keys()
    assert [name for name in state if not same(found[name], state[name])] == []


@FORMATS
def test_sharded_pickle_is_read_by_its_index(zipped: bool, tmp_path: Path) -> None:
    states = [{f"t{i}.{n}": torch.randn(20) for n in range(5)} for i in range(3)]
    source = save_sharded(states, tmp_path / "source", zipped)
    found = sharded(source, tmp_path / "out", max_shard_size=500)
    assert all(same(found[name], tensor) for state in states for name, tensor in state.items())
    assert len(found) == 15
    assert not list((tmp_path / "out").glob("*.bin*"))


@FORMATS
def test_pickle_can_be_cast(zipped: bool, tmp_path: Path) -> None:
    state = {"w": torch.randn(700), "n": torch.arange(3)}
    found = sharded(
        save(state, tmp_path / "a" / "pytorch_model.bin", zipped), tmp_path / "out", dtype="bfloat16"
    )
    assert same(found["w"], state["w"].bfloat16())
    assert same(found["n"], state["n"])


def test_legacy_file_says_what_a_load_takes(tmp_path: Path) -> None:
    for zipped in (ZIP, LEGACY):
        folder = save({"w": torch.ones(3)}, tmp_path / str(zipped) / "pytorch_model.bin", zipped)
        assert ("loading reads all of it into memory" in str(Checkpoint.open(folder))) == (zipped is LEGACY)


@FORMATS
def test_nothing_of_a_pickle_stays_in_memory_after_the_job(zipped: bool, tmp_path: Path) -> None:
    length = 34_567
    source = save({"w": torch.ones(length)}, tmp_path / "source" / "pytorch_model.bin", zipped)
    shard_checkpoint(source, tmp_path / "out")
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    assert [tensor.shape for tensor in alive if tensor.shape == (length,)] == []


def test_state_dict_of_a_trainer_is_found_where_transformers_looks_for_it(tmp_path: Path) -> None:
    state = {"state_dict": {"w": torch.ones(3)}, "epoch": 3}
    assert list(sharded(save(state, tmp_path / "a" / "pytorch_model.bin"), tmp_path / "out")) == ["w"]


def test_ordered_dict_of_a_module_is_a_state_dict(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    assert isinstance(state, collections.OrderedDict)
    found = sharded(save(state, tmp_path / "a" / "pytorch_model.bin"), tmp_path / "out")
    assert all(same(found[name], tensor) for name, tensor in state.items())


def marked() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  as transformers marks its own
    return tensor


@pytest.mark.parametrize(
    "make", [marked, lambda: torch.nn.Buffer(torch.ones(3))], ids=["attribute", "buffer"]
)
def test_tensor_that_torch_writes_with_its_type_is_a_tensor(
    make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    folder = save({"w": make()}, tmp_path / "a" / "pytorch_model.bin")
    assert torch.equal(torch.load(folder / "pytorch_model.bin", weights_only=True)["w"], torch.ones(3))
    assert same(sharded(folder, tmp_path / "out")["w"], torch.ones(3))


def test_packed_float4_keeps_all_its_bytes(tmp_path: Path) -> None:
    packed = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    found = sharded(save({"w": packed}, tmp_path / "a" / "pytorch_model.bin"), tmp_path / "out")
    assert same(found["w"].view(torch.uint8), packed.view(torch.uint8))


@pytest.mark.parametrize("view", ["conj", "neg"])
def test_view_that_torch_resolves_when_it_reads_it_is_refused(view: str, tmp_path: Path) -> None:
    wave = torch.tensor([1 + 2j, 3 - 1j])
    folder = save({"w": wave.conj() if view == "conj" else torch._neg_view(wave.real)}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match="conjugate or negative view: save it resolved"):
        Checkpoint.open(folder)


def views(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors whose elements do not lie one after the other, of every kind that can be saved."""
    base = torch.randn(2, 9, 10, 7, generator=torch.Generator().manual_seed(seed))
    return {
        "transposed": base[0, 0].t(),
        "permuted": base.permute(3, 1, 0, 2),
        "experts": base[0].transpose(1, 2),
        "every third column": base[..., 1::3],
        "every other row from the second on": base[:, 1::2],
        "a column": base[1, :, 3, 5],
        "expanded": base[0, 0, :, :1].expand(10, 33),
        "expanded in front": base[0, 0].t().expand(3, 7, 10),
        "expanded scalar": base[0, 0, 0, 0].expand(5, 5),
        "windows": base[0, 0, :, 0].unfold(0, 4, 1),
        "one element of a column": base[0, :, 3, 5][4:5],
        "complex": torch.view_as_complex(base[..., :2].contiguous()).mT,
        "float16": base.half().mT,
        "bool": (base > 0).mT,
        "float8": base.to(torch.float8_e4m3fn).mT,
        "float4": torch.arange(24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).view(4, 6).t(),
    }


@pytest.mark.parametrize("piece_bytes", [1, 24, 100, 4 << 20])
def test_tensor_that_is_not_contiguous_is_gathered_in_pieces_of_any_size(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strided, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(tasks, "TASK_BYTES", 80)
    state = views()
    source = save(state, tmp_path / "source" / "pytorch_model.bin")
    found = sharded(source, tmp_path / "out", max_shard_size=8000)
    assert found.keys() == state.keys()
    assert [name for name in state if not same(found[name], state[name])] == []
    source = save({"permuted": state["permuted"]}, tmp_path / "floats" / "pytorch_model.bin")
    cast = sharded(source, tmp_path / "cast", dtype="bfloat16", max_shard_size=8000)
    assert same(cast["permuted"], state["permuted"].contiguous().bfloat16())


@settings(max_examples=150)
@given(data=st.data(), piece_bytes=st.integers(1, 300))
def test_any_bytes_of_any_view_are_those_of_its_contiguous_copy(
    data: st.DataObject, piece_bytes: int
) -> None:
    base = torch.arange(360, dtype=data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float64])))
    shape = data.draw(st.sampled_from([(360,), (18, 20), (5, 8, 9), (3, 4, 5, 6), (2, 1, 3, 10, 6)]))
    view = base.view(shape).permute(data.draw(st.permutations(range(len(shape)))))
    for axis in range(view.dim()):
        start, step = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3))
        view = view.movedim(axis, 0)[start::step].movedim(0, axis)
    axis = data.draw(st.integers(0, view.dim()))
    view = (
        view.unsqueeze(axis)
        .movedim(axis, 0)
        .expand(data.draw(st.integers(1, 3)), *view.shape)
        .movedim(0, axis)
    )
    expected = raw(view)
    offset = data.draw(st.integers(0, len(expected)))
    nbytes = data.draw(st.integers(0, len(expected) - offset))
    layout = strided.Layout(tuple(view.shape), view.stride(), view.itemsize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "PIECE_BYTES", piece_bytes)
        gathered = strided.gather(base.numpy(), view.storage_offset() * base.itemsize, layout, offset, nbytes)
        pieces = [bytes(piece) for piece in gathered]
    assert b"".join(pieces) == expected[offset : offset + nbytes]
    assert view.is_contiguous() or all(len(piece) <= max(piece_bytes, view.itemsize) for piece in pieces)


GATHER = """
import sys, threading, torch
from shardkit import Checkpoint, shard_checkpoint
def anonymous():
    status = open("/proc/self/status").read()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])
shard_checkpoint(sys.argv[1] + "/small", sys.argv[1] + "/first")  # what torch takes for its first tensor
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watching = threading.Thread(target=watch)
watching.start()
shard_checkpoint(sys.argv[1] + "/large", sys.argv[1] + "/out", workers=4)
done.set()
watching.join()
print(peak[0] - before)
"""


@pytest.mark.slow
def test_transposed_tensor_of_any_size_takes_less_than_64_mb(tmp_path: Path) -> None:
    for name, rows in (("small", 1000), ("large", 8000)):
        save({"w": torch.ones(4000, rows).t()}, tmp_path / name / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-c", GATHER, tmp_path], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 64_000_000


# Tied weights ----------------------------------------------------------------------------------------


def saved_model(model: Any, folder: Path, zipped: bool = ZIP) -> Path:
    """Save as people did before safetensors: the whole state dict, aliases and all."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return save(model.state_dict(), folder / "pytorch_model.bin", zipped)


def logits(model: Any, kind: str) -> torch.Tensor:
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        return model(tokens, decoder_input_ids=tokens).logits if kind == "t5" else model(tokens).logits


ALIASES = {
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "t5": {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
}


@FORMATS
@pytest.mark.parametrize("kind", ALIASES)
def test_model_with_tied_weights_loads_equal(
    kind: str, zipped: bool, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model(kind, tie_word_embeddings=True)
    source = saved_model(model, tmp_path / "source", zipped)
    assert Checkpoint.open(source).aliases == ALIASES[kind]
    found = sharded(source, tmp_path / "out", max_shard_size=20_000)
    assert found.keys() == model.state_dict().keys()
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert [name for name in theirs if not same(ours[name], theirs[name])] == []
    assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert verify_checkpoint(source, tmp_path / "out").equal


@pytest.mark.parametrize("tie", [True, False, None])
def test_layers_that_share_storage_are_each_written(
    tie: bool | None, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=bool(tie))
    state = dict(model.state_dict())
    state |= {name.replace(".h.1.", ".h.2."): value for name, value in state.items() if ".h.1." in name}
    model.config.n_layer = 3
    source = saved_model(model, tmp_path / "source")
    if tie is None:  # as old configs have it
        config = json.loads((source / "config.json").read_text())
        config.pop("tie_word_embeddings")
        (source / "config.json").write_text(json.dumps(config))
    save(state, source / "pytorch_model.bin")
    found = sharded(source, tmp_path / "out", max_shard_size=20_000)
    assert found.keys() == state.keys()
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert same(loaded.transformer.h[2].attn.c_attn.weight, state["transformer.h.1.attn.c_attn.weight"])


def test_what_shares_storage_is_told_with_what_it_takes(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    source = saved_model(tiny_model("gpt2", tie_word_embeddings=True), tmp_path / "source")
    report = shard_checkpoint(source, tmp_path / "out")
    assert "1 tensor sharing the storage of another in the source" in str(report)
    assert "written separately (12.3 KB more): lm_head.weight" in str(report)  # 96 by 32 float32
    assert report.nbytes == Checkpoint.open(source).total_bytes


def test_embedding_of_an_encoder_alone_is_found_in_what_was_made_of_sorted_keys(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import T5EncoderModel

    model = tiny_model("t5", tie_word_embeddings=True)
    source = saved_model(model, tmp_path / "source")
    save(dict(sorted(model.state_dict().items())), source / "pytorch_model.bin")
    shard_checkpoint(source, tmp_path / "out")
    ours, theirs = (
        T5EncoderModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", source)
    )
    assert [name for name in theirs if not same(ours[name], theirs[name])] == []


def test_verification_does_not_take_one_of_two_tied_names_for_both(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=True)
    source = saved_model(model, tmp_path / "source")
    model.save_pretrained(tmp_path / "copy")  # which drops the head
    found = verify_checkpoint(source, tmp_path / "copy")
    assert (found.equal, found.missing) == (False, ("lm_head.weight",))


def test_values_that_are_no_tensors_are_left_out_and_named(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=False)
    source = saved_model(model, tmp_path / "source")
    more = {"transformer.h.0._extra_state": None, "epoch": 3, "args": {"lr": 0.1}, "names": ["a"]}
    save({**more, **model.state_dict()}, source / "pytorch_model.bin")
    report = shard_checkpoint(source, tmp_path / "out")
    assert report.tensors == len(model.state_dict())
    assert (
        "4 values that are not tensors of its state dict, left out: transformer.h.0._extra_state, epoch"
        in str(report)
    )
    assert report.verification is not None
    assert report.verification.model is not None
    assert report.verification.model.differences == ()


def test_config_that_does_not_tie_gets_every_tensor_of_shared_storage(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=True)
    model.config.tie_word_embeddings = False
    source = saved_model(model, tmp_path / "source")
    found = sharded(source, tmp_path / "out")
    assert same(found["lm_head.weight"], found["transformer.wte.weight"])
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.weight.data_ptr() != loaded.transformer.wte.weight.data_ptr()
    assert torch.equal(logits(loaded, "gpt2"), logits(model, "gpt2"))


def test_safetensors_that_hold_a_tied_weight_twice_keep_both(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = tmp_path / "source"
    model.config.save_pretrained(source)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    found = sharded(source, tmp_path / "out")
    assert found.keys() == state.keys()
    assert same(found["lm_head.weight"], state["lm_head.weight"])


@FORMATS
def test_views_of_one_storage_that_differ_are_each_written(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {
        "whole": base,
        "half": base[:6],
        "end": base[6:],
        "matrix": base.view(3, 4),
        "t": base.view(3, 4).t(),
    }
    found = sharded(save(state, tmp_path / "a" / "pytorch_model.bin", zipped), tmp_path / "out")
    assert [name for name in state if not same(found[name], state[name])] == []


# What is refused -------------------------------------------------------------------------------------


class Runs:
    """Pickles to a call of `function` with `arguments`, as a hostile file would hold it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hostile(marker: Path) -> dict[str, object]:
    """Objects that leave a file behind when they are unpickled."""
    touch = f"open({os.fspath(marker)!r}, 'w').close()"
    return {
        "os.system": Runs(os.system, f"touch '{marker}'"),
        "exec": Runs(exec, touch),
        "eval": Runs(eval, touch),
        "subprocess": Runs(subprocess.check_output, ["touch", os.fspath(marker)]),
        "open": Runs(open, os.fspath(marker), "w"),
        "a chain": Runs(
            list,
            Runs(map, Runs(getattr, Runs(importlib.import_module, "os"), "system"), [f"touch '{marker}'"]),
        ),
        "pickle in a pickle": Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch '{marker}'"))),
        "Path.touch": Runs(Path.touch, marker),
    }


KINDS = list(hostile(Path()))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickle_runs_where_nobody_stops_it(kind: str, tmp_path: Path) -> None:
    # Without this, the refusals below would prove nothing.
    pickle.loads(pickle.dumps(hostile(tmp_path / "executed")[kind], protocol=2))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["alone", "beside weights", "as a name", "in a state dict"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_pickle_that_wants_to_run_code_is_refused_and_not_run(
    form: str, kind: str, where: str, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    evil = hostile(marker)[kind]
    content: object = {
        "alone": evil,
        "beside weights": {"w": torch.ones(2), "evil": evil},
        "as a name": [(evil, torch.ones(2))],
        "in a state dict": {"state_dict": {"w": torch.ones(2)}, "optimizer": evil},
    }[where]
    path = tmp_path / "source" / "pytorch_model.bin"
    if form == "bare pickle":
        path.parent.mkdir()
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        save(content, path, form == "zip")
    with pytest.raises(CheckpointError) as caught:
        shard_checkpoint(path.parent, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_refusal_does_not_advise_to_run_the_code(tmp_path: Path) -> None:
    folder = save({"w": Runs(os.system, "true")}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"system") as caught:
        Checkpoint.open(folder)
    assert "weights_only" not in str(caught.value)
    assert "will likely succeed" not in str(caught.value)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them; files with them stay
        return torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)


NOT_PLAIN: dict[str, tuple[object, list[str]]] = {
    "tensor": (torch.ones(3), ["Tensor", "not a state dict"]),
    "list": ([torch.ones(3)], ["list", "not a state dict"]),
    "no named tensors": ({"model": {"w": torch.ones(3)}, "epoch": 3}, ["no named tensors", "model, epoch"]),
    "number as name": ({"w": torch.ones(3), 1: torch.ones(3)}, ["name is 1", "not a string"]),
    "sparse": ({"w": torch.eye(3).to_sparse()}, ["sparse", "not allowed"]),
    "quantised": ({"w": quantised()}, ["qtensor", "not allowed"]),
    "complex128": ({"w": torch.ones(3, dtype=torch.complex128)}, ["'w'", "complex128"]),
    "no data": ({"w": torch.ones(3, device="meta")}, ["meta", "not allowed"]),
    "escape": ({"a\x1b[2J": torch.ones(3)}, ["unprintable"]),
    "newline": ({"a\nb": torch.ones(3)}, ["unprintable"]),
    "surrogate": ({"\ud800": torch.ones(3)}, ["unprintable"]),
    "name of the metadata": ({"__metadata__": torch.ones(3)}, ["__metadata__"]),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_pickle_of_anything_but_plain_tensors_is_refused(kind: str, tmp_path: Path) -> None:
    content, words = NOT_PLAIN[kind]
    save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_record_is_refused_with_its_sizes(compression: int, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    save({"w": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data, compression if name.endswith("data/0") else zipfile.ZIP_STORED)
    assert path.stat().st_size < 10_000  # a bomb, in small
    with pytest.raises(CheckpointError, match=r"data/0' is compressed \(\d+ bytes to 4000000\)"):
        Checkpoint.open(tmp_path)


BOMBS = {
    "marks": (b"}" + b"(" * 1_000_000, "nested more than 100 deep"),
    "objects": (b"}" * 1000, "objects on the stack"),
    "steps": (b"N" * 6_000_000, "5500000 opcodes"),
    "lists": (b"]" * 1_000_000, "2000000 tuples, lists and dicts"),
    "frame": (b"\x95" + (1_000_000).to_bytes(8, "little") + b"}" * 1_000_000, "not allowed"),
}


@pytest.mark.parametrize("kind", BOMBS)
@FORMATS
def test_pickle_that_makes_work_instead_of_tensors_is_refused(
    kind: str, zipped: bool, tmp_path: Path
) -> None:
    opcodes, words = BOMBS[kind]
    raw, path = b"\x80\x02" + opcodes + b".", tmp_path / "pytorch_model.bin"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
    else:
        path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "zeros": lambda raw: bytes(len(raw)),
    "not a pickle": lambda _: b"hello world",
    "another format": lambda _: b"GGUF\3\0\0\0" + bytes(100),
    "zip without records": lambda _: b"PK\5\6" + bytes(18),
    "no directory": lambda raw: raw[:-22],
}


@pytest.mark.parametrize("damage", BROKEN)
@FORMATS
def test_broken_pickle_is_one_clear_error(damage: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    save({"w": torch.randn(500)}, path, zipped)
    path.write_bytes(BROKEN[damage](path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_git_lfs_pointer_in_place_of_a_pickle_is_told_from_weights(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 90868376\n"
    (tmp_path / "pytorch_model.bin").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_pickles_is_that_of_the_last_as_in_transformers(tmp_path: Path) -> None:
    states = [{"a": torch.ones(1), "w": torch.zeros(1)}, {"b": torch.ones(1), "w": torch.ones(1)}]
    source = save_sharded(states, tmp_path / "source")
    assert "w is in both pytorch_model-00001-of-00002.bin and pytorch_model-00002" in str(
        Checkpoint.open(source)
    )
    assert same(sharded(source, tmp_path / "out")["w"], torch.ones(1))


def test_pickle_that_lacks_a_tensor_of_its_index_is_taken_with_a_note(tmp_path: Path) -> None:
    save_sharded([{"a": torch.ones(1), "w": torch.ones(1)}, {"b": torch.ones(1)}], tmp_path)
    save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert "pytorch_model.bin.index.json lists 1 tensor that no file contains: w" in str(checkpoint)


def test_missing_shard_of_a_pickle_is_named(tmp_path: Path) -> None:
    save_sharded([{"a": torch.ones(1)}, {"b": torch.ones(1)}], tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin.*does not exist"):
        Checkpoint.open(tmp_path)


def test_every_dtype_of_torch_that_safetensors_knows_is_listed_under_its_name(tmp_path: Path) -> None:
    for name in set(DTYPE_NAMES.values()) - {"float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn_x2"}:
        state = {"w": torch.zeros(16, dtype=torch.uint8).view(getattr(torch, name))}
        (tensor,) = Checkpoint.open(save(state, tmp_path / name / "pytorch_model.bin")).tensors.values()
        assert DTYPE_NAMES[tensor.dtype] == name
        assert tensor.nbytes == 16


def test_expanded_tensor_larger_than_its_file_is_written_in_full(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(1).expand(300, 400)}, tmp_path / "a" / "pytorch_model.bin")
    assert same(sharded(source, tmp_path / "out", max_shard_size="1GB")["w"], torch.zeros(300, 400))


def test_state_dict_in_a_wrapper_that_transformers_does_not_look_into_is_sharded(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt2", tie_word_embeddings=False)
    source = saved_model(model, tmp_path / "source")
    save({"state_dict": model.state_dict(), "epoch": 1}, source / "pytorch_model.bin")
    report = shard_checkpoint(source, tmp_path / "out")
    assert report.verification is not None
    assert report.verification.model is not None
    assert report.verification.model.missing == ()


def test_what_lies_beside_a_state_dict_is_named(tmp_path: Path) -> None:
    both = {"state_dict": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}, "extra.weight": torch.ones(3)}
    found = Checkpoint.open(save(both, tmp_path / "both.bin") / "both.bin")
    assert list(found.tensors) == ["a"]
    assert "2 values that are not tensors of its state dict, left out: ema, extra.weight" in str(found)
    empty = {"state_dict": {}, "w": torch.ones(3)}
    assert list(Checkpoint.open(save(empty, tmp_path / "w.bin") / "w.bin").tensors) == ["w"]


def test_values_that_torch_reads_beside_tensors_are_left_out_with_a_note(tmp_path: Path) -> None:
    values = {"bytes": b"abc", "set": {1}, "complex": 1j, "counts": collections.Counter("aab")}
    found = Checkpoint.open(save({"a": torch.ones(2), **values}, tmp_path / "w.bin") / "w.bin")
    assert list(found.tensors) == ["a"]
    assert f"4 values that are not tensors of its state dict, left out: {', '.join(values)}" in str(found)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"", b"\x08\0\0\0\0\0\0\0{}"])
def test_other_files_are_not_taken_for_torch_s(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not start like a file of torch\.save"):
        Checkpoint.open(tmp_path)


def test_file_of_python_2_numbers_its_memo_from_one(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    stream, made = io.BytesIO(path.read_bytes()), b""
    for _ in range(5):
        start = stream.tell()
        opcodes = [(opcode.name, place) for opcode, _, place in pickletools.genops(stream)]
        program = bytearray(stream.getvalue()[start : stream.tell()])
        for name, place in opcodes:
            if name in ("BINPUT", "BINGET"):
                program[place - opcodes[0][1] + 1] += 1
        made += program
    path.write_bytes(made + stream.read())
    assert torch.equal(torch.load(path)["a"], torch.arange(3.0))
    assert Checkpoint.open(path).tensors["a"].shape == (3,)
