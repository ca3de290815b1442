"""Small random models of many architectures, and the proof that stopping between their layers changes nothing.

The reference is always transformers' plain forward, of a copy of the model that the engine has not touched, on
transformers' own cache. "Equal" is to the last bit unless a text says otherwise. A *cut* is one stop of one pass
between two layers, from 0 (behind the embeddings) to the number of layers (before the last norm): there the pass is
given up but for what a paused session keeps, another request's layers run, and the pass goes on from the checkpoint.

``python -m tests.guest.architectures --json FILE`` tries all and writes what came out; the tests do the same, one
architecture each.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hooks.gpuckpt_guest.checkpoint import Ring
from hooks.gpuckpt_guest.engine.engine import Engine, Request
from hooks.gpuckpt_guest.engine.model import Loaded, prepare
from hooks.gpuckpt_guest.engine.probe import batch_inputs, carried, decoder_layers
from hooks.gpuckpt_guest.engine.steering import Edit, Layout, apply
from hooks.gpuckpt_guest.engine.stepper import Forward, UnsupportedModelError
from hooks.gpuckpt_guest.kv.cache import Lanes, SessionCache

# ---------------------------------------------------------------------- the catalogue

VOCABULARY, FEATURES, WINDOW = 128, 32, 8
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
_MIXED = [SLIDING, FULL, SLIDING, FULL]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def build(architecture: Architecture, dtype: str = "float32") -> Any:
    """The model, with the same random weights each time."""
    config = AutoConfig.for_model(architecture.model_type, **architecture.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype]).eval()


def accept(architecture: Architecture, model: Any) -> Loaded:
    """What the engine makes of the model. Raises UnsupportedModelError if it refuses it."""
    return prepare(model, _Letters(), name=architecture.name, identity=architecture.name)


class _Letters:
    """Stands for a tokenizer: each token is a letter."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)


# ---------------------------------------------------------------------- the reference

# Read a prompt (shorter than the window, or longer), write three tokens, which leads past the window, read three more
# (the second turn of a conversation), write one.
_SHORT, _LONG, _OTHER = 6, 13, 9
_GREEDY = 1
_WRITTEN = 4  # tokens that are chosen before the second turn
_PLAN: tuple[int, ...] = (_GREEDY, _GREEDY, _GREEDY, 3, _GREEDY)


def _text(length: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, VOCABULARY, (length,), generator=random)]


@dataclass
class Answer:
    """What a run gave: the tokens that each pass read, the logits of its last one, the cache at the end."""

    read: list[list[int]] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    cache: Any = None

    def next(self, prompt: Sequence[int]) -> list[int] | None:
        """What the next pass reads; None when the plan is done."""
        step = len(self.logits)
        if step == 0:
            return list(prompt)
        if step > len(_PLAN):
            return None
        if _PLAN[step - 1] == _GREEDY:
            return [int(self.logits[-1][0, -1].argmax())]
        return _text(_PLAN[step - 1], seed=step)

    def take(self, read: list[int], logits: Any) -> None:
        """A pass is over."""
        self.read.append(read)
        self.logits.append(logits)


@dataclass
class Plain:
    """transformers' own forward, of a model that the engine has never seen."""

    model: Any

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._takes_positions = "position_ids" in parameters
        self.layers = list(decoder_layers(self.model))

    def forward(self, ids: Any, cache: Any, **inputs: Any) -> Any:
        """Logits of the last token [rows, 1, vocabulary]."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs, **self._keep)
        return out.logits[:, -1:].clone()

    def answer(self, prompt: Sequence[int], edit: Edit | None = None, layout: Layout | None = None) -> Answer:
        """Run the plan, with ``edit`` made by a hook if there is one."""
        made = Answer(cache=DynamicCache(config=self.model.config))
        position = 0
        hook = None
        if edit is not None and layout is not None:
            hook = self._hook(edit, lambda hidden: apply(edit, hidden, layout, position))
        while (read := made.next(prompt)) is not None:
            # As generate() does; without them Bamba begins to count at 0 in each pass.
            places = torch.arange(position, position + len(read))[None]
            inputs = {"position_ids": places} if self._takes_positions else {}
            made.take(read, self.forward(torch.tensor([read]), made.cache, **inputs))
            position += len(read)
        if hook:
            hook.remove()
        return made

    def _hook(self, edit: Edit, changed: Callable[[Any], Any]) -> Any:
        if edit.layer:

            def behind(_: Any, __: Any, returned: Any) -> Any:
                if isinstance(returned, tuple):
                    return (changed(returned[0]), *returned[1:])
                return changed(returned)

            return self.layers[edit.layer - 1].register_forward_hook(behind)

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (changed(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

        return self.layers[0].register_forward_pre_hook(before, with_kwargs=True)


def _tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    """All that a cache layer of transformers' keeps."""
    for name, value in vars(layer).items():
        held = value.items() if isinstance(value, dict) else [("", value)]
        for key, tensor in held:
            if isinstance(tensor, torch.Tensor) and tensor.numel() and name != "_sliding_window_tensor":
                yield f"{name}.{key}" if isinstance(value, dict) else name, tensor


