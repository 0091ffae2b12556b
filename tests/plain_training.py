"""What training comes to, by torch and transformers alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def plain_losses(
    directory: Path, micro_batches: Iterator[torch.Tensor], *, steps: int, accumulation: int
) -> list[float]:
    """Of training without a pipeline; DeepSpeed's Adam decays weights by 0.01, its engine clips norms to 1.

    Args:
        directory: Of the model.
        micro_batches: Token ids of each.
        steps: How many.
        accumulation: Micro-batches of a step.
    """
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    found = []
    for _ in range(steps):
        data = itertools.islice(micro_batches, accumulation)
        step = [model(tokens, labels=tokens, use_cache=False).loss / accumulation for tokens in data]
        for loss in step:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(float(loss.detach()) for loss in step))
    return found
