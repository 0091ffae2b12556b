"""Logits -> log-likelihood of each document."""

from __future__ import annotations

import torch
from torch.nn import functional

from lp_plugin.score.batches import IGNORED

__all__ = ["log_likelihoods"]


def log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Natural-log likelihood of each row, in float32 per token and float64 per sum.

    Args:
        logits: [rows, length, vocabulary].
        labels: The token that follows each position; [rows, length], `IGNORED` where none is scored.

    Returns:
        [rows], float64.
    """
    per_token = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -per_token.view(labels.shape).double().sum(dim=1)
