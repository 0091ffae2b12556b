"""What is placed: layers, and what each of them costs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lp_plugin.architecture import DTYPE_BYTES, Architecture, read_architecture, read_config
from lp_plugin.errors import ModelConfigError
from lp_plugin.hardware import Device

__all__ = ["LayerCost", "ModelProfile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one layer costs, per token where it grows with the tokens of a micro-batch."""

    name: str
    """Shown in tables, e.g. ``block 3``."""
    kind: str = "layer"
    """``embedding``, ``block``, ``norm``, ``head``, or ``layer`` for anything else."""
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
    window: int | None = None
    """Keys a query can look back on, itself included; None for all."""
    output_bytes_per_token: float = 0.0
    """Bytes handed to the next layer per token."""
    buffer_bytes_per_token: float = 0.0
    """Largest sum of temporary tensors alive at once inside the layer, per token."""
    kv_bytes_per_token: int = 0
    """Bytes that the KV cache keeps per token of context."""
    seconds: float | None = None
    """Measured forward seconds of one micro-batch; replaces the roofline of `lp_plugin.cost`."""
    backward_seconds: float | None = None
    """Measured backward seconds; None means twice the forward ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model as a chain of layers with their costs.

    Example:
        >>> profile = ModelProfile.from_costs([4, 18, 2, 5, 12, 11])
        >>> profile.num_layers
        6
    """

    name: str
    """Shown in reports."""
    layers: tuple[LayerCost, ...]
    """In model order; a pipeline stage is a contiguous run of them."""
    dtype: str
    """Precision of weights and compute: ``float32``, ``float16`` or ``bfloat16``."""
    input_bytes_per_token: float = 8.0
    """Bytes of the model's own input per token (token ids are int64)."""
    max_positions: int | None = None
    """Longest sequence in tokens, where the model has a limit."""
    measured_on: Device | None = None
    """The device that the layers' seconds were measured on; None if on all alike, or not measured."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ModelConfigError("the model has no layers; a pipeline needs at least one.")

    @property
    def num_layers(self) -> int:
        """Layers in the list, embedding, norm and head included."""
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, shared ones once."""
        shared: dict[str, int] = {}
        total = 0
        size = DTYPE_BYTES[self.dtype]
        for layer in self.layers:
            total += layer.parameters
            if layer.shared_key is not None:
                if layer.shared_key in shared:
                    total -= shared[layer.shared_key]
                shared[layer.shared_key] = layer.shared_bytes // size
        return total

    @property
    def digest(self) -> str:
        """SHA-256 over the layers and their costs: the model, whatever its precision and however it was timed."""
        size = DTYPE_BYTES[self.dtype]
        rows = [
            [
                *(layer.name, layer.kind, layer.parameters, layer.shared_key, layer.window),
                *(layer.flops_per_token, layer.flops_per_pair),
                *(layer.weight_bytes / size, layer.kv_bytes_per_token / size, layer.output_bytes_per_token / size),
            ]
            for layer in self.layers
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @classmethod
    def from_config(cls, path_or_config: str | Path | Mapping[str, Any], *, dtype: str | None = None) -> ModelProfile:
        """Profile of a Hugging Face decoder from its ``config.json`` alone.

        Args:
            path_or_config: Model directory, ``config.json``, or its contents.
            dtype: Precision to run in, instead of the config's own.

        Returns:
            Layers: embedding, every block, final norm, head.

        Raises:
            ModelConfigError: If the config is missing or broken.
            UnsupportedModelError: If the family is unknown here.
        """
        if isinstance(path_or_config, Mapping):
            config, name = path_or_config, str(path_or_config.get("model_type", "model"))
        else:
            config = read_config(path_or_config)
            path = Path(path_or_config)
            name = path.resolve().parent.name if path.name == "config.json" else path.resolve().name
        architecture = read_architecture(config, dtype=dtype)
        return cls(
            name=name,
            layers=_decoder_layers(architecture),
            dtype=architecture.dtype,
            max_positions=architecture.max_positions,
        )

    @classmethod
    def from_costs(
        cls,
        seconds: Sequence[float],
        *,
        weight_bytes: Sequence[int] | None = None,
        output_bytes: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        name: str = "costs",
    ) -> ModelProfile:
        """Profile from plain numbers, one per layer.

        Args:
            seconds: Forward seconds of one micro-batch.
            weight_bytes: Bytes that stay on the device; 0 where left out.
            output_bytes: Bytes per token handed to the next layer; 0 where left out.
            names: Names for tables; ``layer 0``, ``layer 1``, ... where left out.
            name: The model's name.

        Raises:
            ModelConfigError: If lengths differ, or a number is negative or not finite.
        """
        count = len(seconds)
        columns: dict[str, Sequence[Any]] = {
            "seconds": seconds,
            "weight_bytes": weight_bytes if weight_bytes is not None else [0] * count,
            "output_bytes_per_token": output_bytes if output_bytes is not None else [0.0] * count,
        }
        if names is not None and len(names) != count:
            raise ModelConfigError(f"names has {len(names)} entries for {count} layers; give one each.")
        for label, column in columns.items():
            if len(column) != count:
                raise ModelConfigError(f"{label} has {len(column)} entries for {count} layers; give one each.")
            for value in column:
                if not 0 <= value < float("inf"):
                    raise ModelConfigError(f"{label} holds {value!r}; costs are finite and not negative.")
        if any(int(value) != value for value in columns["weight_bytes"]):
            raise ModelConfigError("weight_bytes holds a fraction of a byte; give whole numbers.")
        layers = tuple(
            LayerCost(
                name=names[index] if names is not None else f"layer {index}",
                weight_bytes=int(columns["weight_bytes"][index]),
                weight_traffic_bytes=int(columns["weight_bytes"][index]),
                output_bytes_per_token=float(columns["output_bytes_per_token"][index]),
                seconds=float(seconds[index]),
            )
            for index in range(count)
        )
        return cls(name=name, layers=layers, dtype="float32", input_bytes_per_token=0.0)

    def with_seconds(
        self,
        seconds: Sequence[float],
        backward_seconds: Sequence[float] | None = None,
        *,
        measured_on: Device | None = None,
    ) -> ModelProfile:
        """The same layers with measured seconds per micro-batch in place of the roofline.

        Args:
            seconds: Forward, one per layer.
            backward_seconds: Backward, one per layer; twice the forward ones if left out.
            measured_on: Their device; on others they are scaled by the ratio of the rooflines.
        """
        backward = [None] * len(self.layers) if backward_seconds is None else backward_seconds
        layers = tuple(
            dataclasses.replace(layer, seconds=forward, backward_seconds=back)
            for layer, forward, back in zip(self.layers, seconds, backward, strict=True)
        )
        return dataclasses.replace(self, layers=layers, measured_on=measured_on)


def _decoder_layers(architecture: Architecture) -> tuple[LayerCost, ...]:
    """Embedding, blocks, final norm and head of a dense decoder."""
    size = DTYPE_BYTES[architecture.dtype]
    hidden = architecture.hidden_size
    table = architecture.vocab_size * hidden
    positions = architecture.max_positions * hidden if architecture.learned_positions else 0
    key = "embedding" if architecture.tied_embeddings else None
    norm = architecture.norm_vectors * hidden
    embedding = LayerCost(
        name="embedding",
        kind="embedding",
        parameters=table + positions,
        weight_bytes=(table + positions) * size,
        shared_key=key,
        shared_bytes=table * size if key else 0,
        traffic_bytes_per_token=(2 if architecture.learned_positions else 1) * 2 * hidden * size,
        output_bytes_per_token=hidden * size,
    )
    final_norm = LayerCost(
        name="norm",
        kind="norm",
        parameters=norm,
        weight_bytes=norm * size,
        weight_traffic_bytes=norm * size,
        traffic_bytes_per_token=2 * hidden * size,
        output_bytes_per_token=hidden * size,
    )
    # log-probabilities are taken in float32: a float32 copy of the logits and its log-softmax, each written and read
    head = LayerCost(
        name="head",
        kind="head",
        parameters=table,
        weight_bytes=table * size,
        shared_key=key,
        shared_bytes=table * size if key else 0,
        weight_traffic_bytes=table * size,
        traffic_bytes_per_token=(hidden + 2 * architecture.vocab_size) * size + 4 * 4 * architecture.vocab_size,
        flops_per_token=2.0 * table,
        output_bytes_per_token=architecture.vocab_size * size,
        buffer_bytes_per_token=architecture.vocab_size * 2 * 4,
    )
    blocks = tuple(_block(architecture, index) for index in range(architecture.num_layers))
    return (embedding, *blocks, final_norm, head)


def _block(architecture: Architecture, index: int) -> LayerCost:
    """One transformer block: attention and MLP with their norms and residuals."""
    size = DTYPE_BYTES[architecture.dtype]
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    query = architecture.num_heads * architecture.head_dim
    key_value = 2 * architecture.num_kv_heads * architecture.head_dim
    mlp = architecture.mlp_matrices
    matrices = hidden * (query + key_value) + query * hidden + mlp * hidden * inner
    biases = (
        architecture.qkv_bias * (query + key_value)
        + architecture.output_bias * hidden
        + architecture.mlp_bias * (hidden + (mlp - 1) * inner)
    )
    norms = 2 * architecture.norm_vectors * hidden + architecture.qk_norm * 2 * architecture.head_dim
    parameters = matrices + biases + norms
    attention_traffic = 2 * hidden + (hidden + query + key_value) + (2 * query + key_value) + (query + hidden)
    mlp_traffic = 2 * hidden + (mlp - 1) * (hidden + inner) + mlp * inner + (inner + hidden)
    # alive at once: residual, normed input, and either queries, keys, values and the attention's output,
    # or every inner activation of the MLP and its product
    alive = 2 * hidden + max(query + key_value + query, mlp * inner)
    return LayerCost(
        name=f"block {index}",
        kind="block",
        parameters=parameters,
        weight_bytes=parameters * size,
        weight_traffic_bytes=parameters * size,
        traffic_bytes_per_token=float((attention_traffic + mlp_traffic + 2 * 3 * hidden) * size),
        flops_per_token=2.0 * matrices,
        flops_per_pair=4.0 * query,
        window=architecture.windows[index] if architecture.windows else None,
        output_bytes_per_token=hidden * size,
        buffer_bytes_per_token=alive * size,
        kv_bytes_per_token=key_value * size,
    )