def _held(layer: Any, name: str) -> Any:
    name, _, key = name.partition(".")
    value = getattr(layer, name, None)
    if isinstance(value, dict):
        return next((item for found, item in value.items() if str(found) == key), None)
    return value


def _cache_difference(ours: Any, theirs: Any) -> str:
    """Which tensor of the two caches differs; empty if none does."""
    compared = 0
    for index, layer in enumerate(theirs.layers):
        for name, wanted in _tensors(layer):
            compared += 1
            if why := _difference(_held(ours.layers[index], name), wanted):
                return f"{name} of layer {index} in the cache: {why}"
    return "" if compared else "the reference's cache is empty"


def _difference(got: Any, wanted: Any) -> str:
    if got is None:
        return "missing"
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(wanted.shape)} {wanted.dtype}"
    if not torch.equal(got, wanted):
        return f"by {float((got.float() - wanted.float()).abs().max()):.3g}"
    return ""


# ---------------------------------------------------------------------- what is tried


@dataclass
class Outcome:
    """What a trial found. ``cuts`` counts stops; a trial that stops after its first failure counts those before."""

    cuts: int = 0
    failures: list[str] = field(default_factory=list)

    def note(self, where: str, difference: str) -> bool:
        """Returns whether all is well."""
        if difference:
            self.failures.append(f"{where}: {difference}")
        return not difference


class Subject:
    """One architecture in one data type: the engine's copy, with its layers' calls counted, and the untouched one."""

    def __init__(self, architecture: Architecture, dtype: str) -> None:
        model = build(architecture, dtype)
        self.plain = Plain(copy.deepcopy(model))
        self.ran: Counter[int] = Counter()
        for index, layer in enumerate(decoder_layers(model)):
            layer.forward = _counted(layer.forward, self.ran, index)
        self.loaded = accept(architecture, model)
        self.stepper = self.loaded.stepper
        self.layout = self.loaded.verdict.layout
        self.layers = self.loaded.verdict.layers
        self.ring = Ring(1 << 16, "cpu")

    def begin(self, cache: SessionCache | Lanes, ids: Any) -> Forward:
        """The prologue of a pass, as the scheduler makes it."""
        if isinstance(cache, Lanes):
            return self.stepper.begin(batch_inputs(self.stepper, ids, cache), cache)
        return self.stepper.begin(self.stepper.inputs(ids, past=[cache.length]), cache)

    def run(self, forward: Forward, to: int) -> Forward:
        """Run the layers up to ``to``."""
        while forward.layer < to:
            self.stepper.step(forward)
        return forward

    def stop(self, forward: Forward) -> Stopped:
        """What a paused session keeps of a pass; all else is forgotten."""
        given = {name: dict(container) for name, container in carried(forward)}
        return Stopped(forward.layer, forward.executed, self.ring.save(forward.hidden), given)

    def go_on(self, stopped: Stopped, cache: SessionCache | Lanes, ids: Any, edit: Edit | None = None) -> Forward:
        """Go on from it: the prologue again, then the hidden state in its place."""
        forward = self.begin(cache, ids)
        state, _ = self.ring.restore(stopped.checkpoint)
        if edit is not None:
            state = apply(edit, state, self.layout, cache.length)
        forward.layer, forward.executed, forward.hidden = stopped.layer, stopped.executed, state
        for name, container in carried(forward):
            container.update(stopped.given.get(name, {}))
        return forward

    def land(self, forward: Forward, cache: SessionCache | Lanes) -> Any:
        """Run the rest, and the head."""
        self.run(forward, self.layers)
        if forward.executed != self.layers:
            raise AssertionError(f"{forward.executed} of {self.layers} layers ran")
        logits = self.stepper.head(forward).clone()
        cache.commit(forward.tokens)
        return logits

    def whole(self, cache: SessionCache, ids: Any) -> Any:
        """A pass without a stop."""
        return self.land(self.begin(cache, ids), cache)

    def edit(self, cut: int) -> Edit:
        """One kind of edit for each cut: of all tokens, or of some."""
        vector = torch.randn(FEATURES, generator=torch.Generator().manual_seed(cut)).to(self.loaded.dtype)
        return (
            Edit("scale", cut, 1.5),
            Edit("add", cut, 0.5, vector, first=2),
            Edit("project", cut, 1.0, vector),
            Edit("set", cut, 1.0, vector, first=3, last=5),
        )[cut % 4]


