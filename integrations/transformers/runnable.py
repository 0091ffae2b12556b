"""Which of the families that can be planned can also be run here; imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lp_plugin.errors import UnsupportedModelError

__all__ = ["RUNNABLE", "check_runnable"]

RUNNABLE = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "starcoder2"})
"""transformers' ``model_type`` of the decoders that stages are built of, each held to the whole model by tests."""


def check_runnable(config: Mapping[str, Any]) -> None:
    """Refuses a model that can be planned, but not run.

    Args:
        config: The JSON object of a ``config.json``.

    Raises:
        UnsupportedModelError: If its family is not among those that stages can be built of; names them.
    """
    model_type = config.get("model_type")
    if model_type not in RUNNABLE:
        raise UnsupportedModelError(
            f"model_type {model_type!r} can be planned, but not run by lp-plugin; those that run are "
            f"{', '.join(sorted(RUNNABLE))}. Other engines take its plan: lp-plugin export."
        )
