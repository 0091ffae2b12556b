"""Sub-layers, sharded layers and quantised layers: what must add up, and what transformers' own plans say."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import (
    DECODERS,
    ENCODERS,
    SMALL,
    SMALL_IDS,
    TRANSLATORS,
    build,
    full_config,
    part_of,
    small_config,
)

from lp_plugin import LayerCost, ModelConfigError, ModelProfile, WorkloadError

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
SUMS = ["parameters", "weight_bytes", "weight_traffic_bytes", "traffic_bytes_per_token", "flops_per_token"]
SUMS += ["flops_per_pair", "flops_per_cross_pair", "kv_bytes_per_token", "expert_bytes", "expert_parameters"]
SUMS += ["saved_bytes_per_token", "num_all_reduces", "all_reduce_bytes_per_token", "num_experts", "experts_per_token"]
PLANNED = ["arcee-1", "cohere-1", "deepseek_v2-0", "deepseek_v2-1", "ernie4_5-1", "exaone4-1", "gemma-1", "gemma2-0"]
PLANNED += ["gemma3_text-0", "glm-0", "glm4-1", "glm4_moe-0", "gpt_neox-0", "gpt_neox-2", "granite-1", "llama-0"]
PLANNED += ["llama-1", "mistral-1", "mixtral-0", "nemotron-1", "olmo-1", "olmo2-0", "olmo3-1", "olmoe-0", "phi-1"]
PLANNED += ["phi3-0", "qwen2-0", "qwen3-0", "qwen3_moe-1", "seed_oss-0", "smollm3-1", "starcoder2-1"]


def config_of(name: str) -> dict[str, Any]:
    family, _, index = name.rpartition("-")
    return small_config(family, int(index))


@pytest.mark.parametrize("config", SMALL, ids=SMALL_IDS)
@pytest.mark.parametrize("weight_dtype", [None, "int4"])
def test_halves_add_up_to_the_block(config: dict[str, Any], weight_dtype: str | None) -> None:
    whole = ModelProfile.from_config(config, dtype="float16", weight_dtype=weight_dtype)
    fine = ModelProfile.from_config(config, dtype="float16", weight_dtype=weight_dtype, granularity="sublayer")
    parallel = {index for index, block in enumerate(whole.architecture.blocks) if block.parallel}
    for layer in whole.layers:
        parts = [part for part in fine.layers if part.name == layer.name or part.name.startswith(f"{layer.name} ")]
        if layer.kind == "block":
            expected = ["block"] if layer.block in parallel else ["attention", "mlp"]
            assert [part.kind for part in parts] == expected
            assert {part.block for part in parts} == {layer.block}
        for field in SUMS:
            assert sum(getattr(part, field) for part in parts) == getattr(layer, field), field
        assert max(part.buffer_bytes_per_token for part in parts) == layer.buffer_bytes_per_token
        assert parts[-1].output_bytes_per_token == layer.output_bytes_per_token
        assert (parts[0].window, parts[0].kv_window) == (layer.window, layer.kv_window)
    assert fine.num_parameters == whole.num_parameters
    assert (fine.digest == whole.digest) is (fine.num_layers == whole.num_layers)


def fullest(loads: list[int], devices: int) -> int:
    """Least possible load of the fullest device, by bisection over a greedy fill in order."""

    def needed(limit: int) -> int:
        used, load = 1, 0
        for size in loads:
            used, load = (used, load + size) if load + size <= limit else (used + 1, size)
        return used

    low, high = max(loads), sum(loads)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= devices else (middle + 1, high)
    return low


def test_twelve_devices_hold_sixteen_blocks_better_in_halves() -> None:
    """The fullest of 12 devices holds 24 hidden^2 of whole blocks, and 20 of halves (4 attention, 8 MLP)."""
    hidden = 8192
    loads = {}
    for granularity in ("layer", "sublayer"):
        profile = ModelProfile.from_config(DENSE16, granularity=granularity)
        matrices = [int(layer.flops_per_token) // 2 for layer in profile.layers if layer.block is not None]
        loads[granularity] = fullest([size // hidden**2 for size in matrices], 12)
        assert sum(matrices) == 16 * 12 * hidden**2
    assert loads == {"layer": 24, "sublayer": 20}


@pytest.mark.parametrize("granularity", ["half", None, ""])
def test_unknown_granularity(granularity: Any) -> None:
    with pytest.raises(ModelConfigError, match=r"granularity is .*layer or sublayer"):
        ModelProfile.from_config(DENSE16, granularity=granularity)


def share(name: str, shape: torch.Size, plan: dict[str, str], devices: int) -> int:
    """Elements of a parameter that one device holds by transformers' plan."""
    sizes = list(shape)
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?", name):
            if "colwise" in style:
                sizes[len(sizes) - 2 if len(sizes) > 1 else 0] //= devices
            elif "rowwise" in style and len(sizes) > 1:
                sizes[-1] //= devices
    return math.prod(sizes)


