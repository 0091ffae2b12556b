"""A sample micro-batch for ``profile``: as configured, or inferred from the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lp_plugin.errors import DeepSpeedConfigError
from lp_plugin.integrations.deepspeed.config import InputSpec, Settings
from lp_plugin.integrations.deepspeed.layers import counted_module, undisturbed_random

__all__ = ["sample_input"]


def sample_input(specs: Sequence[Any], settings: Settings, device: str) -> Any:
    """What the first layer takes for one micro-batch: a tensor, or a tuple of tensors.

    Raises:
        DeepSpeedConfigError: If nothing is configured and the first layers tell nothing.
    """
    configured = settings.section.input
    with undisturbed_random():
        if isinstance(configured, list):
            return tuple(_draw(spec, device, settings.dtype) for spec in configured)
        return _draw(configured or _inferred(specs, settings), device, settings.dtype)


def _draw(spec: InputSpec, device: str, dtype: str) -> torch.Tensor:
    """Random values; floating-point ones in the engine's precision where it is not float32, as DeepSpeed casts them."""
    if spec.dtype == "int64":
        return torch.randint(spec.high, tuple(spec.shape), device=device)
    chosen = spec.dtype if dtype == "float32" else dtype
    return torch.randn(tuple(spec.shape), device=device, dtype=getattr(torch, chosen))


def _inferred(specs: Sequence[Any], settings: Settings) -> InputSpec:
    """From the first embedding or linear module of the first layer that has one."""
    for spec in specs:
        with undisturbed_random():
            layer = counted_module(spec)
        modules = layer.modules() if isinstance(layer, torch.nn.Module) else ()
        for module in modules:
            if isinstance(module, torch.nn.Embedding):
                shape = [settings.micro_batch, settings.section.sequence]
                return InputSpec(shape=shape, dtype="int64", high=module.num_embeddings)
            if isinstance(module, torch.nn.Linear):
                tokens = [settings.section.sequence] if settings.section.sequence > 1 else []
                return InputSpec(shape=[settings.micro_batch, *tokens, module.in_features])
    raise DeepSpeedConfigError(
        'partition_method "profile" can\'t infer what the first layer takes; describe one micro-batch under '
        '"lp_plugin": {"input": {"shape": [...], "dtype": "float32" or "int64"}} in the DeepSpeed configuration.'
    )
