"""Stored bytes of quantised models: by argument, and as a config's own section says."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from shrunk import SMALL, SMALL_IDS, build, part_of, small_config

from lp_plugin import ModelConfigError, ModelProfile, UnsupportedModelError

BITS = {"float8": Fraction(8), "int8": Fraction(8), "int4": 4 + Fraction(16, 128)}
LLAMA = small_config("llama", 1)  # with biases
MATRICES = 4 * 64 * 64 + 3 * 64 * 168
OTHERS = 4 * 64 + 2 * 168 + 64 + 2 * 64  # biases, norms


def block_bytes(section: Any, config: dict[str, Any] = LLAMA, **arguments: Any) -> int:
    profile = ModelProfile.from_config({**config, "quantization_config": section}, dtype="float16", **arguments)
    return profile.layers[1].weight_bytes


@pytest.mark.parametrize("config", SMALL, ids=SMALL_IDS)
@pytest.mark.parametrize("weight_dtype", sorted(BITS))
def test_matrices_of_blocks_alone_are_stored_otherwise(config: dict[str, Any], weight_dtype: str) -> None:
    plain = ModelProfile.from_config(config, dtype="bfloat16")
    stored = ModelProfile.from_config(config, dtype="bfloat16", weight_dtype=weight_dtype)
    routers = {"mlp.gate.weight", "mlp.router.weight", "block_sparse_moe.router.weight", "shared_expert_gate.weight"}
    tables = ("_norm.", "relative_attention", "_proj_bias")
    matrices: dict[str, int] = {}
    model = build(config)
    for name, value in model.named_parameters():
        part = part_of(name, model.config.model_type)
        kept = any(name.endswith(router) for router in routers) or any(table in name for table in tables)
        if "block" in part and value.dim() > 1 and not kept:
            matrices[part] = matrices.get(part, 0) + value.numel()
    for before, after in zip(plain.layers, stored.layers, strict=True):
        saved = matrices.get(before.name, 0) * (16 - BITS[weight_dtype]) / 8
        assert after.weight_bytes == pytest.approx(before.weight_bytes - saved, abs=3)  # halves are rounded up
        assert after.parameters == before.parameters
        assert after.flops_per_token == before.flops_per_token
        assert after.kv_bytes_per_token == before.kv_bytes_per_token
        assert after.weight_traffic_bytes <= after.weight_bytes - after.expert_bytes
    assert stored.num_parameters == plain.num_parameters
    assert stored.active_parameters == plain.active_parameters
    assert stored.digest == plain.digest


@pytest.mark.parametrize(
    ("section", "bits", "name"),
    [
        ({"quant_method": "fp8"}, 8, "float8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2, "float8"),
        ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, 8, "float8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128, "int4"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, 8 + 24 / 32, "int8"),
        ({"quant_method": "gptq", "bits": 3, "group_size": -1}, 3, "int3"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 4 + 20 / 64, "int4"),
        ({"quant_method": "awq"}, 4 + 20 / 128, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, 8, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4 + 32 / 64, "int4"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            4 + 8 / 64 + 32 / (64 * 256),
            "int4",
        ),
    ],
)
def test_sections_of_configs(section: dict[str, Any], bits: float, name: str) -> None:
    expected = MATRICES * bits / 8 + 2 * OTHERS
    assert expected <= block_bytes(section) <= expected + 2
    profile = ModelProfile.from_config({**LLAMA, "quantization_config": section})
    assert profile.weight_dtype == name
    assert profile.layers[0].weight_bytes == 4 * 123 * 64  # float32, as the rest of this config


def test_mxfp4_is_for_experts_alone() -> None:
    config = small_config("gpt_oss")
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    plain = ModelProfile.from_config(config, dtype="bfloat16").layers[1]
    packed = ModelProfile.from_config({**config, "quantization_config": section}, dtype="bfloat16").layers[1]
    experts = 5 * 3 * 64 * 168
    biases = 5 * (2 * 168 + 64)
    assert packed.expert_bytes == math.ceil(experts * 4.25 / 8) + 2 * biases
    assert packed.weight_bytes - packed.expert_bytes == plain.weight_bytes - plain.expert_bytes
    assert block_bytes({"quant_method": "mxfp4"}) == 2 * (MATRICES + OTHERS)


def test_the_argument_goes_before_the_section() -> None:
    assert block_bytes({"quant_method": "gptq", "bits": 4}, weight_dtype="int8") == MATRICES + 2 * OTHERS
    assert block_bytes({"quant_method": "nobody's"}, weight_dtype="int8") == MATRICES + 2 * OTHERS
    assert block_bytes(None) == 2 * (MATRICES + OTHERS)


def test_a_section_above_a_language_model_holds_for_it() -> None:
    config = {"model_type": "llava", "text_config": LLAMA, "quantization_config": {"quant_method": "fp8"}}
    assert ModelProfile.from_config(config).weight_dtype == "float8"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], "quantization_config is a list; it must be an object"),
        ({"quant_method": "gptq", "bits": 5.0}, "bits is 5.0; it must be a whole number of 2 to 8"),
        ({"quant_method": "gptq", "bits": 1}, "bits is 1"),
        ({"quant_method": "gptq", "bits": True}, "bits is True"),
        ({"quant_method": "awq", "bits": float("nan")}, "bits is nan"),
        ({"quant_method": "awq", "group_size": 0}, "group_size is 0"),
        ({"quant_method": "awq", "group_size": "128"}, "group_size is '128'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]; it must be two"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit or load_in_8bit; both are false"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": "yes"}, "load_in_4bit is 'yes'; it must be true or false"),
    ],
)
def test_broken_sections(section: Any, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        block_bytes(section)


@pytest.mark.parametrize("method", ["hqq", None, 4, ["gptq"]])
def test_unknown_methods_are_named_with_those_known(method: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quant_method is .*awq, bitsandbytes, fp8, gptq, mxfp4.*Take"):
        block_bytes({"quant_method": method})


@pytest.mark.parametrize("weight_dtype", ["int3", "fp8", "", 8])
def test_unknown_weight_dtypes(weight_dtype: Any) -> None:
    with pytest.raises(ModelConfigError, match=r"weight_dtype is .*supported are float8, int4, int8"):
        ModelProfile.from_config(LLAMA, weight_dtype=weight_dtype)
