"""What the planning commands share: options, and what they come to."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.quantity import parse_bytes, parse_seconds

__all__ = [
    "Batch",
    "Checkpointing",
    "ClusterSpec",
    "DataParallel",
    "Dtype",
    "Granularity",
    "MaxLatency",
    "MaxMemory",
    "MicroBatch",
    "MinSequences",
    "MinTokens",
    "Model",
    "Objectives",
    "PhaseName",
    "Sequence",
    "Stages",
    "TensorParallel",
    "Tier",
    "Weights",
    "ZeroStage",
    "constraints_of",
    "described",
]

Model = Annotated[str, typer.Argument(help="Model directory or its config.json; no weights needed.")]
ClusterSpec = Annotated[str, typer.Option("--cluster", help="Like h100-sxm:16 or h100-sxm:2x8, or a .toml file.")]
Batch = Annotated[int, typer.Option(help="Sequences in the whole batch.")]
Sequence = Annotated[int, typer.Option(help="Tokens per sequence; when decoding, of its context.")]
Stages = Annotated[int | None, typer.Option(help="Stages; all devices if left out.")]
PhaseName = Annotated[Literal["prefill", "decode", "train"], typer.Option(help="What the model does.")]
MicroBatch = Annotated[int | None, typer.Option(help="Sequences per micro-batch; chosen if left out.")]
Dtype = Annotated[str | None, typer.Option(help="Precision instead of the config's.")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="How matrices are stored: float8, int8 or int4; as --dtype if left out.")
]
Granularity = Annotated[
    Literal["layer", "sublayer"], typer.Option(help="Cut between whole blocks, or also at attention | MLP.")
]
Objectives = Annotated[
    Literal["throughput", "latency", "sequences", "memory"],
    typer.Option("--objective", help="Fastest bottleneck, least time through, most KV-cache room, emptiest devices."),
]
MaxLatency = Annotated[str | None, typer.Option(help='Bound on a micro-batch through all stages, like "500 ms".')]
MinTokens = Annotated[
    float | None, typer.Option("--min-tokens-per-second", help="Bound on the rate of a full pipeline.")
]
MinSequences = Annotated[int | None, typer.Option(help="Sequences whose KV cache must fit.")]
MaxMemory = Annotated[str | None, typer.Option(help='Bound on each device\'s bytes, like "40 GB".')]
Tier = Annotated[str | None, typer.Option(help="Slowest memory tier that a working set may need, like l2.")]
TensorParallel = Annotated[int, typer.Option(help="Devices that share each stage's layers.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Training: recompute activations.")]
ZeroStage = Annotated[int, typer.Option(help="Training: 1 spreads Adam states over the replicas.")]
DataParallel = Annotated[int, typer.Option(help="Training: replicas of the whole pipeline.")]


def described(
    model: str,
    cluster: str,
    *,
    dtype: str | None,
    weights: str | None,
    granularity: Literal["layer", "sublayer"] = "layer",
    tensor_parallel: int = 1,
) -> tuple[ModelProfile, Cluster]:
    """The model and the cluster, each stage a tensor-parallel group if so asked."""
    profile = ModelProfile.from_config(model, dtype=dtype, weight_dtype=weights, granularity=granularity)
    devices = Cluster.parse(cluster)
    if tensor_parallel == 1:
        return profile, devices
    return profile.sharded(tensor_parallel), devices.grouped(tensor_parallel)


def constraints_of(
    max_latency: str | None,
    min_tokens_per_second: float | None,
    min_sequences: int | None,
    max_memory: str | None,
    tier: str | None,
) -> Constraints:
    """The user's bounds, units parsed."""
    return Constraints(
        max_latency_seconds=None if max_latency is None else parse_seconds(max_latency),
        min_tokens_per_second=min_tokens_per_second,
        min_sequences=min_sequences,
        max_memory_bytes=None if max_memory is None else parse_bytes(max_memory),
        tier=tier,
    )
