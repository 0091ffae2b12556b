"""How each family's ``config.json`` is read; a module is imported when one of its families is asked for.

A family is a class that says where it differs from `base.DecoderConfig`. In these modules annotations are not
postponed: pydantic would compile each one again in every class that inherits it, which triples the time to import.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FAMILIES"]

_MODULES: Mapping[str, tuple[str, ...]] = {
    "gated": (
        *("cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite"),
        *("llama", "mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
    ),
    "plain": ("arcee", "bloom", "falcon", "gpt_neox", "mpt", "nemotron", "opt", "phi", "starcoder2"),
    "gpt": ("codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"),
    "moe": ("glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    "latent": ("deepseek_v2", "deepseek_v3"),
    "encoder": ("bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"),
    "encoder_decoder": ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5"),
}

FAMILIES: Mapping[str, str] = {family: module for module, families in _MODULES.items() for family in families}
"""transformers' ``model_type`` -> the module of this package that reads it."""
