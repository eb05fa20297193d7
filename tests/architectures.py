"""Small random models of many architectures: one table of sizes, of which each config takes what it knows."""

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "n_embd": 32,
    "d_model": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_layers": 2, "d_ff": 64, "d_kv": 8,
    "num_heads": 4, "ffn_dim": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "n_inner": 64,
    "embedding_size": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "word_embed_proj_dim": 32,
    "dff": 64, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_groups": 1, "rotary_dim": 4, "image_size": 16, "patch_size": 8, "lru_width": 32,
    "decoder_hidden_size": 32, "decoder_intermediate_size": 64, "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4, "max_source_positions": 40, "max_target_positions": 40,
    "num_mel_bins": 8, "attention_hidden_size": 32, "context_length": 64, "hidden_sizes": [8, 16],
    "depths": [1, 1], "conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "projection_dim": 16,
    "max_seq_len": 64, "router_dim": 4, "sliding_window": 16, "attention_window": 16, "mamba_d_state": 8,
    "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip

NAMES = (
    "LlamaForCausalLM", "MistralForCausalLM", "FalconForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    "GPTJForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "MptForCausalLM", "CodeGenForCausalLM",
    "StableLmForCausalLM", "Starcoder2ForCausalLM", "OlmoForCausalLM", "CohereForCausalLM",
    "GraniteForCausalLM", "DeepseekV3ForCausalLM", "Glm4ForCausalLM", "RwkvForCausalLM", "XGLMForCausalLM",
    "JambaForCausalLM", "GptOssForCausalLM", "GPTBigCodeForCausalLM", "XLNetLMHeadModel",
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel", "BertForMaskedLM",
    "RobertaForMaskedLM", "DistilBertForMaskedLM", "AlbertForMaskedLM", "DebertaV2ForMaskedLM",
    "ModernBertForMaskedLM", "ViTForImageClassification", "CLIPModel", "SiglipModel",
    "WhisperForConditionalGeneration", "Wav2Vec2ForCTC", "ResNetForImageClassification",
)  # fmt: skip


def make_model(name: str, dtype: str = "float32", **other_sizes: Any) -> Any:
    """Make a model of a class of transformers, with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    known = kind.config_class().to_dict()
    if "text_config" in known and "vision_config" in known:
        part = {size: SIZES[size] for size in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        part |= {"num_attention_heads": 4, "projection_dim": 16}
        vision = {**part, "image_size": 16, "patch_size": 8}
        config = kind.config_class(text_config={**part, "vocab_size": 96}, vision_config=vision)
    else:
        lists = (list, tuple)
        config = kind.config_class(
            **{
                size: value
                for size, value in {**SIZES, **other_sizes}.items()
                if isinstance(known.get(size), lists if isinstance(value, list) else type(value))
            }
        )
    model = kind(config).to(getattr(torch, dtype)).eval()
    model.config.architectures = [name]
    return model
