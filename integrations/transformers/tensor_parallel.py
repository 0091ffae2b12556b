"""Tensor parallelism inside a stage, by transformers' own plan.

transformers says of each family which modules are cut by columns and which by rows (``model.tp_plan``), and its
parallel styles run them on the "tp" dimension of a device mesh: they sum or gather outputs, so that what enters and
leaves a stage is whole on every rank. Cut here are the parameters, into plain tensors of this rank's part: loading
reads that part alone, and DeepSpeed meets nothing but tensors; for inference the styles take them as they are. The
embedding is always cut over the vocabulary, which torch's DTensor knows how to look up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, AllReduceParallel

from lp_plugin.errors import UnsupportedModelError, WorkloadError
from lp_plugin.integrations.transformers.decoder import DecoderStage

__all__ = ["Cut", "check_shardable", "shard_stage", "whole_tensor"]

_COLUMNS = ("colwise", "colwise_gather_output", "colwise_rep")
_PLAIN = "colwise"
_ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
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
    mesh: DeviceMesh | None
    """The ranks; None if they are only thought of."""

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
        _shard(stage, _Ranks(mesh["tp"], mesh["tp"].get_local_rank(), mesh["tp"].size()))


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
        if ranks.mesh is not None:
            table.forward = _looked_up(table, stage.cuts[name])
    for name, module in list(model.named_modules()):
        if name and module is not model.get_input_embeddings():
            _shard_module(stage, name, module, plan, ranks)


@dataclasses.dataclass(frozen=True, slots=True)
class _Ranks:
    """The group that shares a stage."""

    mesh: DeviceMesh | None
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
        cut = Cut(dim=dim, size=size, packed=packed, rank=self.rank, num_ranks=self.number, mesh=self.mesh)
        part = whole.narrow(dim, 0, cut.length)
        setattr(module, name, nn.Parameter(torch.empty_like(part), requires_grad=False))
        return cut


def whole_tensor(part: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The whole tensor on every rank of the group, from the ranks' parts; collective.

    Args:
        part: This rank's.
        cut: How it was cut.
    """
    return torch.cat([_shared(block, cut).full_tensor() for block in part.chunk(cut.packed, cut.dim)], cut.dim)


def _shared(block: torch.Tensor, cut: Cut) -> DTensor:
    """This rank's part of one packed block, as torch's tensor over the ranks."""
    shape = list(block.shape)
    shape[cut.dim] = cut.size // cut.packed
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        block.contiguous(), cut.mesh, [Shard(cut.dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )


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
    """Cuts what one module holds itself, and lets transformers run it so."""
    style = plan.get(_wildcard(name))
    if style in _COLUMNS and ranks.mesh is not None:
        _check_style(style, name, module, ranks.mesh)
    is_cut = False
    for key, parameter in list(module.named_parameters(recurse=False)):
        own = plan.get(_wildcard(f"{name}.{key}"), style)
        dim = None if own is None else _dimension(own, parameter)
        if dim is not None:
            head = module is stage.model.get_output_embeddings()
            packed = 2 if own == _PACKED else 1
            stage.cuts[f"{name}.{key}"] = ranks.cut(module, key, dim, packed=packed, uneven=head)
            is_cut = True
    if not is_cut or style is None or ranks.mesh is None:
        return
    if style == _PLAIN and type(module) is nn.Linear:
        return  # without gradients the style changes neither what comes in nor what goes out
    if style == _EXPERTS:
        AllReduceParallel().install_forward(module, ranks.mesh)  # each rank has a part of every expert
    else:
        ALL_PARALLEL_STYLES[style].install_forward(module, ranks.mesh)


def _check_style(style: str, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """What transformers' style itself refuses; before 5.23, a gathered output that ranks can't share evenly."""
    for key in module._parameters:
        try:
            ALL_PARALLEL_STYLES[style].validate_param(module, key, mesh, parameter_name=f"{name}.{key}")
        except ValueError as error:
            raise WorkloadError(f"{error} Choose a divisor, or install a newer transformers.") from None


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
    """An embedding's rows from whichever rank holds them, and what the embedding makes of them."""
    original = table.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        part = table.weight
        table._parameters["weight"] = _shared(part, cut)
        try:
            rows = original(DTensor.from_local(ids, cut.mesh, [Replicate()], run_check=False))
        finally:
            table._parameters["weight"] = part
        return rows.redistribute(placements=[Replicate()]).to_local()

    return forward
