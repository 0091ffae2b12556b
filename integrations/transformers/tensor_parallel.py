"""Tensor parallelism inside a stage, by transformers' own plan.

transformers says of each family which modules are cut by columns and which by rows (``model.tp_plan``); here they are
cut so, on the "tp" dimension of a device mesh. Parameters become plain tensors of this rank's part, and the modules'
outputs are summed or gathered where the plan says so, so that what enters and leaves a stage is whole on every rank.
The embedding is always cut over the vocabulary. Written for inference: gradients don't cross the collectives.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from lp_plugin.errors import UnsupportedModelError, WorkloadError
from lp_plugin.integrations.transformers.decoder import DecoderStage

__all__ = ["Cut", "check_shardable", "shard_stage", "whole_tensor"]

_GATHERED = ("colwise_gather_output", "colwise_rep")
_COLUMNS = ("colwise", *_GATHERED)
_SPLIT = ("rowwise_split_input", "rowwise_rep")
_ROWS = ("rowwise", *_SPLIT)
_PACKED = "packed_colwise"
_EXPERTS = "moe_tp_experts"
_WHOLE = ("replicated_with_grad_allreduce", "replicate")
_KEYS = ("k_proj", "query_key_value")
"""Projections that make the keys of attention; where they are cut by columns, each rank has whole heads."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a tensor is cut into the parts of a group's ranks, as `torch.chunk` would."""

    dim: int
    """Dimension that is cut."""
    size: int
    """Its length in the whole tensor."""
    packed: int
    """Equal blocks along it, each of which is cut: 2 for a gate and an up projection in one tensor."""
    rank: int
    """Whose part this is."""
    num_ranks: int
    """Parts."""
    group: Any
    """The ranks' process group."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Half-open ranges of the whole dimension that this rank holds, one per packed block."""
        width = self.size // self.packed
        chunk = -(-width // self.num_ranks)
        low, high = (min(chunk * number, width) for number in (self.rank, self.rank + 1))
        return tuple((block * width + low, block * width + high) for block in range(self.packed))

    @property
    def length(self) -> int:
        """Of the dimension in this rank's part."""
        return sum(high - low for low, high in self.spans)

    def of(self, rank: int) -> Cut:
        """The part of another rank."""
        return dataclasses.replace(self, rank=rank)


def shard_stage(stage: DecoderStage, mesh: DeviceMesh) -> None:
    """Cuts a stage's modules for this rank; loading then reads this rank's part alone.

    Args:
        stage: On the meta device.
        mesh: With a dimension named "tp".

    Raises:
        UnsupportedModelError: If transformers has no plan for the family, or a plan with a style we don't know.
        WorkloadError: If heads or widths can't be shared out among the ranks.
    """
    if mesh["tp"].size() > 1:
        _shard(stage, _Ranks(mesh["tp"].get_group(), mesh["tp"].get_local_rank(), mesh["tp"].size()))


def check_shardable(stage: DecoderStage, number: int) -> None:
    """What `shard_stage` would refuse, found out in one process; the stage is of no use afterwards.

    Args:
        stage: On the meta device.
        number: Ranks that are to share it.

    Raises:
        UnsupportedModelError, WorkloadError: As `shard_stage`.
    """
    if number > 1:
        _shard(stage, _Ranks(None, 0, number))


def _shard(stage: DecoderStage, ranks: _Ranks) -> None:
    model, plan = stage.model, dict(stage.model.tp_plan or {})
    if not plan:
        raise UnsupportedModelError(
            f"transformers has no tensor-parallel plan for model_type {stage.config.model_type!r}; "
            "run it with --tensor-parallel 1 and more stages."
        )
    _check_heads(stage, plan, ranks.number)
    if stage.has_embedding:
        table, name = model.get_input_embeddings(), f"{stage.decoder_name}.{stage.embedding_name}"
        stage.cuts[name] = ranks.cut(table, "weight", 0, uneven=True)
        table.padding_idx = None  # a row of the whole table, which may lie beyond this part; for gradients alone
        table.forward = _looked_up(table, stage.cuts[name])
    for name, module in list(model.named_modules()):
        if name and module is not model.get_input_embeddings():
            _shard_module(stage, name, module, plan, ranks)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ranks:
    """The group that shares a stage."""

    group: Any
    rank: int
    number: int

    def cut(self, module: nn.Module, name: str, dim: int, *, packed: int = 1, uneven: bool = False) -> Cut:
        """Replaces a parameter by this rank's part of it, still without memory."""
        whole = module.get_parameter(name)
        size = whole.shape[dim]
        if not uneven and size % (self.number * packed):
            raise WorkloadError(
                f"{type(module).__name__}.{name} is {size // packed} wide, which {self.number} tensor-parallel ranks "
                f"can't share evenly; choose a divisor of {size // packed}."
            )
        cut = Cut(dim=dim, size=size, packed=packed, rank=self.rank, num_ranks=self.number, group=self.group)
        part = whole.narrow(dim, 0, cut.length)
        setattr(module, name, nn.Parameter(torch.empty_like(part), requires_grad=False))
        return cut


def whole_tensor(part: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The whole tensor on every rank of the group, from the ranks' parts; collective.

    Args:
        part: This rank's.
        cut: How it was cut.
    """
    parts = [cut.of(rank) for rank in range(cut.num_ranks)]
    shape = list(part.shape)
    shape[cut.dim] = parts[0].length
    own = part.new_zeros(shape)
    own.narrow(cut.dim, 0, cut.length).copy_(part)
    received = [torch.empty_like(own) for _ in parts]
    dist.all_gather(received, own, group=cut.group)
    shape[cut.dim] = cut.size
    whole = part.new_empty(shape)
    for each, tensor in zip(parts, received, strict=True):
        done = 0
        for low, high in each.spans:
            whole.narrow(cut.dim, low, high - low).copy_(tensor.narrow(cut.dim, done, high - low))
            done += high - low
    return whole


def _check_heads(stage: DecoderStage, plan: dict[str, str], number: int) -> None:
    """Where keys are cut by columns, heads have to come out whole."""
    cut = any(name.rsplit(".", 1)[-1] in _KEYS and style == "colwise" for name, style in plan.items())
    heads = int(stage.config.num_attention_heads)
    keys = int(getattr(stage.config, "num_key_value_heads", None) or heads)
    for what, count in (("attention heads", heads), ("key and value heads", keys)) if cut else ():
        if count % number:
            raise WorkloadError(
                f"{count} {what} can't be shared evenly by {number} tensor-parallel ranks; "
                f"choose a divisor of {count}, and more stages."
            )


def _shard_module(stage: DecoderStage, name: str, module: nn.Module, plan: dict[str, str], ranks: _Ranks) -> None:
    """Cuts what one module holds itself, and makes its output whole again if the plan says so."""
    style = plan.get(_wildcard(name))
    for key, parameter in list(module.named_parameters(recurse=False)):
        own = plan.get(_wildcard(f"{name}.{key}"), style)
        dim = None if own is None else _dimension(own, parameter)
        if dim is not None:
            head = module is stage.model.get_output_embeddings()
            packed = 2 if own == _PACKED else 1
            stage.cuts[f"{name}.{key}"] = ranks.cut(module, key, dim, packed=packed, uneven=head)
    if style == _EXPERTS and any(cut.startswith(f"{name}.") for cut in stage.cuts):
        module.forward = _summed(module.forward, ranks.group)
    cut = stage.cuts.get(f"{name}.weight")
    if cut is None:
        return
    if style in _GATHERED:
        module.forward = _gathered(module.forward, cut)
    elif style in _ROWS:
        module.forward = _row_product(module, cut, split=style in _SPLIT)


def _dimension(style: str, parameter: torch.Tensor) -> int | None:
    """Which dimension of a parameter is cut; None for none."""
    if style in (*_COLUMNS, _PACKED):
        return max(parameter.dim() - 2, 0)
    if style in _ROWS:
        return parameter.dim() - 1 if parameter.dim() > 1 else None
    if style in (*_WHOLE, _EXPERTS):
        return None
    raise UnsupportedModelError(
        f"transformers' plan cuts a module by {style!r}, which is not among the styles known here: "
        f"{', '.join((*_COLUMNS, *_ROWS, _PACKED, _EXPERTS, *_WHOLE))}; run it with --tensor-parallel 1."
    )


def _wildcard(name: str) -> str:
    """A module's name as plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _looked_up(table: nn.Module, cut: Cut) -> Callable[[torch.Tensor], torch.Tensor]:
    """An embedding's rows from whichever rank holds them."""
    original, ((low, high),) = table.forward, cut.spans

    def forward(ids: torch.Tensor) -> torch.Tensor:
        elsewhere = (ids < low) | (ids >= high)
        rows = original((ids - low).masked_fill(elsewhere, 0)).masked_fill(elsewhere.unsqueeze(-1), 0)
        dist.all_reduce(rows, group=cut.group)
        return rows

    return forward


def _gathered(original: Callable[[torch.Tensor], torch.Tensor], cut: Cut) -> Callable[[torch.Tensor], torch.Tensor]:
    """Columns of all ranks; short parts are filled up for the exchange."""
    chunk = cut.of(0).length

    def forward(value: torch.Tensor) -> torch.Tensor:
        own = original(value)
        own = functional.pad(own, (0, chunk - own.shape[-1])).contiguous()
        parts = own.new_empty(cut.num_ranks * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(parts, own, group=cut.group)
        return parts.view(cut.num_ranks, *own.shape).movedim(0, -2).flatten(-2)[..., : cut.size]

    return forward


def _row_product(linear: nn.Module, cut: Cut, *, split: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A product by rows, summed over the ranks, and then the bias; of a whole input each rank takes its columns."""
    ((low, high),) = cut.spans

    def forward(value: torch.Tensor) -> torch.Tensor:
        product = functional.linear(value[..., low:high] if split else value, linear.weight)
        dist.all_reduce(product, group=cut.group)
        return product if linear.bias is None else product + linear.bias

    return forward


def _summed(original: Callable[..., torch.Tensor], group: Any) -> Callable[..., torch.Tensor]:
    """A module whose output is this rank's part of a sum."""

    def forward(*values: Any, **named: Any) -> torch.Tensor:
        output = original(*values, **named)
        dist.all_reduce(output, group=group)
        return output

    return forward
