"""Profiles: windows, the reference model in numbers, precisions, digests, and profiles from plain costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shrunk import small_config
from strategies import STEADY, profiles
from transformers import AutoConfig

from lp_plugin import LayerCost, ModelConfigError, ModelProfile
from lp_plugin.quantity import shown

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"


def test_windows_are_those_of_transformers() -> None:
    qwen = {**small_config("qwen2", 2), "sliding_window": 7}
    assert [layer.window for layer in ModelProfile.from_config(qwen).layers] == [None, None, 7, 7, None, None]
    assert AutoConfig.for_model(**qwen).layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    listed = ModelProfile.from_config({**qwen, "layer_types": types})
    assert [layer.window for layer in listed.layers[1:-2]] == [7, None, 7]
    unused = ModelProfile.from_config({**qwen, "use_sliding_window": False})
    assert {layer.window for layer in unused.layers} == {None}
    mistral = ModelProfile.from_config({**small_config("mistral", 1), "sliding_window": 9})
    assert [layer.window for layer in mistral.layers[1:-2]] == [9, 9, 9]


def test_the_reference_model_in_numbers() -> None:
    profile = ModelProfile.from_config(DENSE16)
    hidden, norms = 8192, 4 * 8192
    assert profile.dtype == "float16"
    assert [layer.name for layer in profile.layers] == ["embedding", *(f"block {i}" for i in range(16)), "norm", "head"]
    block = profile.layers[1]
    assert block.flops_per_token == 2 * 12 * hidden**2
    assert block.parameters == 12 * hidden**2 + norms == 805_339_136
    assert block.weight_bytes == 1_610_678_272  # 1.61 GB
    assert sum(layer.kv_bytes_per_token for layer in profile.layers) == 524_288
    assert block.output_bytes_per_token * 1024 * 10_000 == 167_772_160_000  # 167.8 GB
    assert block.flops_per_pair == 4 * hidden
    assert profile.num_parameters == 16 * block.parameters + 2 * 264 * hidden + 2 * hidden


def test_buffers_and_traffic_of_the_reference_block() -> None:
    hidden, inner = 8192, 32768
    block = ModelProfile.from_config(DENSE16).layers[1]
    # residual and normed input, then the larger of attention (q, k, v, output) and MLP (both inner activations)
    assert block.buffer_bytes_per_token == 2 * (2 * hidden + max(4 * hidden, 2 * inner))
    norms = 2 * 2 * hidden
    attention = (hidden + 3 * hidden) + (3 * hidden + hidden) + (hidden + hidden)
    mlp = (hidden + inner) + (inner + inner) + (inner + hidden)
    residuals = 2 * 3 * hidden
    assert block.traffic_bytes_per_token == 2 * (norms + attention + mlp + residuals)


def test_a_path_a_directory_and_a_mapping_are_the_same(tmp_path: Path) -> None:
    config = small_config("llama", 0)
    directory = tmp_path / "my-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    from_directory, from_file = (ModelProfile.from_config(path) for path in (directory, directory / "config.json"))
    assert from_directory == from_file
    assert from_directory.name == "my-model"
    assert from_directory.layers == ModelProfile.from_config(config).layers
    assert ModelProfile.from_config(str(directory)) == from_directory


def test_dtype_of_the_config_and_by_argument() -> None:
    config = small_config("llama", 0)
    assert ModelProfile.from_config(config).dtype == "float32"
    assert ModelProfile.from_config({**config, "torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert ModelProfile.from_config({**config, "dtype": "float16", "torch_dtype": "bfloat16"}).dtype == "float16"
    wide, half = (ModelProfile.from_config(config, dtype=dtype) for dtype in ("float32", "float16"))
    assert wide.layers[1].weight_bytes == 2 * half.layers[1].weight_bytes
    assert wide.digest == half.digest  # the same model


def test_digest_tells_models_apart() -> None:
    config = small_config("llama", 0)
    same, other = ModelProfile.from_config(dict(config)), ModelProfile.from_config({**config, "intermediate_size": 64})
    assert same.digest == ModelProfile.from_config(config).digest != other.digest
    assert len(same.digest) == 64


def test_from_costs() -> None:
    profile = ModelProfile.from_costs([1, 2.5], weight_bytes=[3, 4], output_bytes=[5, 6], names=["a", "b"], name="c")
    assert (profile.name, profile.num_layers) == ("c", 2)
    assert [layer.name for layer in profile.layers] == ["a", "b"]
    assert [layer.seconds for layer in profile.layers] == [1, 2.5]
    assert [layer.weight_bytes for layer in profile.layers] == [3, 4]
    assert [layer.output_bytes_per_token for layer in profile.layers] == [5, 6]
    assert [layer.name for layer in ModelProfile.from_costs([1, 1]).layers] == ["layer 0", "layer 1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": []}, "no layers; a model has 1 to 20000 layers"),
        ({"seconds": [1] * 20_001}, "seconds has 20001 entries; a model has 1 to 20000 layers"),
        ({"seconds": 5}, "seconds is 5; give a list"),
        ({"seconds": [1, 2], "weight_bytes": [1]}, "weight_bytes has 1 entries for 2 layers"),
        ({"seconds": [1, 2], "weight_bytes": 1}, "weight_bytes is 1; give a list"),
        ({"seconds": [1, 2], "output_bytes": [1, 2, 3]}, "output_bytes_per_token has 3 entries for 2 layers"),
        ({"seconds": [1, 2], "names": ["only one"]}, "1 entries for 2 layers"),
        ({"seconds": [1, 2], "names": ["one", "two", "three"]}, "3 entries for 2 layers"),
        ({"seconds": [1, 2], "names": ["same", "same"]}, "names holds 'same' at position 1, and at position 0 already"),
        ({"seconds": [1, 2], "names": ["one", 2]}, "names holds 2 at position 1; names are text"),
        ({"seconds": [1, -2]}, "seconds holds -2 at position 1; costs are finite and not negative"),
        ({"seconds": [1, float("nan")]}, "seconds holds nan at position 1"),
        ({"seconds": [float("inf"), 1]}, "seconds holds inf at position 0"),
        ({"seconds": [1, float("-inf")]}, "seconds holds -inf at position 1"),
        ({"seconds": [10**400]}, "seconds holds 1000.*at position 0; costs are finite"),
        ({"seconds": [1, "2"]}, "seconds holds '2' at position 1; costs are numbers"),
        ({"seconds": [1, None]}, "seconds holds None at position 1; costs are numbers"),
        ({"seconds": [True]}, "seconds holds True at position 0; costs are numbers"),
        ({"seconds": [1j]}, "seconds holds 1j at position 0; costs are numbers"),
        ({"seconds": [[1]]}, r"seconds holds \[1\] at position 0; costs are numbers"),
        ({"seconds": "12"}, "seconds holds '1' at position 0; costs are numbers"),
        ({"seconds": [1], "weight_bytes": [-1]}, "weight_bytes holds -1 at position 0"),
        ({"seconds": [1, 1], "weight_bytes": [1, 1.5]}, "weight_bytes holds 1.5 at position 1: a fraction of a byte"),
        ({"seconds": [1], "weight_bytes": [float("nan")]}, "weight_bytes holds nan at position 0"),
        ({"seconds": [1], "output_bytes": [{}]}, "output_bytes_per_token holds {} at position 0; costs are numbers"),
    ],
)
def test_from_costs_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        ModelProfile.from_costs(**arguments)


def test_costs_may_come_from_arrays() -> None:
    profile = ModelProfile.from_costs(
        np.array([1.5, 2]), weight_bytes=np.array([3, 4]), output_bytes=np.float32([5, 6])
    )
    assert profile == ModelProfile.from_costs([1.5, 2], weight_bytes=[3, 4], output_bytes=[5, 6])
    assert {type(layer.weight_bytes) for layer in profile.layers} == {int}


def test_as_many_layers_as_there_may_be() -> None:
    profile = ModelProfile.from_costs([1.0] * 20_000)
    assert (profile.num_layers, profile.layers[-1].name) == (20_000, "layer 19999")
    assert len(profile.digest) == 64


def test_measured_seconds_replace_the_estimate() -> None:
    profile = ModelProfile.from_config(small_config("llama", 0))
    measured = profile.with_seconds([0.5] * profile.num_layers)
    assert {(layer.seconds, layer.backward_seconds) for layer in measured.layers} == {(0.5, None)}
    assert measured.digest == profile.digest
    both = profile.with_seconds([0.5] * profile.num_layers, [1.5] * profile.num_layers)
    assert {(layer.seconds, layer.backward_seconds) for layer in both.layers} == {(0.5, 1.5)}


@STEADY
@given(profiles(max_layers=8))
def test_shared_parameters_count_once(profile: ModelProfile) -> None:
    shared = [layer for layer in profile.layers if layer.shared_key]
    twice = sum(layer.shared_bytes // 2 for layer in shared[1:])
    assert profile.num_parameters == sum(layer.parameters for layer in profile.layers) - twice


@STEADY
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_any_finite_costs_make_a_profile(seconds: list[float]) -> None:
    assert [layer.seconds for layer in ModelProfile.from_costs(seconds).layers] == seconds


def test_layers_are_values() -> None:
    assert LayerCost(name="a") == LayerCost(name="a")
    assert len({LayerCost(name="a"), LayerCost(name="a")}) == 1


WHOLE = ["block", "parameters", "weight_bytes", "shared_bytes", "weight_traffic_bytes", "window",
         "kv_bytes_per_token", "kv_window", "expert_bytes", "expert_parameters", "num_experts", "experts_per_token",
         "num_all_reduces"]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("weight_bytes", value) for value in (-1, None, "1", True, float("nan"), 10**400)),
        *(("flops_per_token", value) for value in (float("inf"), float("nan"), -0.5)),
        *(("seconds", value) for value in (float("inf"), float("nan"), -1.0)),
        ("window", -1),
        ("kv_window", float("nan")),
        *((field, 1.5) for field in WHOLE),
        *(("block", value) for value in (-1, "x", True)),
        *((field, value) for field in ("causal", "runs_once") for value in (None, 0, 1, "x")),
        *(("kind", value) for value in (5, None, ["x"])),
        *(("shared_key", value) for value in (5, ["x"])),
    ],
)
def test_costs_that_are_no_amounts_are_refused(field: str, value: Any) -> None:
    layers = (LayerCost(name="good"), LayerCost(name="bad", **{field: value}))
    with pytest.raises(ModelConfigError, match=f"layer 'bad': {field} is "):
        ModelProfile(name="made by hand", layers=layers, dtype="float32")


def test_experts_that_no_token_can_pass_are_refused() -> None:
    layer = LayerCost(name="bad", expert_bytes=8, num_experts=2, experts_per_token=3)
    with pytest.raises(ModelConfigError, match="experts_per_token is 3 of num_experts 2"):
        ModelProfile(name="made by hand", layers=(layer,), dtype="float32")


def test_layers_of_one_name_are_refused() -> None:
    layers = (LayerCost(name="a"), LayerCost(name="b"), LayerCost(name="a"))
    with pytest.raises(ModelConfigError, match="the name 'a' stands for two layers"):
        ModelProfile(name="made by hand", layers=layers, dtype="float32")


@pytest.mark.parametrize("name", [5, None, ["x"]], ids=shown)
def test_names_of_layers_are_text(name: Any) -> None:
    with pytest.raises(ModelConfigError) as caught:
        ModelProfile(name="made by hand", layers=(LayerCost(name=name),), dtype="float32")
    assert str(caught.value) == f"layer {shown(name)}: name is {shown(name)}; it must be text."


def test_measured_costs_may_be_floats_of_numpy() -> None:
    profile = ModelProfile.from_costs([1.0]).with_seconds(list(np.array([0.5])), list(np.array([1.5])))
    assert (profile.layers[0].seconds, profile.layers[0].backward_seconds) == (0.5, 1.5)


@pytest.mark.parametrize(
    ("field", "values", "bound"),
    [
        ("name", (5, None), "text"),
        ("input_bytes_per_token", (-1, "x", None, True, math.nan, math.inf), r"a number of 0 to 1.79769e\+308"),
        ("tensor_parallel", (0, 2**20 + 1, -1, "x", None, 1.0, True), "a whole number of 1 to 1048576"),
        ("max_positions", (0, math.nan, "x", 1.5, -1, True), r"a whole number of 1 to 2\*\*63, or None"),
        ("weight_dtype", (5, b"int8"), "text"),
        ("dtype", ("float64", "", "x", 5, None, ["float32"]), "one of bfloat16, float16, float32"),
        ("granularity", ("x", None, ["layer"]), "layer or sublayer"),
        ("measured_on", ("x", 5), "a Device or None"),
        ("architecture", ("x", 5), "an Architecture or None"),
        ("layers", (None, 5, [LayerCost(name="a")]), "a tuple of LayerCost"),
    ],
)
def test_fields_of_profiles(field: str, values: tuple[Any, ...], bound: str) -> None:
    for value in values:
        fields = {"name": "made by hand", "layers": (LayerCost(name="a"),), "dtype": "float32", field: value}
        with pytest.raises(ModelConfigError, match=f"^model .*: {field} is .*; it must be {bound}"):
            ModelProfile(**fields)


def test_layers_are_layer_costs() -> None:
    layers: Any = (LayerCost(name="a"), 2)
    with pytest.raises(ModelConfigError, match="layers holds 2 at position 1; give a LayerCost for each"):
        ModelProfile(name="made by hand", layers=layers, dtype="float32")


def test_weights_may_be_stored_under_any_name() -> None:
    profile = ModelProfile(name="own", layers=(LayerCost(name="a"),), dtype="float32", weight_dtype="zz")
    assert profile.weight_dtype == "zz"


@pytest.mark.parametrize("config", [5, None, b"x", ["x"]], ids=shown)
def test_a_config_that_is_neither_path_nor_mapping_is_refused(config: Any) -> None:
    with pytest.raises(ModelConfigError, match=r"the config is .*; give a model directory, a config\.json, or its"):
        ModelProfile.from_config(config)
