"""Seconds of each layer of a chain on the real device, every distinct layer once."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lp_plugin.errors import LpPluginError

__all__ = ["LayerFailedError", "LayerSeconds", "give_back_memory", "synchronize", "time_layers"]

WARM_UP = 2
REPEATS = 5
BACK_TO_BACK = 4
"""Forward passes between two synchronisations on a GPU: in a pipeline launches overlap with the pass before."""


class LayerFailedError(LpPluginError):
    """A layer could not be built or run on the sample input; carries the layer's position."""

    def __init__(self, position: int, cause: Exception) -> None:
        self.position = position
        super().__init__(f"layer {position} failed: {type(cause).__name__}: {cause}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """Median seconds of one micro-batch."""

    forward: float
    """Forward pass without gradients, or with them when training."""
    backward: float
    """Backward pass; 0 unless training."""


def time_layers(
    signatures: Sequence[Hashable],
    build: Callable[[int], Callable[[Any], Any]],
    sample: Any,
    *,
    training: bool,
    share: tuple[int, int] = (0, 1),
) -> dict[int, LayerSeconds]:
    """Times this process's share of the distinct layers.

    Layers are distinct if their signature or the shapes of their input differ. Each distinct layer is built once,
    alone, run once for its output's shape, and dropped; the ``k``-th is timed by the process whose turn it is.

    Args:
        signatures: One per layer; equal signatures promise equal cost on equal inputs.
        build: Makes layer ``i`` on the device.
        sample: Input of the first layer: a tensor or tuple of tensors on the device.
        training: Whether to time a backward pass too.
        share: (turn, number of processes).

    Returns:
        For every layer whose distinct representative was timed here, its seconds; the processes' results together
        cover all layers.

    Raises:
        LayerFailedError: If a layer can't take what the one before hands on.
    """
    turn, processes = share
    outputs: dict[Hashable, Any] = {}
    timed: dict[Hashable, LayerSeconds] = {}
    result = {}
    value = sample
    for position, signature in enumerate(signatures):
        try:
            key = (signature, _shapes(value))
            if key not in outputs:
                number = len(outputs)
                layer = build(position)
                with torch.no_grad():
                    outputs[key] = layer(_fresh(value, requires_grad=False))
                if number % processes == turn:
                    timed[key] = _median_seconds(layer, value, training=training)
        except Exception as error:  # whatever the user's layer raises is reported with its position
            raise LayerFailedError(position, error) from error
        if key in timed:
            result[position] = timed[key]
        value = outputs[key]
    return result


def give_back_memory() -> None:
    """Frees what is not used any more, also by objects that refer to each other, for others on this process's GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device | None = None) -> None:
    """Waits for the device if it is a GPU; left out, for this process's GPU, if there is one."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(layer: Callable[[Any], Any], value: Any, *, training: bool) -> LayerSeconds:
    forward, backward = [], []
    passes = BACK_TO_BACK if torch.cuda.is_available() and not training else 1
    for _ in range(WARM_UP + REPEATS):
        given = _fresh(value, requires_grad=training)
        with torch.set_grad_enabled(training):
            synchronize()
            start = time.perf_counter()
            for _ in range(passes):
                output = layer(given)
            synchronize()
            middle = time.perf_counter()
            if training:
                _backward(output)
                synchronize()
        forward.append((middle - start) / passes)
        backward.append(time.perf_counter() - middle if training else 0.0)
    return LayerSeconds(forward=statistics.median(forward[WARM_UP:]), backward=statistics.median(backward[WARM_UP:]))


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _shapes(value: Any) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in _tensors(value))


def _fresh(value: Any, *, requires_grad: bool) -> Any:
    """A copy without history (layers may work in place); floating-point tensors ask for gradients when training."""
    fresh = tuple(
        tensor.detach().requires_grad_(requires_grad and tensor.is_floating_point()).clone()
        for tensor in _tensors(value)
    )
    return fresh if isinstance(value, (tuple, list)) else fresh[0]


def _backward(output: Any) -> None:
    tensors = [tensor for tensor in _tensors(output) if tensor.requires_grad]
    if tensors:
        torch.autograd.backward(tensors, [torch.ones_like(tensor) for tensor in tensors])
