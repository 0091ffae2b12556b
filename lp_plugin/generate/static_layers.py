"""Layers and devices as generation runs them: static caches, logits of last tokens alone, replayed launches."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lp_plugin.hardware import Cluster, Device
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.model.architecture import DTYPE_BYTES
from lp_plugin.model.halves import attention_half

__all__ = ["last_logits", "on_static_caches", "replayed", "workspace_bytes"]

_REPLAYED_SECONDS = {"decode": 140e-6, "prefill": 58e-6}
"""Least seconds of a block whose kernels are replayed from a CUDA graph: some 20, each of 2 to 20 us however small its
tensors; the catalogue's figures are for eager launches. From docs/results, on H200s with torch 2.11: decoding, about
1.15 ms a turn of 8 llama blocks of hidden size 2048, 32 rows; prefill, 0.465 ms a pass of 8 starcoder2 blocks of hidden
size 1024, 16 tokens."""
_COMPILED_SECONDS = {"decode": 115e-6, "prefill": 39e-6}
"""The same after ``torch.compile`` has fused what stands between the matrices; there about 0.93 ms, and 0.312 ms."""
_WORKSPACE_BYTES = 2 * 32 * 2**20
"""What cuBLAS keeps on a GPU: 32 MiB (torch's default on compute capability 9.0) for each of two streams, those of
prefill and of capturing graphs."""


def on_static_caches(profile: ModelProfile, tokens: int, length: int) -> ModelProfile:
    """The layers as they run on caches that hold ``length`` tokens from the start.

    Every key is read and masked, windows or not. A pass keeps a mask of a byte per query and key, which attention
    converts to the model's precision; key and value heads that are fewer than the query's are repeated.

    Args:
        profile: The layers.
        tokens: Of each row that a pass adds to its cache: the prompt's, or 1.
        length: Tokens of a row's cache.
    """
    layers = tuple(_on_static_cache(profile, layer, tokens, length) for layer in profile.layers)
    return dataclasses.replace(profile, layers=layers)


def _on_static_cache(profile: ModelProfile, layer: LayerCost, tokens: int, length: int) -> LayerCost:
    plain = dataclasses.replace(layer, window=None, kv_window=None)
    if profile.architecture is None or layer.block is None or not layer.kv_bytes_per_token:
        return plain
    group, size = profile.tensor_parallel, DTYPE_BYTES[profile.dtype]
    block = profile.architecture.blocks[layer.block - len(profile.architecture.encoder_blocks)]
    heads, kv_heads = -(-block.attention.num_heads // group), max(block.attention.num_kv_heads // group, 1)
    width = block.attention.head_dim + block.attention.value_dim
    repeated = heads * width * size * length / tokens if kv_heads < heads else 0.0
    attention = attention_half(profile.architecture, block, group).alive * size + length * size + repeated
    return dataclasses.replace(plain, buffer_bytes_per_token=max(layer.buffer_bytes_per_token, attention) + length)


def last_logits(profile: ModelProfile, tokens: int) -> ModelProfile:
    """The same layers, with a head that sees the last one of every ``tokens`` tokens alone."""
    fields = ("traffic_bytes_per_token", "flops_per_token", "output_bytes_per_token", "buffer_bytes_per_token")
    layers = tuple(
        dataclasses.replace(layer, **{name: getattr(layer, name) / tokens for name in fields})
        if layer.kind == "head"
        else layer
        for layer in profile.layers
    )
    return dataclasses.replace(profile, layers=layers)


def replayed(cluster: Cluster, phase: Literal["decode", "prefill"], *, compiled: bool) -> Cluster:
    """The devices as decode steps, or passes in graphs, find them: GPUs replay CUDA graphs, a CPU launches eagerly.

    Args:
        cluster: Devices as the catalogue has them.
        phase: What is replayed.
        compiled: Whether it has been compiled.
    """
    seconds = (_COMPILED_SECONDS if compiled else _REPLAYED_SECONDS)[phase]
    devices = tuple(
        device
        if device.name == "cpu"
        else dataclasses.replace(device, layer_overhead_seconds=min(device.layer_overhead_seconds, seconds))
        for device in cluster.devices
    )
    return dataclasses.replace(cluster, devices=devices)


def workspace_bytes(device: Device) -> int:
    """Bytes that libraries keep on the device beside the tensors."""
    return 0 if device.name == "cpu" else _WORKSPACE_BYTES
