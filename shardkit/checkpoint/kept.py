"""Which tensors a cast leaves as they are: those that transformers loads in another dtype, mostly float32.

A cast that rounded them would not be the model that `from_pretrained(source, dtype=...)` makes: the router's
bias of DeepSeek-V3 is a large offset with a small spread, of which bfloat16 leaves little. transformers lists
some by pattern and creates others in float32. Where it is installed, it builds the model on the meta device
(no weights, no download, no code but its own) and is asked, unless the family is known to keep nothing: to
ask takes seconds. Where it is not installed, a table holds its lists.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from threading import RLock
from typing import Any

from shardkit.checkpoint import asking
from shardkit.formats.tensor import DTYPE_NAMES

_BUILDING = RLock()  # while a model is built, torch's default dtype is another, for the whole process


def kept_tensors(names: Iterable[str], config: Mapping[str, Any] | None, target: str) -> frozenset[str]:
    """Return which tensors transformers does not load in dtype `target` ("F16") when that is requested."""
    names, dtype = tuple(names), DTYPE_NAMES[target]
    if target == "F32" or not names or not config or not isinstance(config.get("model_type"), str):
        return frozenset()  # float32 rounds nothing that a load would not
    if _is_plain(config):
        return frozenset()
    with _BUILDING:
        found = _asked(json.dumps(config), names, dtype)
    return frozenset(filter(kept_pattern(config, dtype).search, names)) if found is None else found


def _is_plain(config: Mapping[str, Any]) -> bool:
    if config["model_type"] not in _PLAIN.split():
        return False
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return True
    return tuple(map(int, re.findall(r"\d+", installed)[:2])) <= _PLAIN_AS_OF


@lru_cache(maxsize=8)  # the app plans again with every move of a slider
def _asked(config: str, names: tuple[str, ...], dtype: str) -> frozenset[str] | None:
    """Ask transformers; None where it is not installed, or can make no model of the config."""
    job = {"question": "kept", "config": json.loads(config), "names": names, "dtype": dtype}
    if "transformers" in sys.modules:
        found = asking.asked_here(job)
    elif find_spec("transformers") is None:
        return None
    else:
        with asking.asked() as ask:
            found = ask(job)()
    return frozenset(found["kept"]) if "kept" in found else None


def kept_pattern(config: Mapping[str, Any], dtype: str) -> re.Pattern[str]:
    """Return what is in the names of tensors that the tables keep in float32 in a dtype ("float16")."""
    patterns = {pattern for model in {*_families(config)} for pattern in listed_patterns(model, dtype)}
    return re.compile("|".join(sorted(patterns)) or "(?!)")


def _families(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the model's family and those of its parts, whose lists transformers unites."""
    yield family(str(config.get("model_type")))
    for part in config.values():
        if isinstance(part, dict):
            yield from _families(part)


def family(model_type: str) -> str:
    """Return what the types of a model and its parts have in common, as they have their lists."""
    return re.sub(r"(?<!_to)_(text|audio|vision|vision_encoder|encoder|ctc|mm_model)$", "", model_type)


def listed_patterns(model: str, dtype: str) -> set[str]:
    """Return what transformers searches for in names, to keep tensors of a family in float32 in a dtype."""
    tables = {"float16": (_IN_FLOAT16, _IN_16_BITS), "bfloat16": (_IN_16_BITS,)}.get(dtype, ())
    rows = (row for table in tables for row in table.items())
    return {pattern for patterns, models in rows if model in models.split() for pattern in patterns.split()}


# Families of which transformers, up to this version, loads every tensor in the dtype that is requested.
_PLAIN_AS_OF = 5, 23
_PLAIN = (
    "albert bart bert biogpt bloom codegen cohere cohere2 deberta-v2 distilbert electra exaone4 falcon gemma "
    "gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite granitemoe helium llama "
    "mbart mistral mixtral modernbert mpnet olmo olmo2 olmo3 olmoe opt pegasus persimmon phi phi3 phimoe "
    "qwen2 qwen2_moe qwen3 qwen3_moe roberta smollm3 stablelm starcoder2 xglm xlm-roberta"
)

# `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` of all models of transformers 5.23.
_IN_FLOAT16 = {
    "wo": "mt5 pop2piano t5 udop umt5",
    "indexer.weights_proj": "axk2 deepseek_v32 glm_moe_dsa mistral_large4",
    "query_tokens": "blip-2 instructblip instructblipvideo",
    "qformer": "blip-2",
    "input_layernorm post_attention_layernorm norm": "afmoe gpt_oss",
    "expert_bias k_norm post_mlp_layernorm pre_mlp_layernorm q_norm": "afmoe",
    "self_attn.compressor.gate_proj self_attn.compressor.kv_proj self_attn.compressor.indexer.gate_proj "
    "self_attn.compressor.indexer.kv_proj self_attn.compressor.indexer.scorer.weights_proj": "deepseek_v4",
    "classifier.weight": "longcat_flash",
    "time_decay time_first": "rwkv",
}
_IN_16_BITS = {
    "e_score_correction_bias": "axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 deepseek_v4 dots1 "
    "dots3_note exaone_moe glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling "
    "inkling2 kolibri1 mimo_v2_flash muse_spark nemotron_h solar_open",
    "mlp.gate.weight": "beam inkling2 mistral_large4 muse_spark",
    "gate.weight": "ernie4_5_moe ernie4_5_vl_moe flint",
    "moe_statics": "ernie4_5_moe ernie4_5_vl_moe",
    "A_log conv1d dt_bias": "bailing_hybrid glm5_next",
    "attn_hc.base attn_hc.scale ffn_hc.base ffn_hc.scale": "glm5_next",
    "attn_sconv gate.global_scale k_sconv mlp_sconv v_sconv": "inkling",
    "attention_input final_input k_sconv.conv1d mlp_input post_attention_convolution post_mlp_convolution "
    "v_sconv.conv1d": "inkling2",
    "post_attention_residual_gate post_feedforward_residual_gate": "muse_spark",
    "freqs latent_mean latent_std": "gradium_phonon_tts pocket_tts",
    "conv.norm": "granite_speech5",
    "rotary_emb": "mistral_large4",
    "structure_attention_cell structure_generator": "slanext",
    "sinks": "deepseek_v4 flint hy_v4 openai_privacy_filter",
    "attn_hc ffn_hc hc_head input_layernorm kv_norm norm position_bias post_attention_layernorm "
    "q_a_norm": "deepseek_v4",
    "boundaries distogram_head fourier norm.bias norm.weight norm_mix norm_single norm_start": "esmfold2",
    "base fn hc_base hc_fn hc_scale k_norm lm_head scale weights_proj": "hy_v4",
    "codec_model": "kyutai_speech_to_text",
    "audio_tower multi_modal_projector": "nemo_speechlm",
    "embed_positions": "voxtral",
}