@pytest.mark.parametrize("name", PLANNED)
def test_blocks_are_sharded_as_transformers_plans_it(name: str) -> None:
    model = build(config_of(name))
    plan = model.config.base_model_tp_plan
    prefix = f"{model.base_model_prefix}."
    theirs: dict[str, int] = {}
    for parameter, value in model.named_parameters():
        part = part_of(parameter, model.config.model_type)
        theirs[part] = theirs.get(part, 0) + share(parameter.removeprefix(prefix), value.shape, plan, 2)
    ours = ModelProfile.from_config(config_of(name)).sharded(2)
    blocks = {layer.name: layer.parameters for layer in ours.layers if layer.kind == "block"}
    assert blocks == {part: size for part, size in theirs.items() if part.startswith("block")}


@pytest.mark.parametrize("config", SMALL, ids=SMALL_IDS)
def test_a_group_of_one_is_no_group(config: dict[str, Any]) -> None:
    profile = ModelProfile.from_config(config)
    assert profile.sharded(1) == profile
    assert {layer.num_all_reduces for layer in profile.layers} == {0}


@pytest.mark.parametrize("granularity", ["layer", "sublayer"])
def test_a_sharded_block_in_numbers(granularity: Any) -> None:
    """The reference block on 4 devices: matrices in quarters, norms whole, hidden states whole."""
    hidden, inner, norms = 8192, 32768, 2 * 2 * 8192
    profile = ModelProfile.from_config(DENSE16, granularity=granularity).sharded(4)
    assert profile.tensor_parallel == 4
    parts = [layer for layer in profile.layers if layer.block == 3]
    assert sum(layer.parameters for layer in parts) == 12 * hidden**2 // 4 + norms
    assert sum(layer.flops_per_token for layer in parts) == 2 * 12 * hidden**2 / 4
    assert sum(layer.flops_per_pair for layer in parts) == 4 * hidden / 4
    assert sum(layer.kv_bytes_per_token for layer in parts) == 2 * 2 * hidden // 4
    assert {layer.output_bytes_per_token for layer in parts} == {2 * hidden}
    assert sum(layer.num_all_reduces for layer in parts) == 2
    assert sum(layer.all_reduce_bytes_per_token for layer in parts) == 2 * 2 * hidden
    assert max(layer.buffer_bytes_per_token for layer in parts) == 2 * (2 * hidden + 2 * inner // 4)
    embedding, norm, head = profile.layers[0], profile.layers[-2], profile.layers[-1]
    assert (embedding.parameters, head.parameters) == (66 * hidden, 66 * hidden)  # 264 rows among 4
    assert (embedding.num_all_reduces, embedding.all_reduce_bytes_per_token) == (1, 2 * hidden)
    assert (norm.num_all_reduces, head.num_all_reduces) == (0, 0)
    assert head.output_bytes_per_token == 2 * 66


def test_all_reduces_of_other_blocks() -> None:
    """Halves in parallel share one; cross-attention has one of its own."""
    parallel = ModelProfile.from_config(config_of("gpt_neox-0")).sharded(2).layers[1]
    sequential = ModelProfile.from_config(config_of("gpt_neox-2")).sharded(2).layers[1]
    assert (parallel.num_all_reduces, sequential.num_all_reduces) == (1, 2)
    assert sequential.all_reduce_bytes_per_token == 2 * parallel.all_reduce_bytes_per_token == 2 * 4 * 64
    decoder = ModelProfile.from_config(config_of("bart-0")).sharded(2).layers[-2]
    assert (decoder.kind, decoder.num_all_reduces, decoder.all_reduce_bytes_per_token) == ("block", 3, 3 * 4 * 64)


def test_key_heads_are_repeated_where_they_are_too_few() -> None:
    whole = ModelProfile.from_config(config_of("llama-0"))  # 8 query heads, 2 key heads of 24
    assert [profile.layers[1].kv_bytes_per_token for profile in map(whole.sharded, (1, 2, 4, 8))] == [
        4 * 2 * heads * 24 for heads in (2, 1, 1, 1)
    ]
    hidden, inner, group = 64, 168, 4
    matrices = 64 * 24 * (2 + 1 + 1 + 2) + 3 * hidden * inner // group  # q, k, v, o
    assert whole.sharded(group).layers[1].parameters == matrices + 2 * hidden


def test_latents_are_whole_on_every_device() -> None:
    whole = ModelProfile.from_config(config_of("deepseek_v3-0"))
    assert [profile.layers[1].kv_bytes_per_token for profile in map(whole.sharded, (1, 2, 4))] == [4 * 28] * 3


@pytest.mark.parametrize("config", [full_config(family) for family in DECODERS], ids=DECODERS)
def test_shares_add_up(config: dict[str, Any]) -> None:
    """What both of two devices hold, less what is whole on both, is the model; products are shared exactly."""
    whole = ModelProfile.from_config(config, dtype="bfloat16")
    odd = {"falcon": "num_attention_heads is 71", "deepseek_v2": "intermediate_size is 1407"}
    if config["model_type"] in odd:
        with pytest.raises(WorkloadError, match=odd[config["model_type"]]):
            whole.sharded(2)
        return
    half = whole.sharded(2)
    for one, part in zip(whole.layers, half.layers, strict=True):
        assert one.parameters <= 2 * part.parameters <= 2 * one.parameters + 2 * whole.architecture.hidden_size
        assert one.flops_per_token <= 2 * part.flops_per_token
        assert one.flops_per_pair == 2 * part.flops_per_pair
        assert part.weight_traffic_bytes + part.expert_bytes <= part.weight_bytes
        assert part.kv_window == one.kv_window
    assert half.digest == whole.digest
    assert half.sharded(1) == whole


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        ("llama-1", 3, r"tensor_parallel is 3, but num_attention_heads is 4"),
        ("gpt_oss-0", 8, r"num_attention_heads is 4"),
        ("llama-0", 16, r"num_attention_heads is 8"),
        ("gpt2-2", 4, r"num_attention_heads is 2"),
        ("qwen2_moe-0", 0, r"tensor_parallel is 0; it must be a whole number of 1 to"),
        ("llama-0", -2, r"tensor_parallel is -2"),
        ("llama-0", 2.0, r"tensor_parallel is 2.0"),
        ("llama-0", True, r"tensor_parallel is True"),
        ("llama-0", 10**30, r"it must be a whole number of 1 to"),
    ],
)
def test_groups_that_cannot_share(name: str, group: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        ModelProfile.from_config(config_of(name)).sharded(group)


def test_inner_widths_and_key_heads_that_cannot_be_shared() -> None:
    odd = {**config_of("llama-1"), "intermediate_size": 99}
    with pytest.raises(WorkloadError, match=r"intermediate_size is 99, which 2 devices can't share.*divisor of 99"):
        ModelProfile.from_config(odd).sharded(2)
    uneven = {**config_of("llama-1"), "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}
    with pytest.raises(WorkloadError, match=r"num_key_value_heads is 3; 4 devices can neither"):
        ModelProfile.from_config(uneven).sharded(4)


def test_plain_and_measured_costs_stay_as_they_are() -> None:
    plain = ModelProfile.from_costs([1, 2])
    measured = ModelProfile.from_config(config_of("llama-0"))
    measured = measured.with_seconds([1.0] * measured.num_layers)
    for profile, message in ((plain, "plain costs"), (measured, "measured seconds")):
        for change in (lambda p: p.sharded(2), lambda p: p.stored_as("int8"), lambda p: p.in_dtype("float16")):
            with pytest.raises(WorkloadError, match=message):
                change(profile)


def test_other_precisions_of_a_profile_are_those_of_its_config() -> None:
    config = config_of("mixtral-0")
    profile = ModelProfile.from_config(config, dtype="float32", granularity="sublayer")
    for dtype in ("float16", "bfloat16", "float32"):
        assert profile.in_dtype(dtype) == ModelProfile.from_config(config, dtype=dtype, granularity="sublayer")
    for stored in ("float8", "int8", "int4"):
        wanted = ModelProfile.from_config(config, dtype="float32", granularity="sublayer", weight_dtype=stored)
        assert profile.stored_as(stored) == wanted
        assert wanted.weight_dtype == stored
        assert wanted.digest == profile.digest
        assert wanted.stored_as(None) == profile
    assert profile.sharded(2).in_dtype("float16").tensor_parallel == 2
    with pytest.raises(ModelConfigError, match="dtype is 'int8'"):
        profile.in_dtype("int8")
    with pytest.raises(ModelConfigError, match="weight_dtype is 'int3'"):
        profile.stored_as("int3")


@pytest.mark.parametrize("name", ["mixtral-0", "qwen2_moe-0", "deepseek_v3-0", "gpt_oss-0", "llama-1"])
def test_active_parameters_are_those_that_one_token_passes(name: str) -> None:
    model = build(config_of(name))
    profile = ModelProfile.from_config(config_of(name))
    layers = {layer.name: layer for layer in profile.layers}
    active = 0
    for parameter, value in model.named_parameters():
        layer = layers[part_of(parameter, model.config.model_type)]
        share_of = layer.experts_per_token / layer.num_experts if ".experts." in parameter else 1
        active += round(value.numel() * share_of)
    assert profile.active_parameters == active
    assert (profile.active_parameters == profile.num_parameters) is (name == "llama-1")


@pytest.mark.parametrize("name", ["mixtral-0", "gpt_oss-0", "qwen2_moe-0"])
def test_expert_bytes_are_those_of_all_experts_and_no_traffic(name: str) -> None:
    model = build(config_of(name))
    for layer in ModelProfile.from_config(config_of(name), dtype="bfloat16").layers:
        theirs = [
            value.numel()
            for parameter, value in model.named_parameters()
            if ".experts." in parameter and part_of(parameter, model.config.model_type) == layer.name
        ]
        assert layer.expert_parameters == sum(theirs)
        assert layer.expert_bytes == 2 * sum(theirs)
        assert layer.weight_traffic_bytes <= layer.weight_bytes - layer.expert_bytes


def one_block(config: dict[str, Any]) -> dict[str, Any]:
    key = "num_layers" if config["model_type"] == "gpt_neo" else "num_hidden_layers"
    return {**config, key: 1}


ONE_BLOCK = [
    one_block({**config_of("mistral-1"), "sliding_window": 5}),
    one_block({**config_of("llama-0")}),
    one_block({**config_of("gpt_neo-1"), "attention_types": [[["local"], 1]], "window_size": 6}),
    one_block({**config_of("gemma3_text-0"), "layer_types": ["sliding_attention"]}),
    one_block(
        {**config_of("gemma3_text-0"), "layer_types": ["sliding_attention"], "use_bidirectional_attention": True}
    ),
    one_block({**config_of("gemma-0"), "use_bidirectional_attention": True}),
    one_block({**config_of("modernbert-0"), "layer_types": ["sliding_attention"]}),
    one_block({**config_of("modernbert-0"), "layer_types": ["sliding_attention"], "local_attention": 7}),
    one_block({**config_of("bert-0")}),
    one_block({**config_of("gpt_oss-0"), "layer_types": ["sliding_attention"]}),
]


@pytest.mark.parametrize("config", ONE_BLOCK, ids=lambda config: config["model_type"])
def test_windows_are_what_a_query_really_sees(config: dict[str, Any]) -> None:
    """Which inputs the output of one block depends on, by its gradient."""
    model, tokens = build(config, "cpu"), 16
    embeds = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    hidden = model.base_model(inputs_embeds=embeds).last_hidden_state
    layer = next(layer for layer in ModelProfile.from_config(config).layers if layer.kind == "block")
    for query in range(tokens):
        gradient = torch.autograd.grad(hidden[0, query, 0], embeds, retain_graph=True)[0]
        seen = [key for key in range(tokens) if gradient[0, key].any()]
        assert seen == [key for key in range(tokens) if sees(layer, query, key)]


def sees(layer: LayerCost, query: int, key: int) -> bool:
    if layer.causal:
        return key <= query and (layer.window is None or query - key < layer.window)
    return layer.window is None or abs(query - key) <= layer.window // 2


def test_layers_that_run_once_belong_to_encoders_of_decoders() -> None:
    for family in [*DECODERS, *ENCODERS]:
        assert not any(layer.runs_once for layer in ModelProfile.from_config(full_config(family)).layers)
    for family in TRANSLATORS:
        layers = ModelProfile.from_config(full_config(family), granularity="sublayer").layers
        assert [layer for layer in layers if layer.runs_once] == [
            layer for layer in layers if layer.name == "embedding" or layer.name.startswith("encoder ")
        ]


def test_measured_seconds_do_not_change_the_digest_and_layers_do() -> None:
    profile = ModelProfile.from_config(config_of("llama-0"))
    shorter = dataclasses.replace(profile, layers=profile.layers[:-1])
    assert profile.with_seconds([1.0] * profile.num_layers).digest == profile.digest != shorter.digest
