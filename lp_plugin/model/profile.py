"""What is placed: layers, and what each of them costs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lp_plugin.errors import ModelConfigError, WorkloadError
from lp_plugin.hardware import Device
from lp_plugin.hardware.device import is_whole
from lp_plugin.model.architecture import DTYPE_BYTES, Architecture, read_architecture, read_config
from lp_plugin.model.layer_cost import LayerCost, check_fields, check_layers, field_rules
from lp_plugin.model.layers import Granularity, count_layers
from lp_plugin.model.quantization import read_quantization
from lp_plugin.quantity import shown

__all__ = ["ModelProfile"]

_MAX_LAYERS = 20_000
_MAX_DEVICES = 2**20


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
    architecture: Architecture | None = None
    """What the layers were derived from; None for plain costs."""
    granularity: Granularity = "layer"
    """Whether blocks are whole, or cut into attention and MLP where they are sequential."""
    tensor_parallel: int = 1
    """Devices that share each layer; all costs are those of one of them."""
    weight_dtype: str | None = None
    """How matrices are stored if quantised, e.g. ``float8``, ``int8`` or ``int4``; None: as ``dtype``."""

    def __post_init__(self) -> None:
        most, positions = _MAX_DEVICES, self.max_positions
        for field, sound, bound in (
            ("layers", isinstance(self.layers, tuple), "a tuple of LayerCost"),
            ("dtype", self.dtype in tuple(DTYPE_BYTES), f"one of {', '.join(sorted(DTYPE_BYTES))}"),
            ("max_positions", positions is None or is_whole(positions, 2**63), "a whole number of 1 to 2**63, or None"),
            ("measured_on", isinstance(self.measured_on, Device | None), "a Device or None"),
            ("architecture", isinstance(self.architecture, Architecture | None), "an Architecture or None"),
            ("granularity", self.granularity in get_args(Granularity), "layer or sublayer"),
            ("tensor_parallel", is_whole(self.tensor_parallel, most), f"a whole number of 1 to {most}"),
        ):
            if not sound:
                value = shown(getattr(self, field))
                raise ModelConfigError(f"model {shown(self.name)}: {field} is {value}; it must be {bound}.")
        check_fields("model", self, _RULES)
        if not self.layers:
            raise ModelConfigError("the model has no layers; a pipeline needs at least one.")
        check_layers(self.layers)

    @property
    def num_layers(self) -> int:
        """Layers in the list, embedding, norm and head included."""
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, shared ones once; of a sharded model those of one device."""
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
    def active_parameters(self) -> int:
        """Parameters that one token passes: all but those of routed experts that it is not sent to."""
        idle = sum(
            layer.expert_parameters // layer.num_experts * (layer.num_experts - layer.experts_per_token)
            for layer in self.layers
            if layer.num_experts
        )
        return self.num_parameters - idle

    @property
    def digest(self) -> str:
        """SHA-256 over the layers and their costs.

        It names the model and its granularity, whatever its precision, however it is sharded, and however it was
        timed.
        """
        layers, size = self.layers, DTYPE_BYTES[self.dtype]
        if self.architecture is not None:
            plain = dataclasses.replace(self.architecture, dtype="float32", quantization=None)
            layers, size = count_layers(plain, granularity=self.granularity), DTYPE_BYTES["float32"]
        rows = [[layer.name for layer in self.layers], *(_row(layer, size) for layer in layers)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @classmethod
    def from_config(
        cls,
        path_or_config: str | Path | Mapping[str, Any],
        *,
        dtype: str | None = None,
        granularity: Granularity = "layer",
        weight_dtype: str | None = None,
    ) -> ModelProfile:
        """Profile of a Hugging Face model from its ``config.json`` alone.

        A decoder is counted with its language-model head, an encoder with the head that fills in masked tokens.

        Args:
            path_or_config: Model directory, ``config.json``, or its contents.
            dtype: Precision to run in, instead of the config's own.
            granularity: ``layer`` for whole blocks; ``sublayer`` to cut them into attention and MLP, unless both
                work on the same input.
            weight_dtype: How the matrices of blocks are stored (``float8``, ``int8``, or ``int4`` with a 16-bit
                scale per 128 weights), instead of what the config says. Embedding, head, norms, biases and routers
                stay in ``dtype``; compute and the KV cache, too.

        Returns:
            Layers: embedding, every block, final norm, head; of an encoder-decoder as `lp_plugin.model.layers` says.

        Raises:
            ModelConfigError: If the config is missing or broken.
            UnsupportedModelError: If the family is unknown here.
        """
        if isinstance(path_or_config, Mapping):
            config, name = path_or_config, str(path_or_config.get("model_type", "model"))
        elif not isinstance(path_or_config, str | Path):
            raise ModelConfigError(
                f"the config is {shown(path_or_config)}; give a model directory, a config.json, or its contents."
            )
        else:
            config = read_config(path_or_config)
            path = Path(path_or_config)
            name = path.resolve().parent.name if path.name == "config.json" else path.resolve().name
        if granularity not in get_args(Granularity):
            raise ModelConfigError(f"granularity is {granularity!r}; it must be layer or sublayer.")
        architecture = read_architecture(config, dtype=dtype, weight_dtype=weight_dtype)
        return cls._counted(name, architecture, granularity, 1)

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
            names: Names for tables, all different; ``layer 0``, ``layer 1``, ... where left out.
            name: The model's name.

        Raises:
            ModelConfigError: If there are no layers or more than 20,000, lengths differ, a name comes twice, or an
                entry is no number, negative or not finite; names the column and the position.
        """
        count = _length("seconds", seconds)
        if not 1 <= count <= _MAX_LAYERS:
            problem = "there are no layers" if not count else f"seconds has {count} entries"
            raise ModelConfigError(f"{problem}; a model has 1 to {_MAX_LAYERS} layers.")
        times = _column("seconds", seconds, count)
        weights = _column("weight_bytes", weight_bytes, count)
        outputs = _column("output_bytes_per_token", output_bytes, count)
        for index, value in enumerate(weights):
            if not value.is_integer():
                raise ModelConfigError(
                    f"weight_bytes holds {value!r} at position {index}: a fraction of a byte; give whole numbers."
                )
        labels = _names(names, count)
        layers = tuple(
            LayerCost(
                name=label,
                weight_bytes=int(weight),
                weight_traffic_bytes=int(weight),
                output_bytes_per_token=output,
                seconds=time,
            )
            for label, weight, output, time in zip(labels, weights, outputs, times, strict=True)
        )
        return cls(name=name, layers=layers, dtype="float32", input_bytes_per_token=0.0)

    def sharded(self, tensor_parallel: int) -> ModelProfile:
        """The costs of one device of a group that shares every layer, by the plan of `lp_plugin.model.layers`.

        Args:
            tensor_parallel: Devices of the group, all in all, also if this profile is of a group already.

        Raises:
            WorkloadError: If heads or inner widths can't be shared out, or the profile is of plain or measured costs.
        """
        number = tensor_parallel
        if not is_whole(number, _MAX_DEVICES):
            raise WorkloadError(f"tensor_parallel is {number!r}; it must be a whole number of 1 to {_MAX_DEVICES}.")
        return self._again(self._derived("shard"), number)

    def stored_as(self, weight_dtype: str | None) -> ModelProfile:
        """The same model with the matrices of its blocks stored otherwise.

        Args:
            weight_dtype: ``float8``, ``int8`` or ``int4``; None for the model's own precision.

        Raises:
            WorkloadError: If the profile is of plain or measured costs.
            ModelConfigError: If the name is unknown.
        """
        quantization = None if weight_dtype is None else read_quantization(None, weight_dtype)
        architecture = dataclasses.replace(self._derived("store"), quantization=quantization)
        return self._again(architecture, self.tensor_parallel)

    def in_dtype(self, dtype: str) -> ModelProfile:
        """The same model run in another precision.

        Args:
            dtype: ``float32``, ``float16`` or ``bfloat16``.

        Raises:
            WorkloadError: If the profile is of plain or measured costs.
            ModelConfigError: If the name is unknown.
        """
        if dtype not in DTYPE_BYTES:
            raise ModelConfigError(f"dtype is {dtype!r}; supported are {', '.join(sorted(DTYPE_BYTES))}.")
        return self._again(dataclasses.replace(self._derived("convert"), dtype=dtype), self.tensor_parallel)

    def with_seconds(
        self,
        seconds: Sequence[float],
        backward_seconds: Sequence[float] | None = None,
        *,
        resident_seconds: Sequence[float | None] | None = None,
        measured_on: Device | None = None,
    ) -> ModelProfile:
        """The same layers with measured seconds per micro-batch in place of the roofline.

        Args:
            seconds: Forward, one per layer.
            backward_seconds: Backward, one per layer; twice the forward ones if left out.
            resident_seconds: Forward with the data in the device's first tier, one per layer; no faster if left out.
            measured_on: Their device; on others they are scaled by the ratio of the rooflines.
        """
        backward = [None] * len(self.layers) if backward_seconds is None else backward_seconds
        resident = [None] * len(self.layers) if resident_seconds is None else resident_seconds
        layers = tuple(
            dataclasses.replace(layer, seconds=forward, backward_seconds=back, resident_seconds=near)
            for layer, forward, back, near in zip(self.layers, seconds, backward, resident, strict=True)
        )
        return dataclasses.replace(self, layers=layers, measured_on=measured_on)

    def _derived(self, verb: str) -> Architecture:
        """What the layers were derived from, if they still are as they were derived."""
        if self.architecture is None:
            raise WorkloadError(
                f"{self.name} is a list of plain costs, which say nothing of heads and matrices; "
                f"to {verb} a model, make its profile from a config."
            )
        if any(layer.seconds is not None for layer in self.layers):
            raise WorkloadError(
                f"{self.name} has measured seconds, which hold for its layers as they are; {verb} it before timing it."
            )
        return self.architecture

    def _again(self, architecture: Architecture, tensor_parallel: int) -> ModelProfile:
        return self._counted(self.name, architecture, self.granularity, tensor_parallel)

    @classmethod
    def _counted(
        cls, name: str, architecture: Architecture, granularity: Granularity, tensor_parallel: int
    ) -> ModelProfile:
        quantization = architecture.quantization
        return cls(
            name=name,
            layers=count_layers(architecture, granularity=granularity, tensor_parallel=tensor_parallel),
            dtype=architecture.dtype,
            input_bytes_per_token=16.0 if architecture.encoder_blocks else 8.0,  # source and target
            max_positions=architecture.max_positions,
            architecture=architecture,
            granularity=granularity,
            tensor_parallel=tensor_parallel,
            weight_dtype=None if quantization is None else quantization.weight_dtype,
        )


_RULES = field_rules(ModelProfile)


def _row(layer: LayerCost, size: int) -> list[Any]:
    """What tells a layer from another, bytes in elements of the given size."""
    in_bytes = (layer.weight_bytes, layer.expert_bytes, layer.kv_bytes_per_token, layer.output_bytes_per_token)
    return [
        *(layer.name, layer.kind, layer.block, layer.parameters, layer.shared_key, layer.window, layer.kv_window),
        *(layer.causal, layer.runs_once, layer.num_experts, layer.experts_per_token),
        *(layer.flops_per_token, layer.flops_per_pair, layer.flops_per_cross_pair),
        *(value / size for value in in_bytes),
    ]


def _length(label: str, values: Sequence[Any]) -> int:
    try:
        return len(values)
    except TypeError:
        raise ModelConfigError(f"{label} is {reprlib.repr(values)}; give a list with an entry per layer.") from None


def _column(label: str, values: Sequence[Any] | None, count: int) -> list[float]:
    """A column of costs as floats, checked; zeros if it is left out."""
    if values is None:
        return [0.0] * count
    if _length(label, values) != count:
        raise ModelConfigError(f"{label} has {len(values)} entries for {count} layers; give one each.")
    column = []
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ModelConfigError(f"{label} holds {reprlib.repr(value)} at position {index}; costs are numbers.")
        number = _float(value)
        if not 0 <= number < math.inf:
            raise ModelConfigError(
                f"{label} holds {reprlib.repr(value)} at position {index}; costs are finite and not negative."
            )
        column.append(number)
    return column


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the largest float
        return math.inf


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"layer {index}" for index in range(count)]
    if _length("names", names) != count:
        raise ModelConfigError(f"names has {len(names)} entries for {count} layers; give one each.")
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ModelConfigError(f"names holds {reprlib.repr(name)} at position {index}; names are text.")
        if name in seen:
            raise ModelConfigError(
                f"names holds {name!r} at position {index}, and at position {seen[name]} already; "
                "give each layer a name of its own."
            )
        seen[name] = index
    return list(names)
