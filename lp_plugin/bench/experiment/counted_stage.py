"""A process that runs one stage while hardware counters are read: ``python -m ... STAGE.json``, started by ncu."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.lone_layers import read_mapping, stage_of_copies
from lp_plugin.measure.counters import PASSES, CountedStage

__all__ = ["run_passes"]


def run_passes(spec: CountedStage, device: torch.device) -> torch.Tensor:
    """Passes of micro-batches one after the other, all of them twice: the second time is marked to be counted.

    Returns:
        What the last one gave.
    """
    torch.manual_seed(0)
    stage = stage_of_copies(
        read_mapping(spec.config),
        spec.start,
        spec.stop,
        halves=spec.granularity == "sublayer",
        tensor_parallel=spec.tensor_parallel,
        device=device,
        dtype=getattr(torch, spec.dtype),
    )
    inputs = [_input(spec, stage, device) for _ in range(PASSES)]
    with torch.no_grad():
        for value in inputs:
            outputs = stage(value)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        for value in inputs:
            outputs = stage(value)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
    return outputs


def _input(spec: CountedStage, stage: DecoderStage, device: torch.device) -> torch.Tensor:
    """Random token ids that this rank holds, or a random activation."""
    shape = (spec.rows, spec.tokens)
    if stage.has_embedding:
        known = int(stage.model.get_input_embeddings().weight.shape[0])
        return torch.randint(known, shape, device=device)
    return torch.randn(*shape, int(stage.config.hidden_size), device=device).to(getattr(torch, spec.dtype))


if __name__ == "__main__":
    run_passes(CountedStage(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), torch.device("cuda"))
