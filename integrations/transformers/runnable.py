"""Which of the families that can be planned can also be run here; imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lp_plugin.errors import UnsupportedModelError

__all__ = ["ENCODERS", "RUNNABLE", "check_runnable"]

ENCODERS = frozenset({"bert"})
"""Those of `RUNNABLE` that only encode: they give hidden states, neither scores nor new tokens."""
RUNNABLE = ENCODERS | {
    "bloom",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
}
"""transformers' ``model_type`` of the models that stages are built of, each held to the whole model by tests."""


def check_runnable(config: Mapping[str, Any], *, encodes: bool = False) -> None:
    """Refuses a model that can be planned, but not run.

    Args:
        config: The JSON object of a ``config.json``.
        encodes: Whether hidden states are all that is asked for, so that an encoder will do.

    Raises:
        UnsupportedModelError: If its family is not among those that stages can be built of; names them.
    """
    model_type = config.get("model_type")
    if model_type not in RUNNABLE:
        raise UnsupportedModelError(
            f"model_type {model_type!r} can be planned, but not run by lp-plugin; those that run are "
            f"{', '.join(sorted(RUNNABLE))}. Other engines take its plan: lp-plugin export."
        )
    if model_type in ENCODERS and not encodes:
        raise UnsupportedModelError(
            f"model_type {model_type!r} can be planned, but not run for scores or new tokens: it only encodes. "
            "PipelinedModel.embed() gives its hidden states."
        )
