"""Loading a stage: its own tensors alone, straight to its device, in pieces."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lp_plugin.integrations.transformers.checkpoint import new_buffer, read_headers
from lp_plugin.integrations.transformers.conversion import Layout, Piece, lay_out
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.materialize import materialize
from lp_plugin.integrations.transformers.runnable import ENCODERS
from lp_plugin.integrations.transformers.tensor_parallel import Cut

__all__ = ["check_checkpoint", "is_tied", "load_stage"]


def check_checkpoint(config: PretrainedConfig, directory: str | Path, *, head: bool = True) -> None:
    """Refuses weights that don't fill the model; reads headers only, so that every rank finds the same.

    Args:
        config: The whole model's configuration.
        directory: The model directory.
        head: Whether the model is to have its head; without it, the checkpoint may lack it.

    Raises:
        WeightsError: If there are no safetensors; if a file is missing or truncated; if a tensor is missing,
            unexpected, of another shape or in a precision that can't be loaded. Names tensor and file.
    """
    _layout(config, directory, head=head)


def load_stage(stage: DecoderStage, directory: str | Path, device: torch.device | str, dtype: torch.dtype) -> None:
    """Materialises a stage and fills it from the checkpoint; of the rest of the checkpoint only headers are read.

    Args:
        stage: On the meta device, cut for this rank if it is to be.
        directory: The model directory.
        device: Where the stage will run.
        dtype: Precision to convert to.

    Raises:
        WeightsError: As `check_checkpoint`, which looks at the whole model; or if a file becomes unreadable.
    """
    layout = _layout(stage.config, directory, head=stage.with_head)
    names = {name: stage.checkpoint_name(name) for name in stage.model.state_dict()}
    stage.tied = stage.tied and all(_same(layout, *pair) for pair in layout.tied.items() if pair[0] in names.values())
    materialize(stage, device, dtype, tie=stage.tied)
    filled: set[int] = set()
    buffer = new_buffer()
    for name, tensor in stage.model.state_dict(keep_vars=True).items():
        if id(tensor) in filled:
            continue
        filled.add(id(tensor))
        for piece in layout.pieces[names[name]]:
            _fill(tensor.data, piece, stage.cuts.get(name), buffer)
    stage.model._weight_conversions = list(layout.conversions)  # what `revert_weight_conversion` reverts


def is_tied(config: PretrainedConfig, directory: str | Path) -> bool:
    """Whether head and embedding are one matrix: as configured, unless the checkpoint holds two different ones.

    Args:
        config: The whole model's configuration.
        directory: The model directory.

    Raises:
        WeightsError: As `check_checkpoint`.
    """
    if not config.tie_word_embeddings:
        return False
    layout = _layout(config, directory, head=True)
    return all(_same(layout, *pair) for pair in layout.tied.items())


def _layout(config: PretrainedConfig, directory: str | Path, *, head: bool) -> Layout:
    """How the checkpoint fills the whole model."""
    model = _whole(config)
    without: list[str] = []
    if not head and model.get_output_embeddings() is not None:
        output = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is output)
        without = [f"{name}.{key}" for key in output._parameters]
    return lay_out(model, read_headers(directory), Path(directory), without=without)


def _whole(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model, without memory."""
    with torch.device("meta"):
        if config.model_type in ENCODERS:
            return AutoModel.from_config(config, add_pooling_layer=False, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _same(layout: Layout, head: str, embedding: str) -> bool:
    """Whether tied tensors are one: a checkpoint may hold both, and transformers ties them only if they are equal."""
    first, second = layout.pieces[head], layout.pieces[embedding]
    return first is second or all(a.stored.same_values(b.stored) for a, b in zip(first, second, strict=True))


def _fill(target: torch.Tensor, piece: Piece, cut: Cut | None, buffer: torch.Tensor) -> None:
    """Copies what a piece has for this rank's part of a tensor."""
    dim = cut.dim if cut else 0
    spans = cut.spans if cut else ((0, target.shape[0]),)
    first = piece.start[dim]
    done = 0
    for low, high in spans:
        begin, end = max(low, first), min(high, first + piece.shape[dim])
        if begin < end:
            view = target.narrow(dim, done + begin - low, end - begin)
            for other, (start, length) in enumerate(zip(piece.start, piece.shape, strict=True)):
                view = view if other == dim else view.narrow(other, start, length)
            _copy(view, piece, buffer, dim=dim, start=begin - first)
        done += high - low


def _copy(view: torch.Tensor, piece: Piece, buffer: torch.Tensor, *, dim: int, start: int) -> None:
    """Reads into a part of a tensor; a stacked piece lacks the dimension that it is stacked along."""
    stacked = piece.stacked
    if stacked is None:
        piece.stored.copy_to(view, buffer, dim=dim, start=start)
    elif stacked == dim:
        piece.stored.copy_to(view.squeeze(stacked), buffer)
    else:
        piece.stored.copy_to(view.squeeze(stacked), buffer, dim=dim - (dim > stacked), start=start)
