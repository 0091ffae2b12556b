"""Small configs of every family, two or three each, and transformers' own models of them in named parts."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from lp_plugin.model.families import FAMILIES

BASE: dict[str, Any] = {
    "vocab_size": 123,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 99,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GPT: dict[str, Any] = {"vocab_size": 123, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 99}
GPT |= {"bos_token_id": 0, "eos_token_id": 0}
TWO_HALVES: dict[str, Any] = {
    "vocab_size": 123,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 168,
    "decoder_ffn_dim": 100,
    "max_position_embeddings": 99,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "decoder_start_token_id": 0,
}
T5: dict[str, Any] = {"vocab_size": 123, "d_model": 64, "d_kv": 24, "d_ff": 168, "num_layers": 2, "num_heads": 4}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 5}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 36,
    "n_group": 2,
    "topk_group": 1,
}
SLIDES = {"sliding_window": 6}
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "arcee": [{"num_key_value_heads": 2}, {"head_dim": 24, "attention_bias": True, "mlp_bias": True}],
    "bart": [{}, {"encoder_layers": 1, "activation_function": "relu"}],
    "bert": [{}, {"type_vocab_size": 3, "num_hidden_layers": 2}],
    "bloom": [{"n_layer": 3, "n_head": 8}, {"n_layer": 2, "tie_word_embeddings": False}],
    "camembert": [{}, {"num_attention_heads": 8}],
    "codegen": [{"rotary_dim": 8}, {"n_inner": 100, "rotary_dim": 16}],
    "cohere": [{"num_key_value_heads": 2}, {"use_qk_norm": True, "tie_word_embeddings": False, "attention_bias": True}],
    "cohere2": [SLIDES, {"sliding_window_pattern": 2, "num_key_value_heads": 1, "head_dim": 24, **SLIDES}],
    "deepseek_v2": [
        {**LATENT, "first_k_dense_replace": 1},
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "n_shared_experts": 1},
    ],
    "deepseek_v3": [
        {**LATENT, "first_k_dense_replace": 1},
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2, "first_k_dense_replace": 0},
    ],
    "distilbert": [{"dim": 64, "hidden_dim": 168, "n_layers": 3, "n_heads": 4}, {"dim": 48, "n_layers": 2}],
    "electra": [{"embedding_size": 24}, {"embedding_size": 64, "num_attention_heads": 8}],
    "ernie4_5": [{"num_key_value_heads": 2, "head_dim": 24}, {"use_bias": True, "tie_word_embeddings": False}],
    "exaone4": [
        {"num_key_value_heads": 2, "sliding_window_pattern": 2, **SLIDES},
        {"num_key_value_heads": 4, "head_dim": 24, "sliding_window": 7, "layer_types": TYPES},
        {"num_key_value_heads": 4, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ],
    "falcon": [
        {},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
        {"multi_query": False, "parallel_attn": False, "alibi": True, "tie_word_embeddings": False},
    ],
    "gemma": [{"num_key_value_heads": 1, "head_dim": 24}, {"num_key_value_heads": 4, "attention_bias": True}],
    "gemma2": [
        {"num_key_value_heads": 2, "head_dim": 24, **SLIDES},
        {"num_key_value_heads": 4, "head_dim": 16, "layer_types": TYPES, "sliding_window": 4},
    ],
    "gemma3_text": [
        {"num_key_value_heads": 2, "head_dim": 24, "sliding_window_pattern": 2, **SLIDES},
        {"num_key_value_heads": 1, "head_dim": 16, "layer_types": TYPES, "sliding_window": 4},
    ],
    "glm": [{"head_dim": 16}, {"num_key_value_heads": 4, "head_dim": 24, "attention_bias": False}],
    "glm4": [{"head_dim": 16}, {"num_key_value_heads": 4, "head_dim": 24, "attention_bias": False}],
    "glm4_moe": [
        {**LATENT, "num_key_value_heads": 2, "use_qk_norm": True, "first_k_dense_replace": 1},
        {**LATENT, "num_key_value_heads": 4, "head_dim": 24, "attention_bias": True, "n_shared_experts": 2},
    ],
    "gpt2": [{"n_head": 8}, {"n_inner": 100, "tie_word_embeddings": False}, {"n_head": 2, "n_positions": 77}],
    "gpt_bigcode": [{"n_head": 8}, {"multi_query": False, "n_inner": 100}],
    "gpt_neo": [
        {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
        {"num_layers": 3, "num_heads": 8, "attention_types": [[["global"], 2], [["local"], 1]], "window_size": 9},
    ],
    "gpt_neox": [
        {"num_attention_heads": 8},
        {"attention_bias": False, "tie_word_embeddings": True},
        {"num_attention_heads": 2, "use_parallel_residual": False},
    ],
    "gpt_oss": [
        {**EXPERTS, "num_key_value_heads": 2, "head_dim": 16, **SLIDES},
        {**EXPERTS, "num_key_value_heads": 1, "head_dim": 24, "attention_bias": False, "layer_types": TYPES},
    ],
    "gptj": [{"rotary_dim": 8}, {"n_inner": 100, "rotary_dim": 16}],
    "granite": [{"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "granitemoe": [{**EXPERTS, "num_key_value_heads": 2}, {**EXPERTS, "attention_bias": True}],
    "llama": [
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24},
        {"num_key_value_heads": None, "attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
    ],
    "m2m_100": [{}, {"decoder_layers": 1, "activation_function": "gelu"}],
    "marian": [
        {},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 77},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 77, "tie_word_embeddings": False},
    ],
    "mbart": [{}, {"decoder_layers": 1}],
    "mistral": [
        {"num_key_value_heads": 2, "sliding_window": None},
        {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 6},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": None, "sliding_window": 2},
    ],
    "mixtral": [
        {**EXPERTS, "num_key_value_heads": 2, "sliding_window": 6},
        {**EXPERTS, "num_key_value_heads": 1, "head_dim": 24, "num_experts_per_tok": 5},
    ],
    "modernbert": [{"local_attention": 8}, {"norm_bias": True, "attention_bias": True, "mlp_bias": True}],
    "mpt": [{"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 99}, {"d_model": 48, "n_layers": 2}],
    "mt5": [{}, {"num_decoder_layers": 1, "num_heads": 6}],
    "nemotron": [{"num_key_value_heads": 2}, {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}],
    "olmo": [{"num_key_value_heads": 2}, {"attention_bias": True, "tie_word_embeddings": True}],
    "olmo2": [{"num_key_value_heads": 2}, {"attention_bias": True, "tie_word_embeddings": True}],
    "olmo3": [{"num_key_value_heads": 2, **SLIDES}, {"layer_types": TYPES, "sliding_window": 5}],
    "olmoe": [
        {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        {"num_experts": 3, "num_experts_per_tok": 3, "attention_bias": True},
    ],
    "opt": [
        {"ffn_dim": 168},
        {"ffn_dim": 100, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
        {"ffn_dim": 100, "enable_bias": False, "layer_norm_elementwise_affine": False},
    ],
    "pegasus": [{}, {"encoder_layers": 1}],
    "phi": [{"num_key_value_heads": 2}, {"qk_layernorm": True}],
    "phi3": [{"num_key_value_heads": 2, "sliding_window": 6}, {"tie_word_embeddings": True}],
    "phimoe": [
        {**EXPERTS, "num_key_value_heads": 2},
        {**EXPERTS, "num_key_value_heads": 4, "attention_bias": True, "lm_head_bias": True},
    ],
    "qwen2": [
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "use_sliding_window": True, "max_window_layers": 1, **SLIDES},
    ],
    "qwen2_moe": [
        {
            "num_key_value_heads": 2,
            "num_experts": 5,
            "moe_intermediate_size": 36,
            "shared_expert_intermediate_size": 72,
            "mlp_only_layers": [1],
        },
        {
            "num_key_value_heads": 4,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ],
    "qwen3": [
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
        {"num_key_value_heads": 4, "head_dim": 40, "tie_word_embeddings": True},
    ],
    "qwen3_moe": [
        {"num_experts": 9, "moe_intermediate_size": 36, "num_key_value_heads": 2, "decoder_sparse_step": 2},
        {"num_experts": 8, "head_dim": 24, "use_sliding_window": True, "sliding_window": 6, "attention_bias": True},
    ],
    "roberta": [{}, {"type_vocab_size": 1}],
    "seed_oss": [{"num_key_value_heads": 2, "head_dim": 24}, {"num_key_value_heads": 1, "attention_out_bias": True}],
    "smollm3": [
        {"num_key_value_heads": 2, "use_sliding_window": True, "no_rope_layer_interval": 2, **SLIDES},
        {"num_key_value_heads": 4, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ],
    "stablelm": [
        {"num_key_value_heads": 2, "use_qkv_bias": True},
        {"num_key_value_heads": 4, "qk_layernorm": True, "use_parallel_residual": True},
    ],
    "starcoder2": [
        {"num_attention_heads": 8, "num_key_value_heads": 2, "use_bias": False},
        {"num_key_value_heads": 4, "tie_word_embeddings": False, "sliding_window": 6},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
    ],
    "t5": [{}, {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"}],
    "xlm-roberta": [{}, {"num_hidden_layers": 2}],
}
"""Family -> what is special in each of its small configs."""

SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["gpt2", "gpt_bigcode", "gptj", "codegen"], GPT),
    **dict.fromkeys(["bart", "m2m_100", "marian", "mbart", "pegasus"], TWO_HALVES),
    **dict.fromkeys(["t5", "mt5"], T5),
    "gpt_neo": {"vocab_size": 123, "hidden_size": 64, "num_heads": 4, "max_position_embeddings": 99},
    "mpt": {"vocab_size": 123},
    "distilbert": {"vocab_size": 123, "max_position_embeddings": 99},
}
ENCODERS = sorted(family for family, module in FAMILIES.items() if module == "encoder")
TRANSLATORS = sorted(family for family, module in FAMILIES.items() if module == "encoder_decoder")
DECODERS = sorted(set(FAMILIES) - set(ENCODERS) - set(TRANSLATORS))

REQUIRED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "nemotron": {"num_key_value_heads": 8},
}
"""Keys without which transformers' own defaults make no model that runs."""


