"""What one layer of a model costs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lp_plugin.errors import ModelConfigError
from lp_plugin.quantity import shown

__all__ = ["FieldRule", "LayerCost", "check_fields", "check_layers", "field_rules"]

FieldRule = tuple[str, Any, tuple[type, ...], str]
"""Name and default of a field, the types that it may have, and its bound in words."""

_LARGEST = sys.float_info.max  # of any cost: it is finite


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one layer costs, per token where it grows with the tokens of a micro-batch."""

    name: str
    """Shown in tables, e.g. ``block 3``."""
    kind: str = "layer"
    """``embedding``, ``block``, ``attention``, ``mlp``, ``norm``, ``head``, or ``layer`` for anything else."""
    block: int | None = None
    """Number of the transformer block that the layer is, or is a part of; None for embedding, norm, head.
    A decoder's go on from its encoder's."""
    parameters: int = 0
    """Number of parameters, shared ones included."""
    weight_bytes: int = 0
    """Bytes of the parameters as stored on the device, shared ones included."""
    shared_key: str | None = None
    """Layers with the same key in one stage hold the shared weights once."""
    shared_bytes: int = 0
    """The part of ``weight_bytes`` that layers of the same ``shared_key`` share."""
    weight_traffic_bytes: int = 0
    """Weight bytes read for every micro-batch, however small (0 for a table look-up)."""
    traffic_bytes_per_token: float = 0.0
    """Activation bytes read and written per token, each operation's inputs and outputs counted once."""
    flops_per_token: float = 0.0
    """Forward FLOPs per token in matrix products with weights (2 per weight)."""
    flops_per_pair: float = 0.0
    """Forward FLOPs per (query, key) pair that attention looks at."""
    flops_per_cross_pair: float = 0.0
    """Forward FLOPs per (query, source token) pair in cross-attention."""
    window: int | None = None
    """Keys a query can look back on, itself included; None for all. Not causal: half of it to each side."""
    causal: bool = True
    """False: a query sees the keys after it, too, as in encoders."""
    runs_once: bool = False
    """An encoder's layer: runs before decoding and costs no time in a decode step; its weights stay."""
    output_bytes_per_token: float = 0.0
    """Bytes handed to the next layer per token."""
    buffer_bytes_per_token: float = 0.0
    """Largest sum of temporary tensors alive at once inside the layer, per token."""
    kv_bytes_per_token: int = 0
    """Bytes that the KV cache keeps per token of context."""
    kv_window: int | None = None
    """Positions that the KV cache keeps at most, as transformers' own cache does; None for all."""
    expert_bytes: int = 0
    """The part of ``weight_bytes`` in routed experts, all of them; not in ``weight_traffic_bytes``."""
    expert_parameters: int = 0
    """The part of ``parameters`` in routed experts, all of them."""
    num_experts: int = 0
    """Routed experts of the layer."""
    experts_per_token: int = 0
    """Routed experts that each token passes."""
    saved_bytes_per_token: float = 0.0
    """What autograd keeps of the layer for its backward pass, per token, without checkpointing."""
    num_all_reduces: int = 0
    """All-reduces of one forward pass of a tensor-parallel layer; 0 if it is not sharded."""
    all_reduce_bytes_per_token: float = 0.0
    """Bytes per token of all of them together: the tensors' own size, before any factor of the algorithm."""
    seconds: float | None = None
    """Measured forward seconds of one micro-batch; replaces the roofline of `lp_plugin.solver.layer_table`."""
    resident_seconds: float | None = None
    """The same with weights and KV cache in the device's first tier, used where a stage's working set fits it; None
    means no faster. Not used in training, nor without ``seconds``, which it never exceeds."""
    backward_seconds: float | None = None
    """Measured backward seconds; None means twice the forward ones."""

    @property
    def anywhere(self) -> LayerCost:
        """Without what tells of its place: the same for all layers of a kind that cost the same."""
        return replace(self, name=self.kind, block=None)


_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "bool": ((bool,), "True or False"),
    "int": ((int,), f"a whole number of 0 to {_LARGEST:g}"),
    "float": ((int, float), f"a number of 0 to {_LARGEST:g}"),
}


def field_rules(kind: type) -> tuple[FieldRule, ...]:
    """What `check_fields` asks of a dataclass: name, default, types and bound of its plain fields."""
    plain = [(field, str(field.type).removesuffix(" | None")) for field in fields(kind)]
    return tuple((field.name, field.default, *_KINDS[name]) for field, name in plain if name in _KINDS)


def check_fields(what: str, item: Any, rules: Sequence[FieldRule]) -> None:
    """Refuses values of a wrong type, and numbers that are no finite amounts; defaults are sound.

    Raises:
        ModelConfigError: Naming the item, which begins with ``what``, and the field.
    """
    for field, default, types, bound in rules:
        value = getattr(item, field)
        if value is default:
            continue
        sound = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not sound or (int in types and not 0 <= value <= _LARGEST):
            raise ModelConfigError(f"{what} {shown(item.name)}: {field} is {shown(value)}; it must be {bound}.")


_RULES = field_rules(LayerCost)


def check_layers(layers: Sequence[LayerCost]) -> None:
    """Refuses costs that are no finite amounts, fields of a wrong type, and names that come twice.

    Raises:
        ModelConfigError: Naming the layer and the field.
    """
    for position, layer in enumerate(layers):
        if not isinstance(layer, LayerCost):
            raise ModelConfigError(f"layers holds {shown(layer)} at position {position}; give a LayerCost for each.")
        check_fields("layer", layer, _RULES)
    for layer in layers:
        if layer.expert_bytes and not 1 <= layer.experts_per_token <= layer.num_experts:
            raise ModelConfigError(
                f"layer {shown(layer.name)}: experts_per_token is {layer.experts_per_token} of num_experts "
                f"{layer.num_experts}; a layer with expert_bytes sends each token to 1 or more, at most to all."
            )
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ModelConfigError(f"the name {shown(twice)} stands for two layers; give each layer a name of its own.")
