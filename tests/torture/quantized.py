"""What headers say of weights that the libraries themselves quantized, against loads with these libraries."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.checkpoint.quantized import HELD, packing_of
from shardkit.measure.launch import measure_load
from shardkit.measure.measurement import LoadMeasurement
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen

# Not in requirements.txt: wherever they are installed, transformers imports them, and every load takes more.
_LIBRARIES = ("bitsandbytes==0.50.2", "torchao==0.18.0", "compressed-tensors==0.20.0")
_BELOW_THEM = ("loguru", "pydantic", "pydantic_core", "annotated_types", "typing_inspection")
# What is made, and the method that a config then names.
_METHODS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao"}
_METHODS |= dict.fromkeys(("W8A16", "W4A16"), "compressed-tensors")
_PLAIN = "plain"
_MAKE = """
import sys, torch, transformers
plain, out, kind = sys.argv[1:]
options = {"dtype": torch.bfloat16}
if kind == "nf4":
    options["quantization_config"] = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
elif kind == "int8":
    options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
elif kind == "torchao":
    from torchao.quantization import Int8WeightOnlyConfig
    options["quantization_config"] = transformers.TorchAoConfig(Int8WeightOnlyConfig())
model = transformers.AutoModelForCausalLM.from_pretrained(plain, **options)
if kind.startswith("W"):
    from compressed_tensors import quantization as q
    from compressed_tensors.compressors import ModelCompressor
    groups = {"all": q.preset_name_to_scheme(kind, ["Linear"])}
    asked = q.QuantizationConfig(config_groups=groups, ignore=["lm_head"],
                                 quantization_status=q.QuantizationStatus.INITIALIZED)
    q.apply_quantization_config(model, asked)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale
            largest = module.weight.float().reshape(*scale.shape, -1).abs().amax(-1)
            scale.data = (largest / 2 ** (int(kind[1]) - 1)).to(scale.dtype).reshape(scale.shape)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
model.save_pretrained(out)
if kind.startswith("W"):
    compressor.update_config(out)
"""


def _prepare(shared: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    packages = shared / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
    subprocess.run([*install, *_LIBRARIES, *_BELOW_THEM], check=True)
    python = shared / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 16000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(shared / _PLAIN)


@cache
def _measured(shared: Path, name: Path) -> LoadMeasurement:
    return measure_load(name, dtype="auto", cache="warm", python=shared / "python")


def _estimated(place: Place) -> Iterator[Finding]:
    """Let a library quantize, and hold a load's peak, less what its import takes, against the estimate."""
    kind, made = list(_METHODS)[place.number], place.work / "made"
    words = [place.shared / "python", "-c", _MAKE, place.shared / _PLAIN, made, kind]
    subprocess.run(words, check=True, capture_output=True)
    plain, found = _measured(place.shared, place.shared / _PLAIN), _measured(place.shared, made)
    if not (plain.ok and found.ok):
        yield Fault(f"{kind}: {plain.reason or found.reason}")
        return
    said = Checkpoint.open(made).estimate().peak_anonymous_bytes
    imports = (
        plain.peak_anonymous_bytes - Checkpoint.open(place.shared / _PLAIN).estimate().peak_anonymous_bytes
    )
    peak = found.peak_anonymous_bytes - imports
    told = f"{kind}: {said / 1e6:.0f} MB estimated, {peak / 1e6:.0f} MB measured"
    yield Most("off", abs(said / peak - 1))
    range_ = HELD.get(_METHODS[kind]) or packing_of({}, _METHODS[kind])
    assert range_ is not None
    yield Seen(told) if -range_.below <= 100 * (peak / said - 1) <= range_.above else Fault(told)


QUANTIZED = Kind(
    "estimates of quantized weights", _estimated, len(_METHODS), 0, prepare=_prepare, workers=1, seconds=900
)
