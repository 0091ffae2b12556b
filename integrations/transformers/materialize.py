"""Memory for a stage that is still on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from lp_plugin.errors import UnsupportedModelError
from lp_plugin.integrations.transformers.decoder import DecoderStage

__all__ = ["materialize", "randomize"]


def materialize(stage: DecoderStage, device: torch.device | str, dtype: torch.dtype, *, tie: bool = False) -> None:
    """Gives every tensor memory on ``device``: parameters uninitialised, computed buffers recomputed.

    Args:
        stage: On the meta device.
        device: Where to.
        dtype: Precision of the parameters but those that transformers keeps in float32.
        tie: Whether head and embedding, if both are here, share their matrix.

    Raises:
        UnsupportedModelError: If a buffer that no checkpoint holds can't be recomputed.
    """
    model = stage.model
    kept = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        precision = next((kept[pattern] for pattern in kept if re.search(pattern.replace("*", ".*"), name)), dtype)
        parameter.data = parameter.data.to(precision)
    shared = tie and stage.has_embedding and stage.has_head
    if shared:  # no memory for a matrix that is given up at once
        model.get_output_embeddings().weight = nn.Parameter(torch.empty(0, device="meta"))
    model.to_empty(device=device)
    if shared:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _recompute_buffers(model)


def randomize(stage: DecoderStage, std: float = 0.02) -> None:
    """Random weights, for timing a layer whose values don't matter.

    Args:
        stage: Materialised.
        std: Standard deviation of the matrices; vectors become ones.
    """
    for parameter in stage.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        else:
            nn.init.ones_(parameter)


def _recompute_buffers(model: nn.Module) -> None:
    """Fills what no checkpoint holds, by transformers' own initialisation; parameters stay as they are."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        buffers = list(_computed(module))
        for _, buffer in buffers:
            buffer.fill_(_mark(buffer))
        if buffers:
            model._init_weights(module)
        for name, buffer in buffers:
            left = buffer.isnan() if buffer.is_floating_point() else buffer == _mark(buffer)
            if left.any():
                raise UnsupportedModelError(
                    f"{type(module).__name__} holds the buffer {name!r}, which no checkpoint has and transformers "
                    "doesn't recompute; this model can't be loaded stage by stage."
                )


def _computed(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The module's own buffers that are not part of a checkpoint."""
    for name in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers[name]
        if buffer is not None:
            yield name, buffer


def _mark(buffer: torch.Tensor) -> float | int:
    """A value that no computed buffer has."""
    return float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
