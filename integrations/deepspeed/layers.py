"""The layer list of a DeepSpeed PipelineModule -> `ModelProfile`, counted on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec

from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.model.architecture import DTYPE_BYTES

__all__ = ["build_layer", "counted_module", "distinct_numbers", "profile_layers", "undisturbed_random"]


def profile_layers(specs: Sequence[Any], dtype: str) -> ModelProfile:
    """Parameters and bytes of every layer, frozen ones included; nothing is allocated.

    Products with a weight cost 2 FLOPs per weight and token; embeddings cost none, unless a TiedLayerSpec's
    ``forward_fn`` uses one (as a head). Activations are not known from the layers alone and count as 0.

    Args:
        specs: LayerSpec, TiedLayerSpec, nn.Module or callable, as DeepSpeed takes them.
        dtype: Precision that DeepSpeed will cast to.
    """
    numbers = distinct_numbers(specs)
    counted: dict[int, LayerCost] = {}
    layers = []
    for index, (spec, number) in enumerate(zip(specs, numbers, strict=True)):
        if number not in counted:
            with undisturbed_random():
                counted[number] = _count(counted_module(spec), dtype, looks_up=_forward_fn(spec) is None)
        cost = counted[number]
        tied = isinstance(spec, TiedLayerSpec)
        layers.append(
            LayerCost(
                name=f"{_name(spec)} {index}",
                parameters=cost.parameters,
                weight_bytes=cost.weight_bytes,
                weight_traffic_bytes=cost.weight_traffic_bytes,
                flops_per_token=cost.flops_per_token,
                shared_key=spec.key if tied else None,
                shared_bytes=cost.weight_bytes if tied else 0,
            )
        )
    return ModelProfile(name="PipelineModule", layers=tuple(layers), dtype=dtype, input_bytes_per_token=0.0)


def counted_module(spec: Any) -> Any:
    """What holds a layer's parameters: built on meta, or as it is if it exists already; a function has none."""
    return _built_on_meta(spec) if isinstance(spec, LayerSpec) else spec


def build_layer(spec: Any, device: str, dtype: torch.dtype = torch.float32) -> Callable[[Any], Any]:
    """One layer on a device in the engine's precision, ready to be called; a module that exists already is copied."""
    if isinstance(spec, TiedLayerSpec):
        module, forward = spec.build().to(device, dtype), spec.forward_fn
        return module if forward is None else lambda value: forward(module, value)
    if isinstance(spec, LayerSpec):
        return spec.build().to(device, dtype)
    if isinstance(spec, torch.nn.Module):
        return copy.deepcopy(spec).to(device, dtype)
    return spec  # a plain function


def _built_on_meta(spec: Any) -> torch.nn.Module:
    """The module of a LayerSpec without memory; with it where the constructor can't work on meta."""
    try:
        with torch.device("meta"):
            return spec.build()
    except (NotImplementedError, RuntimeError):
        return spec.build()


def distinct_numbers(specs: Sequence[Any]) -> list[int]:
    """A number per layer; equal numbers mean the same class with the same arguments, called alike."""
    seen: list[Any] = []
    numbers = []
    for spec in specs:
        match = next((number for number, other in enumerate(seen) if _same(spec, other)), None)
        if match is None:
            seen.append(spec)
            match = len(seen) - 1
        numbers.append(match)
    return numbers


@contextmanager
def undisturbed_random() -> Iterator[None]:
    """Whatever is built inside leaves torch's random state as it was: initial weights stay the user's own."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, LayerSpec):
        if first.typename is not second.typename or _forward_fn(first) is not _forward_fn(second):
            return False
        try:
            return bool(first.module_args == second.module_args and first.module_kwargs == second.module_kwargs)
        except (RuntimeError, ValueError):  # arguments such as tensors that don't compare to a truth value
            return False
    if isinstance(first, torch.nn.Module):
        return repr(first) == repr(second) and _shapes(first) == _shapes(second)
    return first is second


def _forward_fn(spec: Any) -> Any:
    return spec.forward_fn if isinstance(spec, TiedLayerSpec) else None


def _shapes(module: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


def _name(spec: Any) -> str:
    if isinstance(spec, LayerSpec):
        return str(spec.typename.__name__)
    return str(getattr(spec, "__name__", type(spec).__name__))


def _count(layer: Any, dtype: str, *, looks_up: bool) -> LayerCost:
    if not isinstance(layer, torch.nn.Module):
        return LayerCost(name="")
    looked_up = {
        id(parameter)
        for module in layer.modules()
        if looks_up and isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    parameters = list(layer.parameters())
    size = DTYPE_BYTES[dtype]
    total = sum(parameter.numel() for parameter in parameters)
    read = sum(parameter.numel() for parameter in parameters if id(parameter) not in looked_up)
    multiplied = sum(
        parameter.numel() for parameter in parameters if parameter.dim() > 1 and id(parameter) not in looked_up
    )
    return LayerCost(
        name="",
        parameters=total,
        weight_bytes=total * size,
        weight_traffic_bytes=read * size,
        flops_per_token=2.0 * multiplied,
    )
