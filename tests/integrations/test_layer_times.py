"""Layers timed alone: that they are the model's layers, all of them, with the weights that they should have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES, make_config
from transformers import PretrainedConfig

from lp_plugin.errors import RuntimeEnvironmentError, UnsupportedModelError, WorkloadError
from lp_plugin.integrations.deepspeed.alone.layer_times import time_model_layers
from lp_plugin.integrations.deepspeed.alone.stages import read_mapping, stage_of_copies, stored_bytes
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.measure.turns import Runner, median_of, seconds_in_turns
from lp_plugin.model import ModelProfile

CPU = torch.device("cpu")
HIDDEN = 64
PLAIN: dict[str, Any] = {"halves": False, "tensor_parallel": 1, "device": CPU, "dtype": torch.float32}
SHARED = ("llama", "mixtral", "olmo2", "phi3", "qwen3_moe", "starcoder2")


def copy_weights(block: torch.nn.Module, other: torch.nn.Module) -> None:
    other.load_state_dict(block.state_dict())


def blocks_of(stage: DecoderStage) -> torch.nn.ModuleList:
    return stage.model.get_submodule(stage.blocks_name)


# stages of copies


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copies_of_a_block_are_the_block_again_and_again(family: str) -> None:
    config, copies = make_config(family, 3), 3
    one, many = stage_of_copies(config, 2, 3, **PLAIN), stage_of_copies(config, 2, 3, copies=copies, **PLAIN)
    weights = [next(block.parameters()).clone() for block in blocks_of(many)]
    assert not all(torch.equal(weights[0], other) for other in weights[1:]) or weights[0].dim() == 1
    for block in blocks_of(many):
        copy_weights(blocks_of(one)[0], block)
    hidden = torch.randn(2, 10, HIDDEN)
    expected = hidden
    for _ in range(copies):
        expected = one(expected)
    assert torch.equal(many(hidden), expected)
    cache, ones = many.new_cache(2, 12), torch.ones(2, 12, dtype=torch.long)
    positions = torch.arange(10).expand(2, -1)
    ones[:, 10:] = 0
    stepped = hidden
    for _ in range(copies):
        stepped = one.step(stepped, attention_mask=ones, position_ids=positions, cache=one.new_cache(2, 12))
    assert torch.equal(many.step(hidden, attention_mask=ones, position_ids=positions, cache=cache), stepped)


@torch.no_grad()
def test_halves_of_a_block_and_a_stage_of_nothing() -> None:
    config, halves = make_config("llama", 3), PLAIN | {"halves": True}
    hidden = torch.randn(2, 10, HIDDEN)
    block = stage_of_copies(config, 2, 3, **PLAIN)
    halved = [stage_of_copies(config, index, index + 1, **halves) for index in (3, 4)]
    for half in halved:
        blocks_of(half)[0].load_state_dict(blocks_of(block)[0].state_dict(), strict=False)
    assert torch.equal(halved[1](halved[0](hidden)), block(hidden))
    twice = stage_of_copies(config, 4, 5, copies=2, **halves)
    for copied in blocks_of(twice):
        copy_weights(blocks_of(halved[1])[0], copied)
    assert torch.equal(twice(hidden), halved[1](halved[1](hidden)))
    nothing = stage_of_copies(config, 0, 0, **PLAIN)
    assert torch.equal(nothing(hidden), hidden)
    assert not list(nothing.parameters())


@pytest.mark.parametrize("family", SHARED)
@torch.no_grad()
def test_a_ranks_share_of_every_layer_runs_by_itself(family: str) -> None:
    config = make_config(family, 2)
    profile = ModelProfile.from_config(config.to_dict(), dtype="float32").sharded(2)
    for index, layer in enumerate(profile.layers):
        stage = stage_of_copies(config, index, index + 1, **PLAIN | {"tensor_parallel": 2})
        known = stage.model.get_input_embeddings().weight.shape[0] if stage.has_embedding else 0
        given = torch.randint(known, (2, 5)) if known else torch.randn(2, 5, HIDDEN)
        width = layer.output_bytes_per_token / 4
        assert stage(given).shape == (2, 5, math.ceil(width))
        parameters = sum(parameter.numel() for parameter in stage.parameters())
        assert parameters == layer.parameters


def test_what_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(WorkloadError, match="3 tensor-parallel ranks"):
        stage_of_copies(make_config("llama", 2), 1, 2, **PLAIN | {"tensor_parallel": 3})
    with pytest.raises(UnsupportedModelError, match="no tensor-parallel plan"):
        stage_of_copies(make_config("opt", 2), 1, 2, **PLAIN | {"tensor_parallel": 2})
    with pytest.raises(UnsupportedModelError, match="can be planned, but not run"):
        read_mapping({"model_type": "deepseek_v3"})


# times


def times_of(config: PretrainedConfig, **changes: Any) -> Any:
    asked = {"dtype": "float32", "device": CPU, "rows": 2, "tokens": 8, "execution": "eager", "first_tier_bytes": 10**9}
    return time_model_layers(config.to_dict(), **asked | changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"cache_length": 12}),
        ("gemma3", {"cache_length": 3}),
        ("qwen3_moe", {"granularity": "sublayer", "tensor_parallel": 2}),
    ],
)
def test_every_layer_has_its_time_and_its_bytes(family: str, changes: dict[str, Any]) -> None:
    config, number = make_config(family, 3), changes.get("tensor_parallel", 1)
    granularity = changes.get("granularity", "layer")
    profile = ModelProfile.from_config(config.to_dict(), dtype="float32", granularity=granularity).sharded(number)
    times = times_of(config, **changes)
    assert (times.tensor_parallel, times.granularity, times.execution) == (number, granularity, "eager")
    assert times.launch_seconds == 0.0
    assert times.peak_bytes == (None,) * profile.num_layers
    assert times.pass_seconds >= 0.0
    assert times.spread >= 0.0
    for layer, seconds, resident, stored in zip(
        profile.layers, times.seconds, times.resident_seconds, times.weight_bytes, strict=True
    ):
        assert seconds >= 0.0
        assert resident is not None
        assert layer.weight_bytes <= stored <= layer.weight_bytes + 256  # rotary frequencies


def test_equal_layers_are_timed_once_and_what_fits_no_cache_is_not_resident() -> None:
    config = make_config("llama", 3)
    stored = stored_bytes(stage_of_copies(config, 1, 2, **PLAIN))
    times = times_of(config, first_tier_bytes=stored)
    assert len(set(times.seconds[1:4])) == 1
    assert times.resident_seconds[1:4] == (None,) * 3  # activations need room, too
    assert times.resident_seconds[4] is not None  # the norm
    assert len(times.seconds) == 6


def test_graphs_without_a_gpu_are_refused() -> None:
    for execution in ("graphs", "compiled"):
        with pytest.raises(RuntimeEnvironmentError, match="can't run as CUDA graphs; ask for eager"):
            times_of(make_config("llama", 2), execution=execution)


# turns


def test_runs_take_turns_with_preparations_and_no_more_calls_than_allowed() -> None:
    seen: list[str] = []

    def note(what: str) -> Any:
        return lambda: seen.append(what)

    spin = torch.randn(200, 200)
    runners = [
        Runner(run=lambda: (seen.append("a"), spin @ spin)),
        Runner(run=note("b"), passes=5, most=3, prepare=note("|")),
    ]
    first, second = seconds_in_turns(runners, CPU)
    assert first.seconds > second.seconds > 0
    assert min(first.spread, second.spread) >= 0
    text = "".join(seen)
    warm, *turns = text.split("|b|b", 1)  # two runs each to begin with
    assert set(warm) == {"a"}
    assert len(warm) == 2
    assert turns[0].count("|bbb") == 7
    assert turns[0].count("b") == 21
    spans = [len(span) for span in turns[0].split("|bbb")]
    assert len(spans) == 8
    assert spans[-1] == 0
    assert len(set(spans[:-1])) == 1


def test_the_spread_lets_out_what_happens_once() -> None:
    timed = median_of([1.0, 1.0, 9.0, 1.0, 1.1, 0.9, 1.0])
    assert (timed.seconds, timed.spread) == (1.0, pytest.approx(0.05))
    assert median_of([1.0, 1.4, 1.0, 1.4, 1.0, 1.4, 1.2]).spread == pytest.approx(0.4 / 1.2)
    assert median_of([0.0, 0.0]).spread == 0.0
