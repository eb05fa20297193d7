"""GGUF: read by its headers, wherever it is, and refused where its blocks would have to be something else."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from shardkit import (
    Checkpoint,
    compare_loads,
    load_model,
    minimum_memory,
    plan_shards,
    push_checkpoint,
    shard_checkpoint,
)
from shardkit.errors import CheckpointError, PlanError
from shardkit.formats.gguf import BLOCK_BITS
from tests.loopback_hub import LoopbackHub

HIDDEN, LAYERS, VOCABULARY = 512, 3, 3000


def write_llama(path: Path, kind: Type, hidden: int = HIDDEN, layers: int = LAYERS) -> Path:
    """A Llama with random weights, quantized by the format's own library."""
    rng, inner, heads = np.random.default_rng(0), hidden * 3, hidden // 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)

    def put(name: str, *shape: int) -> None:
        weights = rng.standard_normal(shape, dtype=np.float32) / 50
        if len(shape) == 1 or kind == Type.F32:
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    put("token_embd.weight", VOCABULARY, hidden)
    put("output.weight", VOCABULARY, hidden)
    put("output_norm.weight", hidden)
    square = {"attn_q": (hidden, hidden), "attn_output": (hidden, hidden)}
    narrow = {"attn_k": (hidden // 2, hidden), "attn_v": (hidden // 2, hidden)}
    mlp = {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for layer in range(layers):
        for name, shape in {"attn_norm": (hidden,), "ffn_norm": (hidden,), **square, **narrow, **mlp}.items():
            put(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf", Type.Q8_0)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.BF16])
def test_names_shapes_and_bytes_are_those_of_the_formats_own_reader(kind: Type, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", kind, hidden=128, layers=1)
    found = Checkpoint.open(path).tensors
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(found) == list(theirs)
    for name, tensor in found.items():
        assert tensor.shape == tuple(int(length) for length in theirs[name].shape[::-1])
        assert (tensor.offset, tensor.nbytes) == (theirs[name].data_offset, theirs[name].n_bytes)
        assert tensor.dtype == theirs[name].tensor_type.name


def test_blocks_have_the_sizes_that_the_formats_own_library_has() -> None:
    theirs = {kind.name: 8 * nbytes / count for kind, (count, nbytes) in gguf.GGML_QUANT_SIZES.items()}
    assert {name: theirs[name] for name in BLOCK_BITS} == BLOCK_BITS


def test_summary_and_cache_come_from_what_the_file_says_of_its_model(llama: Path) -> None:
    for source in (llama, llama.parent):
        checkpoint = Checkpoint.open(source)
        assert "llama" in str(checkpoint)
        assert "Q8_0" in str(checkpoint)
        config = checkpoint.config or {}
        sizes = [config[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
        assert [*sizes, config["vocab_size"]] == [LAYERS, HIDDEN, HIDDEN // 64, VOCABULARY]
    keys_and_values = 2 * (HIDDEN // 2) * 64 * 4
    assert checkpoint.estimate(context_tokens=64).cache_bytes == (LAYERS + 1) * keys_and_values
    assert "llama.cpp maps the file" in str(checkpoint.estimate())


_LOAD = """
import sys, threading, transformers, torch
from shardkit.base.machine import process_bytes
folder, file, dtype = sys.argv[1:]
most, done = [0], threading.Event()
def watch():
    while not done.wait(0.003):
        most.append(process_bytes())
threading.Thread(target=watch, daemon=True).start()
asked = {"dtype": dtype} if dtype else {}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **asked)
model(torch.tensor([[1, 2, 3]]))
done.set()
print(max(most))
"""


@pytest.mark.parametrize(("kind", "dtype"), [(Type.Q4_0, "float16"), (Type.Q8_0, "")])
def test_estimate_is_what_a_load_takes(kind: Type, dtype: str, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", kind, hidden=1024, layers=4)
    found = Checkpoint.open(path).estimate(dtype or None)
    words = [sys.executable, "-c", _LOAD, str(tmp_path), path.name, dtype]
    peak = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found.peak_anonymous_bytes == pytest.approx(peak, rel=0.08)


@pytest.mark.parametrize(
    "use",
    [
        plan_shards,
        lambda path: shard_checkpoint(path, path.parent / "out"),
        lambda path: load_model(path.parent),
        lambda path: compare_loads(path, path.parent),
        minimum_memory,
        lambda path: push_checkpoint(path.parent, "me/model"),
    ],
)
def test_what_needs_other_weights_refuses_it(use: Callable[[Path], object], llama: Path) -> None:
    with pytest.raises((PlanError, CheckpointError), match="GGUF: what a load takes can be estimated"):
        use(llama)
    assert [path.name for path in llama.parent.iterdir()] == [llama.name]


DAMAGED = {
    "cut in its header": (lambda raw: raw[:2000], "extend to byte"),
    "cut in its weights": (lambda raw: raw[:-100_000], "extend to byte"),
    "of another format": (lambda raw: b"GGML" + raw[4:], "not a GGUF file"),
    "of a version to come": (lambda raw: raw[:4] + b"\x09" + raw[5:], "of version 9"),
    "with endless keys": (
        lambda raw: raw[:16] + b"\xff" * 8 + raw[24:],
        "claims",
    ),
    "with endless tensors": (
        lambda raw: raw[:8] + b"\xff" * 8 + raw[16:],
        "claims",
    ),
    "a pointer of Git LFS": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_file_is_refused_by_name(how: str, llama: Path, tmp_path: Path) -> None:
    damage, problem = DAMAGED[how]
    (tmp_path / "m.gguf").write_bytes(damage(llama.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"m\.gguf.*(?:{problem})"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_header_is_read_from_the_hub_and_one_of_several_is_named_by_its_page(
    hub: LoopbackHub, llama: Path, tmp_path: Path
) -> None:
    (folder := tmp_path / "model").mkdir()
    large = write_llama(folder / "m-Q8_0.gguf", Type.Q8_0, hidden=1024)
    (folder / "m-Q4_0.gguf").write_bytes(llama.read_bytes())
    sha = hub.add_model("org/ggufs", folder)
    with pytest.raises(CheckpointError, match=r"several checkpoints .*URL of its page"):
        Checkpoint.open("org/ggufs")
    found = Checkpoint.open("https://huggingface.co/org/ggufs/blob/main/m-Q8_0.gguf")
    assert found.source == f"hf://org/ggufs@{sha}/m-Q8_0.gguf"
    assert found.total_bytes == Checkpoint.open(large).total_bytes
    assert hub.sent("GET storage") < large.stat().st_size // 4


def test_command_line_answers_and_says_what_it_does_not_do(llama: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "shardkit", *words], capture_output=True, text=True)

    answered = run("inspect", str(llama), "--dtype", "fp16")
    assert answered.returncode == 0
    assert "Colab T4" in answered.stdout
    assert "next:" not in answered.stdout
    refused = run("shard", str(llama))
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
