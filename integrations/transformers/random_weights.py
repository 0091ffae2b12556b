"""The same random model however it is cut: for measurements, where weights need no meaning.

Every tensor is drawn whole from a seed of its own, made of its name in the whole model; a rank keeps its part.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.materialize import materialize
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.integrations.transformers.tensor_parallel import Cut

__all__ = ["RandomPipelineModule", "fill_randomly"]

_STD = 0.02
"""Standard deviation of matrices; what most models are initialised with."""


class RandomPipelineModule(HFPipelineModule):
    """An `HFPipelineModule` of a directory with a ``config.json`` alone: weights are random.

    Args:
        directory: With the configuration.
        seed: Of the weights; ranks, cuts and numbers of processes make no difference to the model.
        arguments: As for `HFPipelineModule`.
    """

    def __init__(self, directory: Any, *, seed: int = 0, **arguments: Any) -> None:
        self._lp_seed = seed
        super().__init__(directory, **arguments)

    def _check_files(self, head: bool) -> None:
        del head  # there are none

    def _load(self, stage: DecoderStage) -> None:
        materialize(stage, self.device, self.torch_dtype, tie=stage.tied)
        fill_randomly(stage, self._lp_seed)


def fill_randomly(stage: DecoderStage, seed: int) -> None:
    """Fills a stage's tensors: matrices by normal numbers of standard deviation 0.02, vectors by ones.

    Args:
        stage: Materialised, cut for this rank if it is to be.
        seed: Of the whole model.
    """
    head = f"{stage.head_name}.weight"
    filled: set[int] = set()
    for name, tensor in stage.model.state_dict(keep_vars=True).items():
        if id(tensor) in filled:
            continue
        filled.add(id(tensor))
        if tensor.dim() < 2:
            tensor.data.fill_(1)
            continue
        known = stage.checkpoint_name(name)
        if stage.tied and name == head:
            known = ".".join(part for part in (stage.decoder_name, stage.embedding_name) if part)
        _fill(tensor.data, stage.cuts.get(name), f"{seed}/{known}")


def _fill(target: torch.Tensor, cut: Cut | None, key: str) -> None:
    """This rank's part of a random matrix."""
    generator = torch.Generator(target.device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    if cut is None:
        target.normal_(std=_STD, generator=generator)
        return
    shape = list(target.shape)
    shape[cut.dim] = cut.size
    whole = torch.empty(shape, dtype=target.dtype, device=target.device).normal_(std=_STD, generator=generator)
    parts = [whole.narrow(cut.dim, low, high - low) for low, high in cut.spans]
    target.copy_(parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim))
