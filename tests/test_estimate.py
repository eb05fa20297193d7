"""What headers say of a load's memory, against loads that were measured."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shardkit import Checkpoint, load_model, make_demo_checkpoint, measure_load, plan_shards
from shardkit.base import disk, extras
from shardkit.base.extras import is_torch_for_cuda
from shardkit.base.machine import Gpus, filesystem
from shardkit.base.sizes import format_size
from shardkit.checkpoint import budget, estimate, fits
from shardkit.checkpoint import checkpoint as checkpoint_module
from shardkit.checkpoint.bounded import _COMPARED
from shardkit.checkpoint.estimate import Estimate, estimate_load
from shardkit.checkpoint.fits import Sizes
from shardkit.checkpoint.hosts import HOSTS, DiskRate, HostFit, Need, Ways, fit
from shardkit.demo import demo_shape
from shardkit.errors import CheckpointError, PlanError
from shardkit.formats.safetensors import tensor_bytes
from shardkit.formats.tensor import TensorInfo
from shardkit.load import blocks, within
from shardkit.load.generate import generate_text
from tests import architectures
from tests.support import sparse_file


def stored_tensor(name: str, dtype: str, *shape: int) -> TensorInfo:
    """Return a tensor at the beginning of a file."""
    return TensorInfo(name, dtype, shape, "model.safetensors", 0, tensor_bytes(dtype, shape))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Checkpoint:
    return make_demo_checkpoint(tmp_path_factory.mktemp("estimate") / "model", size="300MB")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_estimate_is_within_5_percent_of_a_measured_load(model, dtype):
    measured = measure_load(model.source, dtype=dtype, cache="warm")
    predicted = model.estimate(dtype).peak_anonymous_bytes
    assert measured.ok, measured.reason
    assert predicted == pytest.approx(measured.peak_anonymous_bytes, rel=0.05)


def test_what_transformers_keeps_in_float32_counts_as_that():
    stored = [
        stored_tensor("block.0.DenseReluDense.wo.weight", "BF16", 1000),
        stored_tensor("q.weight", "BF16", 10),
    ]
    copied = [
        estimate_load("t5", stored, dtype, config={"model_type": "t5"}).copied_bytes
        for dtype in ("float16", "float32")
    ]
    assert copied == [4 * 1000 + 2 * 10, 4 * 1010]
    assert estimate_load("t5", stored, "bfloat16", config={"model_type": "t5"}).copied_bytes == 0


def test_experts_are_stacked_in_memory_whatever_their_dtype():
    stored = [stored_tensor("layers.0.mlp.experts.3.w1.weight", "BF16", 1000)]
    as_is, cast = (estimate_load("moe", stored, dtype) for dtype in (None, "float32"))
    assert (as_is.copied_bytes, as_is.stacking_bytes, as_is.mapped_bytes) == (2000, 500, 0)
    assert (cast.copied_bytes, cast.stacking_bytes) == (4000, 4000)
    assert "4 KB while experts are stacked" in str(cast)


def mixed_dtypes(
    folder: Path, said: Any = None, *, floats: str = "norm", shards: int = 1, index_dtype: Any = None,
    pickle: bool = False, nested: Any = None,
) -> Path:  # fmt: skip
    """Write a tiny Llama, in bfloat16 but for some tensors, and what config and index say of it."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape))
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = {
        name: tensor.to(torch.float32 if floats in name else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    names, save = sorted(state, reverse=True), torch.save if pickle else save_file
    stem, ending = ("pytorch_model", "bin") if pickle else ("model", "safetensors")
    weight_map = {}
    for n in range(shards):
        file = f"{stem}-{n + 1:05d}-of-{shards:05d}.{ending}" if shards > 1 else f"{stem}.{ending}"
        save({name: state[name] for name in names[n::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[n::shards], file)
    if shards > 1:
        metadata = {"total_size": 1} | ({"dtype": index_dtype} if index_dtype else {})
        index = {"metadata": metadata, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    config |= ({"dtype": said} if said else {}) | ({"vision_config": {"dtype": nested}} if nested else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


AUTO_DTYPES = {
    "first name in order is bfloat16": {},
    "first name in order is float32": {"floats": "lm_head"},
    "config says": {"said": "float16"},
    "config says, index says another": {"said": "float16", "shards": 2, "index_dtype": "float32"},
    "config says one for each part": {"said": {"": "bfloat16", "vision_config": "float32"}},
    "config says one for some parts": {"said": {"vision_config": "bfloat16"}},
    "config says float64": {"said": "float64"},
    "config says it of a part": {"nested": "float32"},
    "index says": {"shards": 2, "index_dtype": "float32"},
    "first shard's first name": {"shards": 3},
    "first shard's first name, in float32": {"shards": 3, "floats": "layers.1.self_attn.v_proj"},
    "pickle's first entry": {"pickle": True},
    "pickle's first entry, not the first name": {"pickle": True, "floats": "lm_head"},
    "pickles with an index that says": {"pickle": True, "shards": 2, "index_dtype": "float16"},
    "first pickle's first entry": {"pickle": True, "shards": 2},
}


@pytest.mark.parametrize("case", AUTO_DTYPES)
def test_dtype_that_nobody_requested_is_the_one_transformers_chooses(case, tmp_path):
    folder = mixed_dtypes(tmp_path, **AUTO_DTYPES[case])
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    estimate = Checkpoint.open(folder).estimate()
    assert f"torch.{estimate.dtype}" == str(loaded.lm_head.weight.dtype)
    parameters = sum(p.nbytes for p in loaded.parameters())
    held = Checkpoint.open(folder).dtypes
    assert estimate.copied_bytes + estimate.mapped_bytes == parameters
    assert estimate.mapped_bytes == held.get({"float32": "F32", "bfloat16": "BF16"}.get(estimate.dtype), 0)
    planned = plan_shards(folder, max_shard_size="2KB").estimate(estimate.dtype, config=None)
    assert planned.copied_bytes == estimate.copied_bytes


def test_shards_in_the_dtype_asked_for_are_mapped_and_not_copied(model):
    as_is, sharded = (
        model.estimate("float16"),
        plan_shards(model, dtype="float16").estimate("float16", config=None),
    )
    assert as_is.copied_bytes == sharded.mapped_bytes == model.total_bytes
    assert as_is.mapped_bytes == sharded.copied_bytes == 0


def test_tied_tensors_of_a_pickle_are_converted_one_by_one(tmp_path):
    weights = torch.zeros(100, 10)
    torch.save({"a": weights, "b": weights, "c": torch.zeros(7)}, tmp_path / "pytorch_model.bin")
    tied = Checkpoint.open(tmp_path)
    assert len(tied.aliases) == 1
    assert tied.estimate("float16").copied_bytes == 2 * (2 * 1000 + 7)
    assert tied.estimate("float16").mapped_bytes == 0
    assert tied.estimate("float32").mapped_bytes == 4 * (1000 + 7)


def test_a_plan_knows_of_the_model_what_its_config_says(model):
    config = {**model.config, "quantization_config": {"quant_method": "mxfp4"}}
    assert "quantized (" not in str(plan_shards(model).estimate(None, config=model.config))
    assert "quantized (mxfp4)" in str(plan_shards(model).estimate(None, config=config))


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_what_the_config_says_decides_where_no_dtype_is_asked_for(model, dtype):
    says_float32 = dataclasses.replace(model, config={**model.config, "dtype": "float32"})
    assert model.estimate(dtype).copied_bytes == 0
    assert says_float32.estimate(dtype).copied_bytes == 2 * model.total_bytes


def test_an_unknown_dtype_is_refused(model):
    with pytest.raises(PlanError, match="int3"):
        model.estimate("int3")


GB = 10**9


def test_a_host_fits_all_of_it_or_only_what_must_exist_or_neither():
    needs = [Need(a * GB, m * GB, m * GB) for a, m in [(4, 4), (4, 8), (10, 0)]]
    found = [fit("host", 10 * GB, need) for need in needs]
    verdicts = ["fits", "fits, each token reads 8 GB from disk", "does not fit"]
    assert [host.verdict for host in found] == verdicts
    assert [host.read_bytes for host in found] == [0, 8 * GB, None]
    assert [host.ways[0].short for host in found] == ["fits", "reads 8 GB", "needs 10 GB"]


def test_more_than_30_seconds_a_token_is_too_slow_and_a_measured_rate_is_of_this_machine_alone():
    need = Need(0, 30 * GB, 30 * GB)
    fast, slow = (Ways(disk_rate=DiskRate(rate, is_measured=False)) for rate in (GB, GB - 1))
    assert fit("host", 10 * GB, need, fast).verdict == "fits, each token reads 30 GB from disk, about 30 s"
    assert fit("host", 10 * GB, need, slow).verdict.startswith("too slow to use: each token reads 30 GB")
    assert fit("host", 10 * GB, need, slow).ways[0].short == "too slow, 30 s"
    measured = Ways(disk_rate=DiskRate(GB, is_measured=True))
    here, elsewhere = (fit(name, 10 * GB, need, measured).ways[0] for name in ("this machine", "host"))
    assert (here.seconds_per_token, elsewhere.seconds_per_token) == (30, None)


def test_the_summary_answers_for_every_host_and_says_where_its_figures_are_from(model, monkeypatch):
    monkeypatch.setattr(fits, "gpus", lambda: {"A10": Gpus(1, 20 * GB, capability=8.6)})
    found = model.estimate("float16")
    for shown in (str(found), found._repr_html_()):
        assert all(host in shown for host in (*HOSTS, "this machine (free)", "this machine (free): A10"))
        assert "not stated" in shown  # Binder's disk
    assert all(host.seen for host in HOSTS.values())
    answers = (*found.hosts, *found.gpus, *found.disks)
    assert all(HOSTS[fit.name].seen == fit.seen for fit in answers if fit.name in HOSTS)
    assert Estimate.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def sizes(**changed: Any) -> Sizes:
    """Sizes of a model of 14 GB in blocks of 1 GB, on the Hub."""
    return dataclasses.replace(Sizes("bfloat16", 14 * GB, 0, GB, 14 * GB, 14 * GB), **changed)


def on_gpus(made: Sizes) -> dict[str, tuple[str, str, str]]:
    return {found.name: (found.verdict, found.why, found.advice) for found in fits.fit_gpus(made)}


def test_weights_and_kv_cache_fit_what_cuda_leaves_of_a_gpu():
    t4 = 16_106_127_360 - 1_343_000_000
    exact, over = (on_gpus(sizes(cache_bytes=t4 - 14 * GB + more))["Colab T4"] for more in (0, 1))
    assert exact == ("fits", "14.8 GB of 14.8 GB, in float16", "")  # a T4 does not compute in bfloat16
    assert over[0] == "does not fit"
    tight = on_gpus(sizes(loaded_bytes=t4 - 500_000_000))["Colab T4"]
    assert tight == ("fits", "14.3 GB of 14.8 GB, in float16; 500 MB left for KV cache", "")
    assert on_gpus(sizes())["Colab L4 (paid)"] == ("fits", "14 GB of 22.8 GB, in bfloat16", "")
    # Each block is on one GPU: of two, one may be left with nearly as much as a block takes.
    two = 2 * t4 - GB
    verdicts = [on_gpus(sizes(loaded_bytes=two + more))["Kaggle T4 x2"][0] for more in (0, 1)]
    assert verdicts == ["fits", "does not fit"]


def test_what_does_not_fit_a_gpu_fits_in_half_the_bits_or_beside_the_rest_in_memory():
    float32 = on_gpus(sizes(dtype="float32", loaded_bytes=28 * GB))
    assert float32["Kaggle P100"] == ("does not fit", "28 GB of 15.7 GB, in float32", "in float16: fits")
    assert on_gpus(sizes(loaded_bytes=20 * GB))["Colab T4"][2] == 'device_map="auto": 5.24 GB stay in RAM'
    assert on_gpus(sizes(loaded_bytes=140 * GB))["Colab T4"][2] == ""


def test_a_disk_has_room_for_download_and_shards_or_for_one_of_them():
    def answers(**changed: int) -> dict[str, tuple[str, str]]:
        return {found.name: (found.verdict, found.advice) for found in fits.fit_disks(sizes(**changed))}

    assert answers()["Colab"] == ("download and shards fit", "")
    way = "shards in place of the download"
    beside = ("download fits, shards beside it do not", f"stream=True or free_source=True: {way}")
    assert answers()["Kaggle"] == beside
    assert answers(file_bytes=28 * GB)["Kaggle"] == (
        "shards fit, the download does not",
        f"stream=True: {way}",
    )
    assert answers(file_bytes=28 * GB, shard_bytes=28 * GB)["Kaggle"] == ("does not fit", "")
    assert answers()["Binder"] == ("not stated", "")
    assert [name for name in answers() if name.startswith("Kaggle")] == ["Kaggle"]  # one disk, one row


def test_here_only_shards_need_room_where_the_files_are_here(model, monkeypatch):
    usage = shutil.disk_usage(".")
    for free, verdict in (
        (model.total_bytes - 1, "shards do not fit"),
        (2 * model.total_bytes, "shards fit"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        here = model.estimate().disks[0]
        assert (here.name, here.free_bytes, here.verdict) == ("this machine", free, verdict)
        assert bool(here.advice) == (verdict != "shards fit")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"quantization_config": {"quant_method": "gptq"}}, "I32"), ({}, "F8_E4M3")],
    ids=["config", "dtype"],
)
def test_quantized_weights_count_as_they_are_stored_and_copied(config, dtype):
    stored = [stored_tensor("w", dtype, 10**9), stored_tensor("norm", "F16", 10**6)]
    found = estimate_load("q", stored, None, config=config)
    assert (found.copied_bytes, found.mapped_bytes) == (sum(tensor.nbytes for tensor in stored), 0)
    assert found.tolerance is None
    assert re.search(r"quantized \((gptq|float8_e4m3fn)\): counted as stored and copied", str(found))
    assert found.gpus[0].why.startswith(f"{format_size(found.copied_bytes)} of 14.8 GB")
    assert [host.verdict for host in found.hosts][-1] == "fits" if dtype == "F8_E4M3" else "does not fit"


def quantize(folder: Path, method: str) -> None:
    """Rewrite a checkpoint in the layout of FP8 or MXFP4, whose weights are of no account."""
    file, made = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if method == "fp8" and "_proj" in name:
            made[name] = tensor.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in tensor.shape])
        elif method == "mxfp4" and "experts" in name and name.endswith("_proj"):
            experts, width, rows = tensor.shape
            made[f"{name}_blocks"] = torch.zeros(experts, rows, width // 32, 16, dtype=torch.uint8)
            made[f"{name}_scales"] = torch.full((experts, rows, width // 32), 120, dtype=torch.uint8)
        else:
            made[name] = tensor
    save_file(made, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "weight_block_size": [128, 128]}
    if method == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        settings = {"quant_method": method, "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


HEADS = {"num_attention_heads": 8, "vocab_size": 16384}
QUANTIZED = {
    "fp8": (
        LlamaForCausalLM,
        LlamaConfig(hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, **HEADS),
    ),
    "mxfp4": (
        GptOssForCausalLM,
        GptOssConfig(hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_local_experts=16,
                     num_key_value_heads=4, head_dim=64, **HEADS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", QUANTIZED)
def test_weights_that_a_processor_has_to_unpack_count_as_unpacked(method, tmp_path):
    make, config = QUANTIZED[method]
    make(config).to(torch.bfloat16).save_pretrained(tmp_path)
    whole = Checkpoint.open(tmp_path).estimate()
    quantize(tmp_path, method)
    checkpoint = Checkpoint.open(tmp_path)
    found, measured = checkpoint.estimate(), measure_load(tmp_path, cache="warm")
    assert measured.ok, measured.reason
    assert found.peak_anonymous_bytes == pytest.approx(measured.peak_anonymous_bytes, rel=0.1)
    assert "unpacked into bfloat16" in str(found)
    # Of GPUs, an L4 runs both as they are, a T4 MXFP4 alone, a P100 neither.
    sizes = {found.name: found.why.split(" of ")[0] for found in found.gpus}
    packed = format_size(checkpoint.total_bytes)
    assert sizes["Colab L4 (paid)"] == packed
    assert (sizes["Colab T4"] == packed) == (method == "mxfp4")
    assert sizes["Kaggle P100"] != packed
    assert found.sizes.loaded_bytes == pytest.approx(whole.mapped_bytes, rel=0.05)


def test_a_torch_built_for_cuda_is_known_by_its_library(tmp_path, monkeypatch):
    library, torch_here = tmp_path / "lib/libtorch_cuda.so", SimpleNamespace(origin=str(tmp_path / "a.py"))
    monkeypatch.setattr(extras, "find_spec", lambda _: torch_here)
    assert not is_torch_for_cuda()
    library.parent.mkdir()
    library.touch()
    assert is_torch_for_cuda()
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    assert not is_torch_for_cuda()


def test_stacked_experts_that_are_transposed_are_copied():
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 64}}
    stored = [
        stored_tensor("model.layers.0.mlp.experts.gate_up_proj", "BF16", 4, 64, 96),
        stored_tensor("model.layers.0.mlp.experts.down_proj", "BF16", 4, 48, 64),
        stored_tensor("model.layers.0.q_proj.weight", "BF16", 64, 64),
    ]
    transposed = estimate_load("moe", stored, None, config=config)
    assert transposed.copied_bytes == 2 * 4 * 64 * (96 + 48)
    assert transposed.stacking_bytes == 2 * 4 * 64 * 96
    assert transposed.mapped_bytes == 2 * 64 * 64
    straight = [stored_tensor("model.layers.0.mlp.experts.gate_up_proj", "BF16", 4, 96, 64)]
    assert estimate_load("moe", straight, None, config=config).copied_bytes == 0


@pytest.fixture
def adapter(model, tmp_path) -> Callable[..., Checkpoint]:
    """Make a peft adapter of the model, or of what is named."""

    def make(base: str | None = model.source, **config: Any) -> Checkpoint:
        lora = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(8, 100)
                for x in "AB"}  # fmt: skip
        save_file(lora, tmp_path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": base, **config}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return Checkpoint.open(tmp_path)

    return make


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_adapter_takes_what_its_base_takes_and_its_own(adapter, model, dtype):
    found, base = adapter().estimate(dtype), model.estimate(dtype)
    assert found.dtype == base.dtype
    assert found.copied_bytes == base.copied_bytes + 4 * 1600
    assert found.mapped_bytes == base.mapped_bytes
    assert [host.verdict for host in found.hosts] == [host.verdict for host in base.hosts]
    assert f"an adapter: the estimate includes its base model, {model.source}" in str(found)
    assert (found.tolerance, base.tolerance) == (None, 0.05)
    assert f"about {format_size(found.peak_anonymous_bytes)} (cannot be evicted)" in str(found)


@pytest.mark.parametrize("base", ["mistralai/Mistral-7B-v0.1", "{tmp}", "{tmp}/nothing", None])
def test_an_adapter_without_its_base_is_promised_no_host(adapter, tmp_path, base):
    named = base and base.format(tmp=tmp_path)  # the folder is the adapter's own
    checkpoint = adapter(named)
    planned = plan_shards(checkpoint).estimate(None, config=checkpoint.config)
    for found in (checkpoint.estimate(), checkpoint.estimate("float16"), planned):
        assert (found.hosts, found.tolerance) == ((), None)
        said = f"its base model ({named or 'not named'}) is not on this machine and not included"
        assert said in str(found)
        assert "at least 271 MB (cannot be evicted)" in str(found)


def test_weights_of_an_adapter_without_its_config_are_an_adapters_too(adapter, tmp_path):
    adapter()
    (tmp_path / "adapter_config.json").unlink()
    found = Checkpoint.open(tmp_path).estimate()
    assert found.hosts == ()
    assert "an adapter: its base model (" in str(found)


@pytest.fixture
def on_tmpfs() -> Iterator[Checkpoint]:
    """Make a checkpoint on /dev/shm."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="shardkit-test-") as folder:
        yield make_demo_checkpoint(Path(folder, "model"), size="100MB")


TMPFS = filesystem("/dev/shm") == "tmpfs"


def test_an_adapter_of_diffusers_has_no_config(tmp_path):
    save_file({"unet.to_q.lora_A.weight": torch.zeros(8, 100)}, tmp_path / "pytorch_lora_weights.safetensors")
    found = Checkpoint.open(tmp_path).estimate()
    assert (found.hosts, found.copied_bytes) == ((), 4 * 800)
    assert "an adapter: its base model (" in str(found)


@pytest.mark.skipif(not TMPFS, reason="/dev/shm is no tmpfs here")
def test_files_on_tmpfs_are_memory_of_the_load(on_tmpfs):
    # The pages are there all the time, but count only while they are mapped: under load, not all at once.
    loads = (measure_load(on_tmpfs.source, dtype="float16", cache="warm") for _ in range(3))
    measured = max(load.peak_anonymous_bytes for load in loads)
    found = on_tmpfs.estimate("float16")
    assert found.peak_anonymous_bytes == pytest.approx(measured, rel=found.tolerance)
    assert (found.resident_bytes, found.mapped_bytes) == (on_tmpfs.total_bytes, 0)
    assert "100 MB of files on tmpfs, whose pages cannot be evicted" in str(found)
    assert "the kernel may drop" not in str(found)


@pytest.mark.skipif(not TMPFS, reason="/dev/shm is no tmpfs here")
def test_files_on_tmpfs_count_here_as_used_and_elsewhere_as_files(on_tmpfs, monkeypatch):
    monkeypatch.setattr(fits, "usable_memory", lambda: 330_000_000)  # the files are no part of it
    found = on_tmpfs.estimate()
    assert [host.verdict for host in found.hosts] == ["fits"] * 4
    monkeypatch.setitem(HOSTS, "Binder", HOSTS["Binder"]._replace(memory_bytes=330_000_000))
    binder = on_tmpfs.estimate().hosts[-1]
    assert binder.verdict == f"fits, each token reads {format_size(binder.read_bytes)} from disk"
    assert 0.9 * on_tmpfs.total_bytes < binder.read_bytes < on_tmpfs.total_bytes  # of an embedding, one row


def test_of_links_the_file_system_counts_where_they_lead(demo, tmp_path, monkeypatch):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(demo, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(checkpoint_module, "filesystem", {str(blobs): "tmpfs"}.get)
    assert Checkpoint.open(snapshot).estimate().resident_bytes > 0
    monkeypatch.setattr(checkpoint_module, "filesystem", {str(snapshot): "tmpfs"}.get)
    assert Checkpoint.open(snapshot).estimate().resident_bytes == 0


SHAPES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"vocab_size": 16000, "n_embd": 768, "n_layer": 6, "n_head": 12}),
    "gptj": (GPTJForCausalLM, GPTJConfig, {"vocab_size": 16000, "n_embd": 512, "n_head": 8}),
    "bert": (BertForMaskedLM, BertConfig, {"num_hidden_layers": 6}),
    "t5": (T5ForConditionalGeneration, T5Config, {"d_model": 512, "num_layers": 4}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_promise_is_kept_with_buffers_and_the_first_token(kind, tmp_path):
    make, config, shape = SHAPES[kind]
    make(config(**shape)).to(torch.bfloat16).save_pretrained(tmp_path)
    measured, found = measure_load(tmp_path, cache="warm"), Checkpoint.open(tmp_path).estimate()
    assert found.tolerance == 0.05
    assert found.peak_anonymous_bytes == pytest.approx(measured.peak_anonymous_bytes, rel=0.05)


@pytest.mark.parametrize("kind", ["mamba2", "jetmoe", "wav2vec2", "rwkv", "no-such-model", None])
def test_nothing_is_promised_of_what_was_not_measured(kind):
    found = estimate_load("m", [stored_tensor("w", "BF16", 1000)], None, config={"model_type": kind})
    assert found.tolerance is None
    assert "±" not in str(found)
    assert "about 271 MB (cannot be evicted)" in str(found)
    assert "accuracy not measured" in str(found)


def test_masks_of_each_layer_count(tmp_path):
    config = GPTNeoConfig(vocab_size=16000, hidden_size=256, num_heads=8)
    GPTNeoForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    measured, found = measure_load(tmp_path, cache="warm"), Checkpoint.open(tmp_path).estimate()
    assert found.tolerance is None  # of what is there for a moment, the allocator keeps 12 to 38 MB
    assert found.peak_anonymous_bytes == pytest.approx(measured.peak_anonymous_bytes, rel=0.08)


def test_buffers_that_no_file_holds_count():
    config = {"model_type": "gpt_neo", "num_layers": 24, "max_position_embeddings": 2048}
    stored = [stored_tensor("w", "BF16", 1000)]
    found = estimate_load("m", stored, None, config=config)
    assert found.buffer_bytes == 30 * 2048**2
    assert "126 MB for buffers that no file contains" in str(found)
    for odd in ("24" * 10**6, [24], None, 2.5):
        unsaid = estimate_load("m", stored, None, config={**config, "num_layers": odd})
        assert (unsaid.buffer_bytes, unsaid.tolerance) == (0, None)


def test_weights_that_are_divided_in_place_are_copied():
    stored = [
        stored_tensor(f"rwkv.blocks.0.{part}.weight", "BF16", 1000)
        for part in ("attention.output", "attention.key", "feed_forward.value", "feed_forward.key")
    ]
    found = estimate_load("m", stored, None, config={"model_type": "rwkv"})
    assert (found.copied_bytes, found.mapped_bytes) == (4000, 4000)
    assert estimate_load("m", stored, "float16", config={"model_type": "rwkv"}).copied_bytes == 8000


def test_masks_of_older_files_are_not_read():
    config = {"model_type": "gpt2"}
    stored = [
        stored_tensor("h.0.attn.bias", "F32", 1, 1, 1024, 1024),
        stored_tensor("h.0.attn.c_attn.bias", "F32", 3000),
        stored_tensor("h.0.attention.bias", "F32", 3000),
    ]
    assert estimate_load("m", stored, "float16", config=config).copied_bytes == 2 * 6000
    assert estimate_load("m", stored, None, config=config).mapped_bytes == 4 * 6000


@pytest.mark.parametrize(
    ("kind", "files", "nbytes"),
    [
        ("llama", {"tokenizer.json": 17_000_000, "tokenizer.model": 500_000, "vocab.json": 1}, 170_000_000),
        ("llama", {"tokenizer.model": 500_000}, 30_000_000),
        ("xlm-roberta", {"tokenizer.json": 9_000_000}, 270_000_000),
        ("llama", {"config.json": 700}, 0),
    ],
)
def test_a_large_tokenizer_counts_and_makes_a_small_estimate_rough(kind, files, nbytes):
    stored = [stored_tensor("w", "BF16", 10**10)]
    found, cast = (
        estimate_load("m", stored, dtype, config={"model_type": kind}, side_files=files)
        for dtype in (None, "float16")
    )
    assert found.tokenizer_bytes == nbytes
    assert found.peak_anonymous_bytes == 271_000_000 + nbytes
    assert (found.tolerance is None) == (nbytes > 0)
    assert cast.tolerance == 0.05


# Within a budget: what is said beforehand is what a load plans.

DECODERS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in _COMPARED.split()))
CASTS = (("float32", "auto"), ("bfloat16", "auto"), ("float32", "bfloat16"), ("bfloat16", "float16"))
TOKENS = 48
PAGE_TOLERANCE = 8192  # biases of less than a page: which of them are read depends on the order of modules


@pytest.fixture
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes large enough for pages, and budgets as small as they are: the process itself counts nothing."""
    large = {"hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"}
    sizes = dict.fromkeys(large, 256) | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 512)
    sizes |= {"head_dim": 64, "vocab_size": 960, "moe_intermediate_size": 128, "rotary_dim": 32}
    for name, size in {**sizes, "shared_expert_intermediate_size": 128}.items():
        monkeypatch.setitem(architectures.SIZES, name, size)
    monkeypatch.setattr(blocks, "process_bytes", lambda: 0)
    monkeypatch.setattr(budget, "HEADROOM_BYTES", 0)
    for module in (estimate, within):
        monkeypatch.setattr(module, "RUNTIME_BYTES", 0)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.usefixtures("_bare")
def test_a_budget_gives_beforehand_what_the_load_plans(name, tmp_path):
    for stored, dtype in CASTS:
        folder = tmp_path / f"{stored} {dtype}"
        architectures.make_model(name, stored).save_pretrained(folder)
        checkpoint, asked = Checkpoint.open(folder), {"context_tokens": TOKENS, "dtype": dtype}
        with pytest.raises(PlanError, match="is too small") as caught:
            load_model(folder, max_memory=1, **asked)
        least = int(re.search(r"at least [\d,]+ MB \(([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
        buffers = checkpoint.estimate().buffer_bytes  # part of the process, which counts nothing here
        for more in (0, 900_000):
            found = checkpoint.estimate(max_memory=least + more + buffers, **asked).within
            assert found.smallest_bytes == least + buffers
            planned = getattr(load_model(folder, max_memory=least + more, **asked), "memory_plan", None)
            if planned is None:  # all of it fits
                assert found.plan.streamed_bytes == 0
                continue
            for field in ("cache_bytes", "activation_bytes", "working_bytes", "resident_bytes"):
                assert getattr(found.plan, field) == getattr(planned, field), (stored, dtype, more, field)
            assert found.plan.streamed_bytes == pytest.approx(planned.streamed_bytes, abs=PAGE_TOLERANCE)


@pytest.mark.parametrize(
    "name", ["Mistral", "Falcon", "Llama", "Qwen2", "Gemma", "Phi", "Mixtral", "GPTBigCode"]
)
def test_kv_cache_is_at_most_what_is_said_and_one_layer_less(name, tmp_path):
    model = architectures.make_model(f"{name}ForCausalLM")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        cache = model(torch.ones(3, 12, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = Checkpoint.open(tmp_path).estimate(context_tokens=12, batch_size=3)
    assert found.cache_bytes == held * (len(cache.layers) + 1) // len(cache.layers)
    assert f"at most {format_size(found.cache_bytes)} (12 tokens, batch of 3)" in str(found)
    assert (
        found.peak_anonymous_bytes
        == Checkpoint.open(tmp_path).estimate().peak_anonymous_bytes + found.cache_bytes
    )
    assert found.tolerance is None


def test_more_tokens_than_the_config_allows_are_said(model):
    allowed = model.config["max_position_embeddings"]
    beyond = f"{allowed + 1:,} tokens are more than the model is made for: max_position_embeddings"
    assert beyond in str(model.estimate(context_tokens=allowed + 1))
    assert "more than the model" not in str(model.estimate(context_tokens=allowed))
    with pytest.raises(PlanError, match=f"prompt and new tokens: .* in config.json is {allowed:,}"):
        generate_text(model.source, "x", max_new_tokens=allowed)


def test_a_budget_that_is_too_small_names_the_smallest_that_is_not(model):
    least = model.estimate(max_memory=1).within.smallest_bytes
    small, enough = (model.estimate(max_memory=least - less).within for less in (1, 0))
    assert small.plan is None
    told = str(model.estimate(max_memory=least - 1))
    assert f"needs at least {-(-(least + 10**6) // 10**6):,} MB ({least:,} bytes)" in told
    assert (
        f"without max_memory it loads in about {format_size(model.estimate().peak_anonymous_bytes)}" in told
    )
    assert enough.plan.streamed_bytes > 0.8 * model.total_bytes
    assert model.estimate(max_memory="2GB").within.plan.streamed_bytes == 0


@pytest.mark.parametrize(
    ("config", "dtype", "why"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "BF16", "T5.* is not a decoder"),
        ({"is_encoder_decoder": True}, "BF16", "MistralForCausalLM is not a decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "I32", r"quantized weights .* \(gptq\)"),
        ({}, "F8_E4M3", "quantized weights"),
        ({"model_type": "new"}, "BF16", "models of type 'new' were not compared"),
        ({"num_attention_heads": None}, "BF16", "config.json has no num_attention_heads"),
        ({"num_hidden_layers": 10**400}, "BF16", "config.json has no num_hidden_layers"),
        (None, "BF16", "the model is not a decoder"),
    ],
)  # fmt: skip
def test_what_is_not_known_of_a_budget_is_said_with_the_reason(config, dtype, why):
    known = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 2}
    known |= {"hidden_size": 64, "num_attention_heads": 4}
    config = config if config is None else {**known, **config}
    stored = [stored_tensor("model.layers.0.mlp.weight", dtype, 64, 64)]
    asked = {"sequences": budget.Sequences(100), "max_memory": 10**9}
    found = estimate_load("m", stored, None, config=config, **asked)
    assert (found.within.plan, found.within.smallest_bytes, found.cache_bytes) == (None, None, None)
    assert re.search(f"not known: {why}", str(found))
    assert not any(host.advice for host in found.hosts)


def test_a_budget_is_for_models_and_not_for_adapters(adapter):
    found = adapter().estimate(max_memory="2GB", context_tokens=100)
    assert found.cache_bytes > 0
    assert (found.within.plan, found.within.why) == (None, "not known: a budget is for models, not adapters")


def mistral_7b(stored: str, dtype: str | None) -> Estimate:
    """Estimate a load of Mistral-7B's shape, of which nothing is written."""
    shape = demo_shape("14.5GB")
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **shape.config}
    tensors = [stored_tensor(name, stored, *size) for name, size in shape.tensors()]
    return estimate_load("mistral", tensors, dtype, config=config)


def test_hosts_say_what_each_token_reads_and_what_would_help():
    as_stored, cast = mistral_7b("BF16", "bfloat16"), mistral_7b("BF16", "float16")
    colab, binder = (next(h for h in as_stored.hosts if h.name == name) for name in ("Colab", "Binder"))
    # 14.48 GB of weights, of which the embedding (262 MB) is not read.
    assert binder.verdict == "fits, each token reads 14.2 GB from disk"
    assert colab.read_bytes == binder.read_bytes
    # Of Colab's 12.7 GB nine tenths are usable; a budget keeps what is not needed for all else.
    assert colab.bounded_read_bytes < 0.3 * colab.read_bytes
    assert 0.9 * binder.read_bytes < binder.bounded_read_bytes < binder.read_bytes
    read = format_size(binder.bounded_read_bytes)
    assert binder.advice == f"load_model(max_memory=...) with 1.8 GB: fits, each token reads {read} from disk"
    colab, kaggle = (next(h for h in cast.hosts if h.name == name) for name in ("Colab", "Kaggle"))
    assert (colab.verdict, colab.read_bytes, kaggle.verdict) == ("does not fit", None, "fits")
    assert colab.advice.startswith(
        "as stored or shards: fits, each token reads 14.2 GB from disk; load_model("
    )
    assert [way.name for way in colab.ways] == ["in float16", "as stored", "shards", "in a budget"]
    row = r"Colab +12.7 GB +needs 14.8 GB +reads 14.2 GB +reads 3.\d+ GB\n"
    assert re.search("in float16 +as stored, shards +in a budget\n", str(cast))  # what is the same, once
    assert re.search(row, str(cast))


def test_a_summary_fits_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setattr(fits, "gpus", dict)
    for made in (mistral_7b("BF16", "float16"), mistral_7b("BF16", "bfloat16")):
        lines = made.summary().text(80).splitlines()
        assert max(map(len, lines)) <= 84  # a name of ours is left in one piece


def test_seconds_a_token_are_those_of_the_disk(model, monkeypatch):
    least = model.estimate(max_memory=1).within.smallest_bytes
    stated = model.estimate(max_memory=least, disk_rate="100MB")
    assert stated.within.seconds_per_token == stated.within.plan.streamed_bytes / 1e8
    assert "s of reading at 100 MB/s" in str(stated)
    monkeypatch.setitem(HOSTS, "Binder", HOSTS["Binder"]._replace(memory_bytes=400_000_000))
    binder = model.estimate(disk_rate="100MB").hosts[-1]  # which needs no budget
    assert binder.verdict.endswith(f"about {binder.read_bytes / 1e8:.2g} s")
    reads = []
    monkeypatch.setattr(
        disk.DiskFile, "read_direct", lambda _, buffer, offset: reads.append(offset) or len(buffer)
    )
    monkeypatch.setattr(disk.time, "perf_counter", iter(0.25 * n for n in range(99)).__next__)
    assert model.estimate(max_memory=least, disk_rate="measure").within.disk_rate > disk.CHUNK_BYTES
    assert reads == [n * disk.CHUNK_BYTES for n in range(len(reads))]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct reads on this system")
def test_a_rate_is_measured_past_the_page_cache_or_not_at_all(model, monkeypatch):
    assert model.estimate(max_memory="300MB", disk_rate="measure").within.disk_rate > 1_000_000
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.raises(CheckpointError, match=r"past the page cache .*: state the rate"):
        model.estimate(max_memory="300MB", disk_rate="measure")


SEVEN_BILLION = {
    "Mistral-7B": ("mistral", 14_483_464_192, {"architectures": ["MistralForCausalLM"]}),
    "falcon-7b": ("falcon", 14_434_379_520, {}),
}


def in_a_cell(host: HostFit) -> str:
    """Return what the README says of a host."""
    if host.verdict == "fits":
        return "fits"
    within = host.bounded_read_bytes and format_size(host.bounded_read_bytes)
    if host.read_bytes is None:
        return "does not fit" + f"; within a budget it reads {within} per token" * bool(within)
    runs = f"runs, reads {format_size(host.read_bytes)} per token"
    return runs + f"; within a budget {within}" * bool(within)


@pytest.mark.parametrize("name", SEVEN_BILLION)
def test_readme_says_of_7b_models_what_inspect_says_of_their_headers(tmp_path: Path, name: str) -> None:
    kind, total, known = SEVEN_BILLION[name]
    shape = demo_shape("14.5GB", architecture=kind)
    sparse_file(tmp_path / "model.safetensors", dict(shape.tensors()))
    config = {"model_type": kind, **known, **shape.config, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.total_bytes == total, "what the index on the Hub says"
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for words, dtype in (("bfloat16, as stored", None), ("float16", "float16")):
        cells = map(in_a_cell, checkpoint.estimate(dtype).hosts[1:])
        assert f"| {name} in {words} | {' | '.join(cells)} |" in readme
