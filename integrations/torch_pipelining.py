"""torch.distributed.pipelining: a JSON list with the module names of each stage, and modules for ``PipelineStage``.

The text is ``[["model.embed_tokens", "model.layers.0"], ["model.layers.1", "model.norm", "lm_head"]]``, the form in
which torchtitan takes ``module_fqns_per_model_part``. torch itself takes modules::

    stage = PipelineStage(stage_module(model, boundaries, rank), rank, num_stages, device)
    ScheduleGPipe(stage, num_micro_batches).step(ids)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import NamedLayer, PartitionFormat, check_boundaries, read_json, shown
from lp_plugin.integrations.module_names import boundaries_from_places, check_names, module_names, units_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lp_plugin.integrations.transformers.decoder import DecoderStage

__all__ = ["FORMAT", "stage_module"]

_EXPECTED = 'a JSON list with a list of module names per stage, e.g. [["model.embed_tokens", "model.layers.0"], ...]'


def stage_module(model: PreTrainedModel, boundaries: Sequence[int], stage: int) -> DecoderStage:
    """One stage of a causal language model, with its own copy of that stage's tensors alone.

    Args:
        model: The whole model with its weights; stays as it is.
        boundaries: Over embedding, blocks, norm and head, as in a plan of whole layers.
        stage: Which stage.

    Returns:
        Takes token ids on the first stage, else the hidden state; gives logits on the last. On the model's device, in
        its precision; a tied head has a table of its own wherever the embedding is on another stage.

    Raises:
        PartitionFormatError: If the boundaries are not those of this model, or there is no such stage.
        UnsupportedModelError: If the model can't be cut.
    """
    from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers  # noqa: PLC0415 - imports torch
    from lp_plugin.integrations.transformers.materialize import materialize  # noqa: PLC0415 - imports torch

    check_boundaries(boundaries, num_layers(model.config))
    if not 0 <= stage < len(boundaries) - 1:
        raise PartitionFormatError(f"there is no stage {stage}; the boundaries make stages 0 to {len(boundaries) - 2}.")
    part = DecoderStage(model.config, boundaries[stage], boundaries[stage + 1])
    materialize(part, model.device, model.dtype, tie=part.tied)
    whole = model.state_dict(keep_vars=True)
    for name, tensor in part.model.state_dict(keep_vars=True).items():
        source = whole[part.checkpoint_name(name)]
        tensor.data.copy_(source.data)
        tensor.requires_grad_(source.requires_grad)
    return part.train(model.training)


def _write(layers: Sequence[NamedLayer], boundaries: Sequence[int], model_type: str | None) -> str:
    stages: list[list[str]] = [[]]
    for unit in units_of(layers, model_type):
        if unit.start == boundaries[len(stages)]:
            stages.append([])
        stages[-1] += unit.modules
    stages[0] += module_names(model_type).weightless
    return json.dumps(stages)


def _read(text: str, layers: Sequence[NamedLayer], model_type: str | None) -> tuple[int, ...]:
    stages = read_json(text, _EXPECTED)
    if not isinstance(stages, list):
        raise PartitionFormatError(f"{shown(stages)} is a JSON {type(stages).__name__}; give {_EXPECTED}.")
    places: dict[str, int] = {}
    for stage, names in enumerate(stages):
        if not isinstance(names, list):
            raise PartitionFormatError(f"stage {stage} is {shown(names)}; give {_EXPECTED}.")
        for name in names:
            if not isinstance(name, str):
                raise PartitionFormatError(f"{shown(name)} on stage {stage} is no module name; give {_EXPECTED}.")
            if name in places:
                raise PartitionFormatError(
                    f"{shown(name)} is on stage {places[name]} and on stage {stage}; a module is on one stage."
                )
            places[name] = stage
    boundaries, found = boundaries_from_places(places, layers, model_type)
    if found != tuple(range(len(stages))):
        missing = next((stage for stage in range(len(stages)) if stage not in found), None)
        problem = "are not in model order" if missing is None else f"leave stage {missing} without a layer"
        raise PartitionFormatError(
            f"the {len(stages)} lists {problem}; give each stage its modules, in the order that the model runs them."
        )
    return boundaries


FORMAT = PartitionFormat(name="torch", cuts="whole layers", check=check_names, write=_write, read=_read)
"""Module names per stage."""