@dataclass
class Stopped:
    """A pass between two layers, as data."""

    layer: int
    executed: int
    checkpoint: Any
    given: dict[str, dict[Any, Any]]


def _counted(forward: Callable[..., Any], ran: Counter[int], index: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ran[index] += 1
        return forward(*args, **kwargs)

    return call


class Traffic:
    """Another request, whose layers run whenever the one under test is stopped; its answers are checked, too."""

    def __init__(self, subject: Subject, outcome: Outcome) -> None:
        self._subject, self._outcome = subject, outcome
        self._prompt = _text(_OTHER, seed=99)
        self._wanted = subject.plain.answer(self._prompt)
        self._course = self._forever()

    def __call__(self) -> None:
        for _ in range(2):
            next(self._course)

    def _forever(self) -> Iterator[None]:
        while True:
            cache, made = self._subject.loaded.blueprint.session(), Answer()
            while (read := made.next(self._prompt)) is not None:
                forward = self._subject.begin(cache, torch.tensor([read]))
                for layer in range(self._subject.layers):
                    self._subject.run(forward, layer + 1)
                    yield
                made.take(read, self._subject.land(forward, cache))
                wanted = self._wanted.logits[len(made.logits) - 1]
                self._outcome.note("another request meanwhile, logits", _difference(made.logits[-1], wanted))


def cuts(subject: Subject, length: int, *, steered: bool) -> Outcome:
    """Stop each pass of the plan at each cut: reading a prompt of ``length`` tokens, writing, reading on."""
    outcome = Outcome()
    prompt = _text(length, seed=length)
    traffic = Traffic(subject, outcome)
    wanted = subject.plain.answer(prompt)
    for cut in range(subject.layers + 1):
        edit = subject.edit(cut) if steered else None
        if edit is not None:
            wanted = subject.plain.answer(prompt, edit, subject.layout)
        cache, made = subject.loaded.blueprint.session(), Answer()
        while (read := made.next(prompt)) is not None:
            step = len(made.logits)
            where = f"cut {cut}, pass {step} of {len(read)} tokens"
            ids = torch.tensor([read])
            subject.ran.clear()
            stopped = subject.stop(subject.run(subject.begin(cache, ids), cut))
            before = dict(subject.ran)
            traffic()
            subject.ran.clear()
            subject.ran.update(before)
            forward = subject.go_on(stopped, cache, ids, edit)
            subject.ring.drop(stopped.checkpoint)
            made.take(read, subject.land(forward, cache))
            outcome.cuts += 1
            counts = [subject.ran[index] for index in range(subject.layers)]
            good = outcome.note(where, "" if counts == [1] * subject.layers else f"layers ran {counts} times")
            good &= outcome.note(
                f"{where}, tokens", "" if read == wanted.read[step] else f"{read}, {wanted.read[step]}"
            )
            good &= outcome.note(f"{where}, logits", _difference(made.logits[step], wanted.logits[step]))
            if not good:
                break
        else:
            outcome.note(f"cut {cut}", _cache_difference(cache, wanted.cache))
    return outcome


def padded(subject: Subject) -> Outcome:
    """A batch of prompts padded on the left, as one cache of several rows, stopped at every cut of four passes."""
    outcome = Outcome()
    if "attention_mask" not in subject.stepper.takes:
        return outcome
    texts = [_text(length, seed=length) for length in (5, 12, 9)]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    ours, theirs = subject.loaded.blueprint.session(), DynamicCache(config=subject.plain.model.config)
    traffic = Traffic(subject, outcome)
    for step in range(4):
        inputs: dict[str, Any] = {"attention_mask": mask}
        if "position_ids" in subject.stepper.takes:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = places[:, -ids.shape[1] :]
        wanted = subject.plain.forward(ids, theirs, **inputs)
        forward = subject.stepper.begin({"input_ids": ids, **inputs}, ours)
        for layer in range(subject.layers + 1):
            subject.run(forward, layer)
            checkpoint = subject.ring.save(forward.hidden)
            traffic()
            forward.hidden, _ = subject.ring.restore(checkpoint)
            subject.ring.drop(checkpoint)
            outcome.cuts += 1
        got = subject.stepper.head(forward)
        ours.commit(forward.tokens)
        if not outcome.note(f"padded batch, pass {step}, logits", _difference(got, wanted)):
            return outcome
        ids = wanted[:, -1].argmax(-1)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    outcome.note("padded batch", _cache_difference(ours, theirs))
    return outcome


def _joined(subject: Subject, caches: Sequence[SessionCache]) -> Any:
    """transformers' own cache with what the sessions have read, padded on the left with zeros."""
    made = DynamicCache(config=subject.plain.model.config)
    longest = max(cache.length for cache in caches)
    for index, layer in enumerate(made.layers):
        members = [cache.layers[index] for cache in caches]
        if getattr(members[0], "span", None) is not None and members[0].keys is not None:
            layer.update(
                *(_left_padded([getattr(member, name) for member in members], longest) for name in ("keys", "values"))
            )
        for number in range(getattr(members[0], "number_of_states", 0)):
            if members[0].conv_states[number] is not None:
                layer.update_conv_state(torch.cat([member.conv_states[number] for member in members]), number)
            if members[0].recurrent_states[number] is not None:
                layer.update_recurrent_state(torch.cat([member.recurrent_states[number] for member in members]), number)
            layer.has_previous_state[number] = members[0].has_previous_state[number]
    return made


def _left_padded(rows: Sequence[Any], width: int) -> Any:
    return torch.cat([torch.nn.functional.pad(row, (0, 0, width - row.shape[-2], 0)) for row in rows])


_LANES = (5, 12, 9)


def lanes(subject: Subject) -> Outcome:
    """Three sessions of unequal length as one batch, each pass stopped at another cut, where the batch is taken apart.

    The reference is the plain forward on a cache that holds the same, padded on the left.
    """
    outcome = Outcome()
    if not subject.loaded.verdict.batching:
        return outcome
    caches, tokens = _read(subject, _LANES)
    theirs = _joined(subject, caches)
    pads = [max(_LANES) - length for length in _LANES]
    for cut in range(subject.layers + 1):
        ids = torch.tensor(tokens)[:, None]
        width = max(cache.length for cache in caches) + 1
        inputs: dict[str, Any] = {
            "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
        }
        if "position_ids" in subject.stepper.takes:
            inputs["position_ids"] = torch.tensor([[cache.length] for cache in caches])
        wanted = subject.plain.forward(ids, theirs, **inputs)
        batch = Lanes(caches)
        stopped = subject.stop(subject.run(subject.begin(batch, ids), cut))
        batch.release()
        batch = Lanes(caches)
        got = subject.land(subject.go_on(stopped, batch, ids), batch)
        subject.ring.drop(stopped.checkpoint)
        outcome.cuts += 1
        if not outcome.note(f"lanes, cut {cut}, logits", _difference(got, wanted)):
            return outcome
        batch.release()
        tokens = [int(row.argmax()) for row in got[:, -1]]
    for row, cache in enumerate(caches):
        for index, layer in enumerate(theirs.layers):
            for name, tensor in _tensors(layer):
                kept = tensor[row : row + 1]
                if name in ("keys", "values"):  # without the padding, as far as the window still holds it
                    kept = kept[..., -cache.length :, :]
                outcome.note(
                    f"lanes, row {row}, layer {index}, {name}", _difference(_held(cache.layers[index], name), kept)
                )
    return outcome


def _read(subject: Subject, lengths: Sequence[int]) -> tuple[list[SessionCache], list[int]]:
    """Sessions that have read texts of these lengths, and the token that each is about to read."""
    caches, tokens = [], []
    for length in lengths:
        cache = subject.loaded.blueprint.session()
        logits = subject.whole(cache, torch.tensor([_text(length, seed=length)]))
        caches.append(cache)
        tokens.append(int(logits[0, -1].argmax()))
    return caches, tokens


def together(subject: Subject) -> Outcome:
    """Three sessions in a batch, then two of them, then each alone: they write what each would write alone.

    The tokens are equal; a batch changes the order of sums, so the logits are so to within rounding.
    """
    outcome = Outcome()
    if not subject.loaded.verdict.batching:
        return outcome
    alone, tokens = _read(subject, _LANES)
    wanted: list[list[Any]] = []
    for cache, token in zip(alone, tokens, strict=True):
        wanted.append([])
        for _ in range(9):
            wanted[-1].append(subject.whole(cache, torch.tensor([[token]]))[0, -1])
            token = int(wanted[-1][-1].argmax())
    caches, tokens = _read(subject, _LANES)
    done = [0] * len(caches)
    for rows, steps in (((0, 1, 2), 3), ((0, 2), 3), ((0,), 1), ((1,), 2), ((2,), 1), ((0, 1, 2), 2)):
        batch = Lanes([caches[row] for row in rows])
        for _ in range(steps):
            ids = torch.tensor([[tokens[row]] for row in rows])
            logits = subject.land(subject.begin(batch, ids), batch)
            for row, got in zip(rows, logits[:, -1], strict=True):
                expected = wanted[row][done[row]]
                tokens[row] = int(got.argmax())
                where = f"together, rows {rows}, row {row}, step {done[row]}"
                close = torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
                outcome.note(f"{where}, logits", "" if close else _difference(got, expected))
                same = tokens[row] == int(expected.argmax())
                outcome.note(f"{where}, token", "" if same else f"{tokens[row]}, not {int(expected.argmax())}")
                done[row] += 1
            if outcome.failures:
                return outcome
        batch.release()
    return outcome


def forks(subject: Subject) -> Outcome:
    """Branch at every second cut of the prompt's pass and again of a later one: all answer as if alone."""
    outcome = Outcome()
    prompt = _text(_SHORT, seed=_SHORT)
    wanted = subject.plain.answer(prompt)
    for cut in range(0, subject.layers + 1, 2):
        root = subject.loaded.blueprint.session()
        ids = torch.tensor([prompt])
        stopped = subject.stop(subject.run(subject.begin(root, ids), cut))
        child = root.fork()
        # Both write on, in turn: neither may see the other's.
        family = [child, root]
        for cache in family:
            logits = subject.land(subject.go_on(stopped, cache, ids), cache)
            outcome.note(f"fork at cut {cut} of the prompt, logits", _difference(logits, wanted.logits[0]))
        outcome.cuts += 1
        for step in range(1, len(wanted.read)):
            ids = torch.tensor([wanted.read[step]])
            if step == 3:
                late = subject.stop(subject.run(subject.begin(child, ids), cut))
                grandchild = child.fork()
                logits = subject.land(subject.go_on(late, grandchild, ids), grandchild)
                outcome.note(f"fork of a fork, cut {cut}, logits", _difference(logits, wanted.logits[step]))
                logits = subject.land(subject.go_on(late, child, ids), child)
                outcome.note(f"forked twice, cut {cut}, logits", _difference(logits, wanted.logits[step]))
                logits = subject.whole(root, ids)
                family = [grandchild, root, child]
                outcome.cuts += 1
                continue
            for number, cache in enumerate(family):
                # A disturbance that is not ours: a branch that reads something else.
                if step == 2 and number == 0:
                    other = cache.fork()
                    subject.whole(other, torch.tensor([_text(2, seed=5)]))
                logits = subject.whole(cache, ids)
                where = f"forked at cut {cut}, pass {step}, branch {number}, logits"
                outcome.note(where, _difference(logits, wanted.logits[step]))
        for number, cache in enumerate(family):
            outcome.note(f"forked at cut {cut}, branch {number}", _cache_difference(cache, wanted.cache))
        if outcome.failures:
            break
    return outcome


def engine(subject: Subject) -> Outcome:
    """The engine itself: one session stopped between any two layers of each pass, one that is not, one by one.

    The ring is too small for the checkpoints, so that they are moved out of it.
    """
    outcome = Outcome()
    made = Engine(subject.loaded, ring_bytes=2048, max_batch=1)
    prompts = [_text(_SHORT, seed=_SHORT), _text(_LONG, seed=_LONG)]
    sessions = [made.create(seed=0) for _ in prompts]
    turns = []
    for session, prompt in zip(sessions, prompts, strict=True):
        turns.append(
            made.generate(session, Request(read=prompt, max_tokens=_WRITTEN, ignore_stops=True, keep_logits=True))
        )
    made.stop_at(sessions[0], layer=None)
    last: list[tuple[int, int]] = []
    while made.scheduler.busy or sessions[0].pause:
        if made.scheduler.busy:
            made.scheduler.run()
        if (pause := sessions[0].pause) is not None:
            made.resume(sessions[0])
            outcome.cuts += 1
            last.append((pause.step, pause.layer))
    stops = [(step, layer) for step in range(_WRITTEN) for layer in range(subject.layers + 1)]
    outcome.note("engine, stops", "" if last == stops else f"{last}, not {stops}")
    for session, turn, prompt in zip(sessions, turns, prompts, strict=True):
        wanted = subject.plain.answer(prompt)
        tokens = [int(logits[0, -1].argmax()) for logits in wanted.logits[:_WRITTEN]]
        where = f"engine, session of {len(prompt)} tokens"
        outcome.note(where, session.failed or turn.error)
        if outcome.note(f"{where}, tokens", "" if turn.generated == tokens else f"{turn.generated}, not {tokens}"):
            outcome.note(f"{where}, logits", _difference(turn.logits, wanted.logits[_WRITTEN - 1][0, -1].float()))
    return outcome


# ---------------------------------------------------------------------- all of them


def trials(architecture: Architecture) -> Iterator[tuple[str, Outcome]]:
    """Everything that is tried with one architecture that the engine accepts, by name.

    Raises UnsupportedModelError if the engine refuses it.
    """
    with torch.inference_mode():
        single = Subject(architecture, "float32")
        yield "cuts, float32", _tried(cuts, single, _LONG, steered=False)
        yield "cuts, float32, steered", _tried(cuts, single, _SHORT, steered=True)
        yield "padded, float32", _tried(padded, single)
        yield "lanes, float32", _tried(lanes, single)
        yield "together", _tried(together, single)
        yield "forks", _tried(forks, single)
        yield "engine", _tried(engine, single)
        half = Subject(architecture, "bfloat16")
        yield "cuts, bfloat16", _tried(cuts, half, _SHORT, steered=False)
        yield "cuts, bfloat16, steered", _tried(cuts, half, _LONG, steered=True)
        yield "padded, bfloat16", _tried(padded, half)
        yield "lanes, bfloat16", _tried(lanes, half)


def _tried(trial: Callable[..., Outcome], *args: Any, **kwargs: Any) -> Outcome:
    """A trial that raises has failed; the others of this architecture are made all the same."""
    try:
        return trial(*args, **kwargs)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(0, [f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"])


def main(argv: Sequence[str] | None = None) -> int:
    """Try all and write the counts. Exit codes: 0 everything is equal, 1 something is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest.architectures", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--only", nargs="*", help="names out of the catalogue")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.monotonic()
    stops, failures, refused, accepted = 0, [], {}, 0
    for architecture in CATALOGUE:
        if options.only and architecture.name not in options.only:
            continue
        try:
            for name, outcome in trials(architecture):
                stops += outcome.cuts
                failures += [f"{architecture.name}: {name}: {failure}" for failure in outcome.failures]
        except UnsupportedModelError as error:
            refused[architecture.name] = str(error)
            continue
        except Exception as error:
            failures.append(f"{architecture.name}: {type(error).__name__}: {error}")
        accepted += 1
        print(f"{architecture.name}: {stops} cuts, {len(failures)} failures", file=sys.stderr)
    facts = {
        "architectures": accepted,
        "cuts": stops,
        "failures": len(failures),
        "refused": refused,
        "seconds": round(time.monotonic() - began, 1),
    }
    for failure in failures:
        print(failure, file=sys.stderr)
    text = json.dumps(facts, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
