"""Small models of every family, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = COMMON | {"num_key_value_heads": 2}
SLIDING: dict[str, Any] = GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2, "head_dim": 16}
GEMMA_TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "sliding_attention"]
GEMMA: dict[str, Any] = GROUPED | {"head_dim": 24, "sliding_window": 6, "pad_token_id": 0, "query_pre_attn_scalar": 24}
FALCON: dict[str, Any] = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
OPT: dict[str, Any] = FALCON | {"ffn_dim": 128, "pad_token_id": 0}
PHI3: dict[str, Any] = GROUPED | {"sliding_window": 8, "pad_token_id": 0}
LONG_ROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LONG_ROPE |= {"long_factor": [2.0 + i for i in range(8)], "short_factor": [1.0 + i / 8 for i in range(8)]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama-tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", SLIDING),
    "qwen3": ("qwen3", SLIDING | {"head_dim": 16}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 7}),
    "mixtral": ("mixtral", EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "phi3": ("phi3", PHI3),
    "olmo2": ("olmo2", GROUPED),
    "granite": (
        "granite",
        GROUPED
        | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
        | {"pad_token_id": VOCABULARY - 1},
    ),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 9}),
    "gpt_neox": ("gpt_neox", COMMON),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", OPT),
    "falcon": ("falcon", FALCON),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
"""Name -> transformers' model type and the configuration, number of layers left out; one for each decoder that runs."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = FAMILIES | {
    "falcon-rw": ("falcon", FALCON | {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2-scaled": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox-sequential": ("gpt_neox", COMMON | {"use_parallel_residual": False}),
    "opt-350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "phi3-long": ("phi3", PHI3 | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32}),
}
"""Those and other ways to build their blocks, ends and positions; not all have a final norm."""
BERT: dict[str, Any] = COMMON | {"pad_token_id": 0}
CUTS = {
    2: ((0, 1, 8), (0, 3, 8), (0, 6, 8), (0, 7, 8)),
    4: ((0, 1, 2, 6, 8), (0, 2, 3, 7, 8), (0, 1, 6, 7, 8), (0, 4, 5, 6, 8)),
}
"""World size -> boundaries of 5 blocks' 8 layers: embedding alone, norm and head alone, uneven blocks."""
PADDINGS = ("none", "right", "left")
ROWS, TOKENS, MICRO_BATCHES = 3, 20, 5
MICRO_BATCH_ROWS = 2
"""Of a micro-batch in training."""


def make_config(family: str, num_blocks: int, **changes: Any) -> PretrainedConfig:
    model_type, values = VARIANTS[family]
    key = "n_layer" if model_type in ("gpt2", "bloom") else "num_hidden_layers"
    if model_type == "gemma3_text" and num_blocks:
        changes = {"layer_types": GEMMA_TYPES[:num_blocks]} | changes
    return AutoConfig.for_model(model_type, **values, **{key: num_blocks}, **changes)


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    """Random weights in which no bias is 0 and no norm 1, so that a tensor in the wrong place shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_batch(padding: str, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids and attention mask of a micro-batch; one row is full."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    if padding == "none":
        return ids, None
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    for row, missing in enumerate((0, 5 + number, 1)):
        if missing:
            mask[row, slice(-missing, None) if padding == "right" else slice(missing)] = 0
    return ids, mask


def training_micro_batches() -> Iterator[torch.Tensor]:
    """Endless, always the same: token ids of which each follows from the one before: there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    while True:
        first = torch.randint(VOCABULARY, (MICRO_BATCH_ROWS, 1), generator=generator)
        yield (first + 7 * torch.arange(16)) % VOCABULARY
