"""Profiles against transformers' own models: parameters on the meta device, KV cache of a real forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import STEADY, profiles
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from lp_plugin import LayerCost, ModelConfigError, ModelProfile
from lp_plugin.architecture import FAMILIES

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"

SMALL: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24},
        {"num_attention_heads": 4, "num_key_value_heads": None, "attention_bias": True, "mlp_bias": True},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
    ],
    "mistral": [
        {"num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": None},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": None},
    ],
    "qwen2": [
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "use_sliding_window": True, "max_window_layers": 1},
    ],
    "qwen3": [
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 40, "tie_word_embeddings": True},
    ],
    "starcoder2": [
        {"num_attention_heads": 8, "num_key_value_heads": 2, "use_bias": False},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "use_bias": True, "tie_word_embeddings": False},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
    ],
    "gpt_neox": [
        {"num_attention_heads": 8},
        {"num_attention_heads": 4, "attention_bias": False, "tie_word_embeddings": True},
        {"num_attention_heads": 2, "use_parallel_residual": False},
    ],
    "gpt2": [
        {"n_head": 8},
        {"n_head": 4, "n_inner": 100, "tie_word_embeddings": False},
        {"n_head": 2, "n_positions": 77, "n_inner": None},
    ],
}
SHAPE = {"vocab_size": 123, "hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 3,
         "max_position_embeddings": 99}  # fmt: skip
GPT2_SHAPE = {"vocab_size": 123, "n_embd": 64, "n_layer": 3, "n_positions": 99}


def small_config(model_type: str, index: int) -> dict[str, Any]:
    shape = GPT2_SHAPE if model_type == "gpt2" else SHAPE
    return {**shape, "bos_token_id": 0, "eos_token_id": 0, **SMALL[model_type][index], "model_type": model_type}


CONFIGS = [{"model_type": model_type} for model_type in sorted(FAMILIES)]
CONFIGS += [small_config(model_type, index) for model_type in sorted(SMALL) for index in range(3)]


def name_of(config: dict[str, Any]) -> str:
    own = {key: value for key, value in config.items() if key in {"head_dim", "n_head", "num_attention_heads"}}
    return "-".join([config["model_type"], *(f"{key}{value}" for key, value in own.items())] if own else ["default"])


def build(config: dict[str, Any], device: str = "meta") -> PreTrainedModel:
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parts(model: PreTrainedModel) -> list[int]:
    """Parameters of embedding, each block, norm and head, as the model holds them."""
    base = model.base_model
    sizes: dict[str, list[int]] = {"embedding": [0], "blocks": [], "norm": [0]}
    for name, child in base.named_children():
        if isinstance(child, torch.nn.ModuleList):
            sizes["blocks"] += [numel(block) for block in child]
        else:
            sizes["norm" if isinstance(child, torch.nn.LayerNorm) or "norm" in name else "embedding"][0] += numel(child)
    return [*sizes["embedding"], *sizes["blocks"], *sizes["norm"], numel(model.get_output_embeddings())]


def test_every_family_is_tested() -> None:
    assert sorted(SMALL) == sorted(FAMILIES)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_parameters_are_those_of_transformers(config: dict[str, Any]) -> None:
    model = build(config)
    profile = ModelProfile.from_config(config, dtype="bfloat16")
    assert [layer.parameters for layer in profile.layers] == parts(model)
    assert profile.num_parameters == numel(model)  # shared ones once
    assert [layer.weight_bytes for layer in profile.layers] == [2 * size for size in parts(model)]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (profile.layers[0].shared_key is not None) is (profile.layers[-1].shared_key is not None) is tied
    limit = getattr(model.config, "max_position_embeddings", None)
    assert profile.max_positions == limit


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_products_are_the_matrices_of_transformers(config: dict[str, Any]) -> None:
    """2 FLOPs per token for every weight of a matrix, biases and norms left out."""
    model = build(config)
    profile = ModelProfile.from_config(config)
    blocks = next(child for child in model.base_model.children() if isinstance(child, torch.nn.ModuleList))
    matrices = [sum(weight.numel() for weight in block.parameters() if weight.dim() == 2) for block in blocks]
    assert [layer.flops_per_token for layer in profile.layers[1:-2]] == [2.0 * size for size in matrices]
    assert profile.layers[-1].flops_per_token == 2.0 * model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("config", [config for config in CONFIGS if len(config) > 1], ids=name_of)
def test_kv_cache_is_that_of_a_real_forward(config: dict[str, Any]) -> None:
    config = {**config, "use_cache": True}
    model = build(config, "cpu").eval()
    profile = ModelProfile.from_config(config, dtype="float32")
    cache = DynamicCache()
    sequences, tokens = 2, 5
    with torch.inference_mode():
        model(input_ids=torch.ones(sequences, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    kept = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert [layer.kv_bytes_per_token * sequences * tokens for layer in profile.layers[1:-2]] == kept
    assert {profile.layers[index].kv_bytes_per_token for index in (0, -2, -1)} == {0}


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
        ({"seconds": []}, "no layers"),
        ({"seconds": [1, 2], "weight_bytes": [1]}, "weight_bytes has 1 entries for 2 layers"),
        ({"seconds": [1, 2], "output_bytes": [1, 2, 3]}, "output_bytes_per_token has 3 entries for 2 layers"),
        ({"seconds": [1, 2], "names": ["only one"]}, "1 entries for 2 layers"),
        ({"seconds": [1, 2], "names": ["one", "two", "three"]}, "3 entries for 2 layers"),
        ({"seconds": [1, -2]}, "seconds holds -2"),
        ({"seconds": [1, float("nan")]}, "seconds holds nan"),
        ({"seconds": [1, float("inf")]}, "seconds holds inf"),
        ({"seconds": [1], "weight_bytes": [-1]}, "weight_bytes holds -1"),
    ],
)
def test_from_costs_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        ModelProfile.from_costs(**arguments)


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