def small_config(family: str, index: int = 0) -> dict[str, Any]:
    """One of a family's small configs."""
    return {**SHAPES.get(family, BASE), **VARIANTS[family][index], "model_type": family}


def full_config(family: str) -> dict[str, Any]:
    """The config that leaves out all that the family has a default for."""
    return {"model_type": family, **REQUIRED.get(family, {})}


SMALL = [small_config(family, index) for family in sorted(VARIANTS) for index in range(len(VARIANTS[family]))]
SMALL_IDS = [f"{family}-{index}" for family in sorted(VARIANTS) for index in range(len(VARIANTS[family]))]


def their_config(config: dict[str, Any]) -> PretrainedConfig:
    """transformers' reading of a config."""
    return AutoConfig.for_model(**config)


def build(config: dict[str, Any], device: str = "meta") -> PreTrainedModel:
    """transformers' model with random weights, or with none on the meta device."""
    family = config["model_type"]
    maker = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    maker = AutoModelForSeq2SeqLM if family in TRANSLATORS else maker
    torch.manual_seed(0)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialisation, which the meta device does not do
        return maker.from_config(their_config(config)).eval()


_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_HEAD = re.compile(r"^(lm_head|cls|generator_\w+|vocab_\w+|head|decoder\.(weight|bias))|project_out")
_NORM = re.compile(r"(^|\.)(norm|norm_f|ln_f|layer_norm|final_norm|final_layer_?norm)\.(weight|bias)$")


def part_of(name: str, family: str) -> str:
    """The layer that a parameter of transformers' model belongs to, by its name."""
    side = ""
    if family in TRANSLATORS:
        name = name.removeprefix("model.")
        side = "encoder " if name.startswith("encoder.") else "decoder " if name.startswith("decoder.") else ""
    if block := _BLOCK.search(name):
        return f"{side}block {block[1]}"
    if _HEAD.search(name):
        return "head"
    if _NORM.search(name) and "embed" not in name:
        return "encoder norm" if side == "encoder " else "norm"
    return "decoder embedding" if side == "decoder " else "embedding"


def parameters_by_part(model: PreTrainedModel) -> dict[str, dict[str, torch.nn.Parameter]]:
    """Every part's parameters, each once in it; a shared one is in every part that uses it."""
    parts: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = parts.setdefault(part_of(name, model.config.model_type), {})
        if all(parameter is not known for known in part.values()):
            part[name] = parameter
    return parts


def numel(parameters: dict[str, torch.nn.Parameter]) -> int:
    """Elements of all of them."""
    return sum(parameter.numel() for parameter in parameters.values())
