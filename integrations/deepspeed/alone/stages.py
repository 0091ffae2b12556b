"""Stages with random weights, of a model's layers or of equal copies of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.materialize import materialize, randomize
from lp_plugin.integrations.transformers.runnable import check_runnable
from lp_plugin.integrations.transformers.tensor_parallel import check_shardable

__all__ = ["read_mapping", "stage_of_copies", "stored_bytes"]

_GATHERED = "colwise_gather_output"
_SPLIT = "rowwise_split_input"


def read_mapping(config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of transformers from the JSON object of a ``config.json``.

    Raises:
        UnsupportedModelError: If its family can't be run.
    """
    check_runnable(config, encodes=True)
    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def stage_of_copies(
    config: PretrainedConfig,
    start: int,
    stop: int,
    *,
    copies: int = 1,
    halves: bool,
    tensor_parallel: int,
    device: torch.device,
    dtype: torch.dtype,
) -> DecoderStage:
    """A stage of layers, or of one several times, each copy with weights of its own, as one rank of a group holds it.

    Nothing is communicated: what other ranks would add or hand over is left out, or repeated where its width counts.

    Args:
        config: The whole model's configuration.
        start: The first layer.
        stop: One past the last; as ``start`` for a stage of no layers, which does what every pass does besides.
        copies: How often there is a stage's only block, or half of one.
        halves: Whether layers are numbered with attention and MLP apart.
        tensor_parallel: Ranks of the group.
        device: Where it will run.
        dtype: Precision.

    Returns:
        The stage with random weights.

    Raises:
        UnsupportedModelError, WorkloadError: If the layer can't be cut out, or shared by so many ranks.
    """
    stage = DecoderStage(config, start, stop, halves=halves)
    styles = {name: style for name, style in (stage.model.tp_plan or {}).items() if style in (_GATHERED, _SPLIT)}
    check_shardable(stage, tensor_parallel)
    if copies > 1:
        stage.repeat_block(copies)
    if tensor_parallel > 1:
        for name, module in stage.model.get_submodule(stage.blocks_name).named_modules():
            _stand_in(module, styles.get(f"{stage.blocks_name}.*.{name.partition('.')[2]}"), tensor_parallel)
    materialize(stage, device, dtype)
    randomize(stage)
    return stage.eval()


def stored_bytes(stage: DecoderStage) -> int:
    """Memory that parameters and buffers take."""
    tensors = (*stage.model.parameters(), *stage.model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stand_in(module: nn.Module, style: str | None, number: int) -> None:
    """Widths as they are where ranks gather an output, or take their part of an input."""
    if style == _GATHERED:
        module.register_forward_hook(lambda _, __, output: output.repeat_interleave(number, dim=-1))
    elif style == _SPLIT:
        module.register_forward_pre_hook(
            lambda _, inputs: (inputs[0][..., : inputs[0].shape[-1] // number], *inputs[1:])
        )
