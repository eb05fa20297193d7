"""What headers say of a load's memory, for many architectures, against loads that were measured."""

from collections.abc import Iterator

from shardkit.checkpoint.checkpoint import Checkpoint
from shardkit.measure.launch import measure_load
from tests.architectures import NAMES, make_model
from tests.torture.bench import Fault, Finding, Kind, Most, Place, Seen

_OTHERS = (
    "ArceeForCausalLM", "BioGptForCausalLM", "BlenderbotForConditionalGeneration", "CTRLLMHeadModel",
    "Cohere2ForCausalLM", "ElectraForMaskedLM", "HeliumForCausalLM", "MPNetForMaskedLM",
    "MambaForCausalLM", "Olmo2ForCausalLM", "OpenAIGPTLMHeadModel", "PegasusForConditionalGeneration",
    "PersimmonForCausalLM", "SmolLM3ForCausalLM",
)  # fmt: skip
_NAMES = (*NAMES, *_OTHERS)
# So large that weights are a good part of what a load takes.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "lru_width"), 768),
    **dict.fromkeys(("word_embed_proj_dim", "decoder_hidden_size", "attention_hidden_size"), 768),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner", "dff"), 2048),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "decoder_intermediate_size"), 2048),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 12),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 12),
    "decoder_num_attention_heads": 12,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"), 4),
    "decoder_layers": 4, "num_key_value_heads": 4, "head_dim": 64, "d_kv": 64, "vocab_size": 16000,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "max_position_embeddings": 512,
    "n_positions": 512, "image_size": 224, "patch_size": 16, "hidden_sizes": [64, 128],
}  # fmt: skip


def _estimated(place: Place) -> Iterator[Finding]:
    """Load a model of an architecture as stored, or cast, and hold its peak against the estimate."""
    name, dtype = _NAMES[place.number // 2], (None, "float16")[place.number % 2]
    make_model(name, "bfloat16", **_SIZES).save_pretrained(place.work / "model")
    found = Checkpoint.open(place.work / "model").estimate(dtype)
    measured = measure_load(place.work / "model", dtype=dtype, cache="warm")
    if not measured.ok:
        yield Fault(f"{name}: {measured.reason}")
        return
    off = found.peak_anonymous_bytes / measured.peak_anonymous_bytes - 1
    told = f"{name} {dtype or 'as stored'}: {off:+.1%} of {measured.peak_anonymous_bytes / 1e6:.0f} MB"
    if found.tolerance is None:
        yield Seen(f"not promised: {told}")
        return
    yield Most("off where 5 % are promised", abs(off))
    yield Seen("within 5 %, as promised") if abs(off) <= found.tolerance else Fault(told)


ESTIMATES = Kind("estimates of a load's memory", _estimated, 2 * len(_NAMES), 2, workers=1)
