"""Small models of every family, for tests."""

from __future__ import annotations

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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "llama-tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", SLIDING),
    "qwen3": ("qwen3", SLIDING | {"head_dim": 16}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 7}),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 9}),
    "gpt_neox": ("gpt_neox", COMMON),
    "gpt2": ("gpt2", GPT2),
}
"""Name -> transformers' model type and the configuration, number of layers left out."""
CUTS = {
    2: ((0, 1, 8), (0, 3, 8), (0, 6, 8), (0, 7, 8)),
    4: ((0, 1, 2, 6, 8), (0, 2, 3, 7, 8), (0, 1, 6, 7, 8), (0, 4, 5, 6, 8)),
}
"""World size -> boundaries of 5 blocks' 8 layers: embedding alone, norm and head alone, uneven blocks."""
PADDINGS = ("none", "right", "left")
ROWS, TOKENS, MICRO_BATCHES = 3, 20, 5


def make_config(family: str, num_blocks: int, **changes: Any) -> PretrainedConfig:
    model_type, values = FAMILIES[family]
    key = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
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
