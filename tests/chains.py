"""Layer lists and partitions for tests of what other engines can express."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

from lp_plugin import Cluster, ModelProfile, Plan, Workload
from lp_plugin.solver.solve import evaluate

Granularity = Literal["layer", "sublayer"]
GRANULARITIES: tuple[Granularity, ...] = ("layer", "sublayer")
NAMED = {"accelerate", "torch"}
COUNTED = {"vllm", "sglang", "transformers"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 31},
    "gpt2": {"n_embd": 32, "n_head": 2, "vocab_size": 31, "n_positions": 16},
}


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    block: int | None = None


@dataclass(frozen=True)
class Cut:
    """Layers and boundaries, without a planner."""

    layers: Sequence[Layer]
    boundaries: tuple[int, ...]
    model_type: str | None = None


def chain(num_blocks: int, *, halves: bool = False) -> list[Layer]:
    kinds = ("attention", "mlp") if halves else ("block",)
    blocks = [Layer(f"block {block} {kind}", kind, block) for block in range(num_blocks) for kind in kinds]
    return [Layer("embedding", "embedding"), *blocks, Layer("norm", "norm"), Layer("head", "head")]


def profile_of(family: str, num_blocks: int, granularity: Granularity) -> ModelProfile:
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = {"model_type": family, key: num_blocks, **CONFIGS[family]}
    return ModelProfile.from_config(config, granularity=granularity)


@st.composite
def boundaries_over(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    stages = draw(st.integers(1, min(count, 9)))
    inner = draw(st.sets(st.integers(1, count - 1), min_size=stages - 1, max_size=stages - 1)) if stages > 1 else set()
    return (0, *sorted(inner), count)


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, Plan]:
    """A family, and a random partition of one of its models."""
    family = draw(st.sampled_from(sorted(CONFIGS)))
    profile = profile_of(family, draw(st.integers(1, 12)), draw(st.sampled_from(GRANULARITIES)))
    boundaries = draw(boundaries_over(profile.num_layers))
    cluster = Cluster.homogeneous("h200", len(boundaries) - 1)
    return family, evaluate(profile, cluster, Workload(batch=1, sequence=4, micro_batch=1), boundaries)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    layers = chain(draw(st.integers(1, 8)), halves=draw(st.booleans()))
    return Cut(layers, draw(boundaries_over(len(layers))))


def can_express(plan: Any, name: str) -> bool:
    """What the engines' documents say, stage by stage."""
    stages = [plan.layers[start:stop] for start, stop in itertools.pairwise(plan.boundaries)]
    blocks = [{layer.block for layer in stage if layer.block is not None} for stage in stages]
    if name == "deepspeed":
        return True
    if any(left & right for left, right in itertools.pairwise(blocks)):
        return False
    if name in NAMED:
        return True
    if any({layer.kind for layer in stage} in ({"head"}, {"block", "norm"}, {"norm"}) for stage in stages):
        return False
    if any(stage[-1].kind == "norm" for stage in stages):
        return False
    return name == "megatron" or all(blocks)
