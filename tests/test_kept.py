"""A cast is the model that transformers makes of the source: what it loads in float32 is left as it is."""

import importlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shardkit import plan_shards, shard_checkpoint, verify_checkpoint
from shardkit.checkpoint import kept
from shardkit.load import look
from tests.support import data_offsets
from tests.torch_files import same

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MLA |= {"num_attention_heads": 4, "num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
ROUTED |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
# Model class: its config, and how many tensors are kept in float16 and in bfloat16.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "T5ForConditionalGeneration": (T5, 4, 0),
    "UMT5EncoderModel": (T5, 2, 0),
    "DeepseekV3ForCausalLM": (SIZES | MLA | ROUTED, 1, 1),
    "GptOssForCausalLM": (SIZES | HEADS | GPT_OSS, 5, 0),
    "RwkvForCausalLM": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, 4, 0),
    "XLNetLMHeadModel": ({"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, 19, 19),
    "LlamaForCausalLM": (SIZES | HEADS, 0, 0),
    "BertForMaskedLM": (SIZES | {"num_attention_heads": 4}, 0, 0),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a small model of a class with random weights in float32, once."""
    base = tmp_path_factory.mktemp("kept")

    def write(name: str) -> Path:
        if not (folder := base / name).exists():
            torch.manual_seed(0)
            model_class = getattr(transformers, name)
            model = model_class(model_class.config_class(**MODELS[name][0]))
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = 7 + torch.randn(tensor.shape) / 9 if tensor.is_floating_point() else tensor
            model.save_pretrained(folder)
        return folder

    return write


def differing(ours: Any, theirs: Any) -> list[str]:
    """Names of what differs in the state of two models."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not same(ours[name], theirs[name])]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_cast_loads_as_the_source_does_in_that_dtype(
    name: str, dtype: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    report = shard_checkpoint(source(name), tmp_path / "out", dtype=dtype, max_shard_size="40KB")
    assert len(report.kept) == MODELS[name][1 + (dtype == "bfloat16")]
    model_class = getattr(transformers, name)
    expected = model_class.from_pretrained(source(name), dtype=dtype)
    for requested in (dtype, "auto"):
        assert differing(model_class.from_pretrained(tmp_path / "out", dtype=requested), expected) == []
    assert verify_checkpoint(source(name), tmp_path / "out").equal


def test_what_is_kept_stays_as_it_is_stored(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder, model_class = source("T5ForConditionalGeneration"), transformers.T5ForConditionalGeneration
    state = load_file(folder / "model.safetensors")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({k: v.bfloat16() for k, v in state.items()}, tmp_path / "source" / "model.safetensors")
    report = shard_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float16")
    assert set(report.kept.values()) == {"bfloat16"}
    assert "4 tensors kept in bfloat16, because transformers does not load them in float16" in str(report)
    loaded = [model_class.from_pretrained(tmp_path / name, dtype="float16") for name in ("source", "out")]
    assert differing(*loaded) == []
    assert shard_checkpoint(folder, tmp_path / "wide", dtype="float32").kept == {}


BLOCKS = ("decoder.block.0.layer.2", "decoder.block.1.layer.2")
BLOCKS += ("encoder.block.0.layer.1", "encoder.block.1.layer.1")
WO = [f"{block}.DenseReluDense.wo.weight" for block in BLOCKS]


def test_plan_and_report_name_what_is_kept(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = source("T5ForConditionalGeneration")
    plan, report = (
        plan_shards(folder, dtype="float16"),
        shard_checkpoint(folder, tmp_path / "out", dtype="float16"),
    )
    assert plan.kept == report.kept == dict.fromkeys(WO, "float32")
    said = f"4 tensors kept in float32, because transformers does not load them in float16: {', '.join(WO)}"
    assert said in str(plan)
    assert said in str(report)
    for record in (plan, report):
        data = json.loads(json.dumps(record.to_dict()))
        assert type(record).from_dict(data) == record
        del data["kept"]  # as versions before this one wrote it
        assert type(record).from_dict(data).kept == {}


def test_kept_tensor_is_verified_bit_for_bit(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = source("T5ForConditionalGeneration")
    found = shard_checkpoint(folder, tmp_path / "out", dtype="float16").verification
    assert found is not None
    assert found.cast == found.tensors - len(WO)
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[data_offsets(path)[WO[2]]] ^= 1
    path.write_bytes(raw)
    assert [m.tensor for m in verify_checkpoint(folder, tmp_path / "out").mismatches] == [WO[2]]


def test_copy_whose_config_names_no_class_loads_in_the_dtype_of_the_cast(
    source: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    config = json.loads((source("T5ForConditionalGeneration") / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: config[k] for k in config if k not in ("dtype", "architectures")})
    )
    (folder / "model.safetensors").symlink_to(source("T5ForConditionalGeneration") / "model.safetensors")
    assert set(shard_checkpoint(folder, tmp_path / "out", dtype="float16").kept) == set(WO)
    loaded = [
        transformers.T5ForConditionalGeneration.from_pretrained(place, dtype=dtype)
        for place, dtype in ((folder, "float16"), (tmp_path / "out", "auto"))
    ]
    assert differing(*loaded) == []


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept._asked.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    yield
    kept._asked.cache_clear()


NAMES = [
    "model.layers.3.mlp.gate.e_score_correction_bias",
    "model.layers.3.mlp.gate.weight",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight",
]


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize(
    ("config", "in_float16", "in_bfloat16"),
    [
        ({"model_type": "deepseek_v3"}, NAMES[:1], NAMES[:1]),
        ({"model_type": "t5"}, NAMES[2:], []),
        ({"model_type": "mine", "text_config": {"model_type": "glm4v_moe_text"}}, NAMES[:1], NAMES[:1]),
        ({"model_type": "ernie4_5_moe"}, NAMES[1:2], NAMES[1:2]),
        ({"model_type": "llama"}, [], []),
        ({}, [], []),
    ],
    ids=lambda value: value.get("model_type", "none") if isinstance(value, dict) else "",
)
def test_table_stands_in_for_transformers(
    config: dict[str, Any], in_float16: list[str], in_bfloat16: list[str]
) -> None:
    found = [kept.kept_tensors(NAMES, config, target) for target in ("F16", "BF16", "F32")]
    assert found == [set(in_float16), set(in_bfloat16), set()]


def test_table_holds_what_the_installed_transformers_lists() -> None:
    models = Path(transformers.__file__).parent / "models"
    found: defaultdict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for path in sorted(models.glob("*/modeling_*.py")):
        if "_keep_in_fp32_modules" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for model in vars(module).values():
            if not isinstance(model, type) or not issubclass(model, transformers.PreTrainedModel):
                continue
            listed = [set(getattr(model, f"_keep_in_fp32_modules{end}") or ()) for end in ("_strict", "")]
            if any(listed):
                strict, always = found[kept.family(model.config_class.model_type)]
                strict |= listed[0]
                always |= listed[0] | listed[1]
    tables = (kept._IN_16_BITS, kept._IN_FLOAT16)
    assert found.keys() == {
        model for table in tables for models in table.values() for model in models.split()
    }
    for model, (strict, always) in found.items():
        assert kept.listed_patterns(model, "bfloat16") == strict, model
        assert kept.listed_patterns(model, "float16") == always, model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_installed_transformers_keeps_nothing_of_the_families_that_are_not_asked_about(dtype: str) -> None:
    for family in kept._PLAIN.split():
        config_class = transformers.CONFIG_MAPPING[family]
        heads = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING
        model_class = next(found[config_class] for found in heads if config_class in found)
        config = {**config_class().to_dict(), "architectures": [model_class.__name__]}
        with torch.device("meta"):
            names = list(model_class(config_class.from_dict(config)).state_dict())
        job = {"config": json.loads(json.dumps(config)), "names": names, "dtype": dtype}
        assert look.answer({"question": "kept", **job}) == {"kept": []}, family


def test_a_newer_transformers_is_asked_about_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(kept, "_asked", lambda *job: asked.append(job[0]) or frozenset())
    for version in ("4.57.1", "5.23.1", "5.24.0.dev0", "6.0"):
        monkeypatch.setattr(kept.metadata, "version", lambda _, version=version: version)
        kept.kept_tensors(NAMES, {"model_type": "llama", "as of": version}, "F16")
    assert [json.loads(config)["as of"] for config in asked] == ["5.24.0.dev0", "6.0"]


HOSTILE = {
    "layers without end": {"num_layers": 10**12},
    "many layers": {"num_layers": 9_999},
    "sizes without end": {"d_model": 10**12},
    "a negative size": {"d_model": -1},
    "text for a number": {"num_layers": "many"},
    "no class": {"architectures": ["Nobody"]},
    "no model class": {"architectures": ["T5Config"]},
    "classes in a map": {"architectures": {"0": "T5Model"}},
    "unknown type": {"model_type": "nobody"},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_config_that_no_model_can_be_built_from_leaves_the_table(kind: str) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **T5} | HOSTILE[kind]
    expected = set() if kind == "unknown type" else {NAMES[2]}
    assert kept.kept_tensors(NAMES, config, "F16") == expected
    assert torch.get_default_dtype() == torch.float32


def test_code_that_comes_with_a_checkpoint_is_not_run(source: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    config = json.loads((source("T5ForConditionalGeneration") / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}
    config |= {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    (folder / "model.safetensors").symlink_to(source("T5ForConditionalGeneration") / "model.safetensors")
    assert set(plan_shards(folder, dtype="float16").kept) == set(WO)
    assert not (tmp_path / "was run").exists()


def test_process_that_has_not_imported_torch_asks_another_and_stays_small(
    source: Callable[[str], Path],
) -> None:
    code = "import shardkit, sys; plan = shardkit.plan_shards(sys.argv[1], dtype='float16')"
    code += "; print(*plan.kept, *{'torch', 'transformers'} & set(sys.modules))"
    folder = source("T5ForConditionalGeneration")
    done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    assert done.stdout.split() == WO
    assert done.stderr == ""


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_where_nothing_is_rounded_transformers_is_not_asked(
    dtype: str | None, source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_asked", None)
    assert plan_shards(source("LlamaForCausalLM"), dtype=dtype).kept == {}
