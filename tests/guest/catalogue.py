"""Architectures of transformers, each small: what the engine's exactness is tried on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY, FEATURES, WINDOW = 128, 32, 8
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
_MIXED = [SLIDING, FULL, SLIDING, FULL]


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers and the configuration that makes it small.

    ``refused``: a part of the reason for which the engine does not take it; empty if it does. ``alone``: a part of the
    reason for which its sessions cannot share a batch; empty if they can.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    refused: str = ""
    alone: str = ""


# What most families call alike. The weights are larger than usual: else a random model likes all tokens the same.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": FEATURES,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOKENS: dict[str, Any] = {
    name: _COMMON[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
}
_GPT = {**_TOKENS, "n_embd": FEATURES, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
_FALCON = {name: value for name, value in _COMMON.items() if name != "head_dim"}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_INDEXER: dict[str, Any] = {"index_topk": 6, "index_head_dim": 8, "index_n_heads": 2}
_DELTA: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_SLIDE: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _MIXED}
_SHARED_EXPERT: dict[str, Any] = {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}


def _of(
    name: str, *parts: dict[str, Any], base: dict[str, Any] = _COMMON, kind: str = "", **verdict: str
) -> Architecture:
    config = dict(base)
    for part in parts:
        config |= part
    return Architecture(name, kind or name, config, **verdict)


CATALOGUE: tuple[Architecture, ...] = (
    # one kind of layer: keys and values of all tokens
    _of("gpt2", base=_GPT),
    _of("gpt_bigcode", base=_GPT),
    _of("gptj", {"rotary_dim": 4}, base=_GPT),
    _of("codegen", {"rotary_dim": 4}, base=_GPT),
    _of("gpt_neox", {"num_key_value_heads": 4}),
    _of("gpt_neox_japanese", {"num_key_value_heads": 4}),
    _of("openai-gpt", base=_GPT, refused="takes no past_key_values"),
    _of("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}),
    _of(
        "opt_projected",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.2, "do_layer_norm_before": False},
        kind="opt",
    ),
    _of("bloom", {"hidden_size": FEATURES, "n_layer": 4, "n_head": 4, "initializer_range": 0.2}, base=_TOKENS),
    _of(
        "mpt",
        {"d_model": FEATURES, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "initializer_range": 0.2},
        base=_TOKENS,
    ),
    _of("falcon", base=_FALCON),
    _of("falcon_alibi", {"alibi": True, "parallel_attn": False, "bias": True}, base=_FALCON, kind="falcon"),
    _of("falcon_grouped", {"new_decoder_architecture": True, "num_kv_heads": 2}, base=_FALCON, kind="falcon"),
    _of("biogpt"),
    _of("xglm", {"d_model": FEATURES, "ffn_dim": 64, "num_layers": 4, "attention_heads": 4, "init_std": 0.2}),
    _of("llama"),
    _of("arcee"),
    _of("apertus"),
    _of("bitnet"),
    _of("helium"),
    _of("jais2"),
    _of("nanochat"),
    _of("nemotron"),
    _of("persimmon", {"num_key_value_heads": 4}),
    _of("phi"),
    _of("phi3"),
    _of("stablelm"),
    _of("stablelm_parallel", {"use_parallel_residual": True, "qk_layernorm": True}, kind="stablelm"),
    _of("gemma"),
    _of("glm"),
    _of("glm4"),
    _of("olmo", {"clip_qkv": 1.0}),
    _of("olmo2"),
    _of("cohere", {"use_qk_norm": True}),
    _of("granite", {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}),
    _of("hyperclovax", {"logits_scaling": 2.0}),
    _of("ernie4_5"),
    _of("hunyuan_v1_dense"),
    _of("seed_oss"),
    _of("smollm3", {"no_rope_layer_interval": 2}),
    _of("diffllama"),
    _of("qwen3"),
    # some layers see a window of the last tokens only
    _of("qwen2", _SLIDE, {"use_sliding_window": True}),
    _of("mistral", {"sliding_window": WINDOW}),
    _of("mistral_full", {"sliding_window": None}, kind="mistral"),
    _of("ministral", _SLIDE),
    _of("ministral3"),
    _of("starcoder2", {"sliding_window": WINDOW}),
    _of(
        "gpt_neo",
        {"num_layers": 4, "num_heads": 4, "window_size": WINDOW, "attention_types": [[["global", "local"], 2]]},
    ),
    _of("gemma2", _SLIDE, {"query_pre_attn_scalar": 8}),
    _of("gemma3_text", _SLIDE, {"query_pre_attn_scalar": 8}),
    _of("vaultgemma", _SLIDE, {"query_pre_attn_scalar": 8}),
    _of("cohere2", _SLIDE),
    _of("olmo3", _SLIDE),
    _of("exaone4", _SLIDE),
    _of("cwm", _SLIDE),
    _of("granite_swa", _SLIDE),
    _of("modernbert-decoder", {"local_attention": 2 * WINDOW, "layer_types": _MIXED}),
    # layers that use another layer's keys and values
    _of(
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
        },
        alone="hand keys and values on",
    ),
    _of(
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 3,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
        alone="hand keys and values on",
    ),
    _of(
        "gemma4_experts",
        _SLIDE,
        _EXPERTS,
        {"enable_moe_block": True, "top_k_experts": 2, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
        kind="gemma4_text",
        alone="hand keys and values on",
    ),
    # mixtures of experts
    _of("mixtral", _LOCAL, {"sliding_window": WINDOW}),
    _of("phimoe", _LOCAL, {"sliding_window": WINDOW}),
    _of("qwen2_moe", _EXPERTS, _SHARED_EXPERT, _SLIDE, {"use_sliding_window": True}),
    _of("qwen3_moe", _EXPERTS, {"decoder_sparse_step": 2}),
    _of("olmoe", _EXPERTS),
    _of("flex_olmo", _EXPERTS),
    _of("granitemoe", _LOCAL),
    _of("granitemoeshared", _LOCAL, {"shared_intermediate_size": 32}),
    _of("granitemoe_swa", _LOCAL, _SLIDE),
    _of("jetmoe", _LOCAL, {"kv_channels": 8, "num_key_value_heads": 2}),
    _of("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}),
    _of("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    _of("gpt_oss", _LOCAL, _SLIDE),
    _of("minimax_m2", _LOCAL, {"rotary_dim": 4}),
    _of("glm4_moe", _ROUTED, {"use_qk_norm": True}),
    _of("dots1", _ROUTED, _SLIDE),
    _of("solar_open", _ROUTED),
    _of("afmoe", _EXPERTS, _SLIDE, {"num_shared_experts": 1, "num_dense_layers": 1}),
    _of(
        "exaone_moe",
        _EXPERTS,
        _SLIDE,
        {"num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    _of("cohere2_moe", _EXPERTS, _SLIDE, {"prefix_dense_intermediate_size": 64}),
    _of("mellum", _EXPERTS, _SLIDE),
    _of("laguna", _EXPERTS, _SLIDE, {"shared_expert_intermediate_size": 32}),
    _of("hy_v3", _EXPERTS, {"num_shared_experts": 1}),
    _of("mimo_v2_flash", _ROUTED, _SLIDE, {"v_head_dim": 8}),
    _of(
        "dbrx",
        {
            "d_model": FEATURES,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 256,
            "initializer_range": 0.2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": FEATURES},
        },
        base=_TOKENS,
    ),
    _of(
        "llama4_text",
        _LOCAL,
        {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
            "no_rope_layer_interval": 4,
            "floor_scale": 4,
        },
        alone="padded rows",
    ),
    # keys and values through a latent vector
    _of("deepseek_v2", _ROUTED, _LATENT),
    _of("deepseek_v3", _ROUTED, _LATENT),
    _of("axk1", _ROUTED, _LATENT),
    _of("youtu", _LATENT),
    _of("minicpm3", _LATENT),
    _of("glm4_moe_lite", _ROUTED, _LATENT, {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    _of(
        "longcat_flash",
        _LATENT,
        {
            "num_layers": 4,
            "num_hidden_layers": 8,
            "ffn_hidden_size": 64,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 32,
        },
        refused="no list of 8 decoder layers",
    ),
    # keys and values that an index selects
    _of("deepseek_v32", _ROUTED, _LATENT, _INDEXER, alone="DynamicIndexedLayer"),
    _of("glm_moe_dsa", _ROUTED, _LATENT, _INDEXER, alone="DynamicIndexedLayer"),
    _of(
        "glm_moe_dsa_shared",
        _ROUTED,
        _LATENT,
        _INDEXER,
        {"indexer_types": ["full", "shared", "full", "shared"]},
        kind="glm_moe_dsa",
        refused="its forward fails",
    ),
    _of(
        "deepseek_v4",
        _INDEXER,
        {
            "layer_types": [SLIDING, "heavily_compressed_attention", "compressed_sparse_attention", SLIDING],
            "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "sliding_window": WINDOW,
            "num_key_value_heads": 1,
            "q_lora_rank": 16,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "o_groups": 2,
            "o_lora_rank": 8,
            "partial_rotary_factor": 0.5,
        },
        alone="DeepseekV4",
    ),
    # recurrent states beside keys and values
    _of("qwen3_next", _DELTA, _EXPERTS, _SHARED_EXPERT),
    _of("qwen3_5_text", _DELTA),
    _of("qwen3_5_moe_text", _DELTA, _EXPERTS, _SHARED_EXPERT),
    _of("olmo_hybrid", _DELTA),
    _of(
        "kimi_linear",
        _LATENT,
        {
            "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 4,
            "q_lora_rank": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
        },
    ),
    _of("minimax", _LOCAL, {"block_size": 8, "layer_types": [LINEAR, FULL, LINEAR, FULL]}, refused="cache of its own"),
    _of("lfm2", {"layer_types": ["conv", "conv", FULL, "conv"], "block_multiple_of": 8}),
    _of("lfm2_moe", _EXPERTS, {"layer_types": ["conv", "conv", FULL, "conv"], "num_dense_layers": 1}),
    _of("bamba", _MAMBA2, {"attn_layer_indices": [1, 3]}),
    _of("falcon_h1", _MAMBA2, {"mamba_d_ssm": 64}),
    _of(
        "granitemoehybrid",
        _LOCAL,
        _MAMBA2,
        {"layer_types": ["mamba", FULL, "mamba", FULL], "shared_intermediate_size": 32},
    ),
    _of(
        "jamba",
        _EXPERTS,
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    _of(
        "zamba",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_key_value_heads": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "head_dim": 16,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    _of(
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_key_value_heads": 4,
            "head_dim": 16,
            "use_mamba_kernels": False,
            "use_mem_rope": True,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "chunk_size": 8,
        },
    ),
    _of(
        "nemotron_h",
        _ROUTED,
        {
            "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    _of("zaya", _EXPERTS, {"num_experts_per_tok": 1, "router_hidden_size": 16}, refused="its logits differ"),
    # nothing but recurrent states
    _of("mamba", {"state_size": 8}, refused="takes no past_key_values"),
    _of(
        "mamba2", {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}, refused="takes no past_key_values"
    ),
    _of("falcon_mamba", {"state_size": 8}, refused="takes no past_key_values"),
    _of("rwkv", {"attention_hidden_size": FEATURES}, refused="takes no past_key_values"),
    _of("xlstm", {"num_heads": 4, "num_blocks": 4, "chunk_size": 8}, refused="takes no past_key_values"),
    _of("recurrent_gemma", {"lru_width": FEATURES, "attention_window_size": WINDOW}, refused="keeps state in"),
)

# Fewer are no proof that nothing depends on one family.
FEWEST_ACCEPTED = 45
