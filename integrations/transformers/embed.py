"""Embeddings: the mean of the final hidden state over a text's tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lp_plugin.integrations.transformers.decoder import DecoderStage

__all__ = ["mean_of_tokens", "without_head"]


def mean_of_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over each row's tokens, in float32.

    Args:
        hidden: [rows, length, width].
        mask: 1 for tokens, 0 for padding; [rows, length], a token at least in each row.

    Returns:
        float32 [rows, width].
    """
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


@contextlib.contextmanager
def without_head(stage: DecoderStage) -> Iterator[None]:
    """Inside, the last stage gives the final hidden state, as one that was built without a head."""
    has_head = stage.has_head
    stage.has_head = False
    try:
        yield
    finally:
        stage.has_head = has_head
