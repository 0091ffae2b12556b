"""What autograd keeps for the backward pass, against the tensors that it really keeps of small models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrunk import build, small_config

from lp_plugin import ModelProfile

ROWS, TOKENS = 2, 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLOSE = ["arcee-0", "ernie4_5-0", "gemma-1", "gpt_neox-0", "granite-1", "llama-0", "llama-1", "llama-2", "mistral-0"]
CLOSE += ["mixtral-0", "opt-0", "opt-1", "phi-0", "qwen2-0", "qwen3-0", "qwen3-1", "qwen3-2", "smollm3-1"]
CLOSE += ["starcoder2-0", "starcoder2-2", "distilbert-0", "falcon-0", "gpt2-0"]
CLOSE_IN_FLOAT32 = ["bert-0", "electra-0", "deepseek_v3-0", "glm4-0", "glm4_moe-1", "olmo-0", "olmo2-0", "gpt2-1"]
CLOSE_IN_FLOAT32 += ["phi3-1", "qwen2_moe-0", "qwen3_moe-0", "nemotron-0", "bart-0", "mbart-0"]


def config_of(name: str) -> dict[str, Any]:
    family, _, index = name.rpartition("-")
    return small_config(family, int(index))


def kept_bytes_per_token(config: dict[str, Any], dtype: torch.dtype) -> float:
    """Bytes of all storages that autograd keeps of a forward pass with loss, parameters and buffers left out."""
    model = build(config, "cpu").to(dtype)
    tensors = [*model.parameters(), *model.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given away again
        return tensor

    ids = torch.randint(2, 100, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = model(input_ids=ids, labels=ids).loss
    return sum(storage.nbytes() for storage in kept.values()) / (ROWS * TOKENS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CLOSE for dtype in DTYPES] + [(name, "float32") for name in CLOSE_IN_FLOAT32],
)
def test_saved_bytes_are_what_autograd_keeps(name: str, dtype: str) -> None:
    config = config_of(name)
    profile = ModelProfile.from_config(config, dtype=dtype)
    ours = sum(layer.saved_bytes_per_token for layer in profile.layers)
    assert ours == pytest.approx(kept_bytes_per_token(config, DTYPES[dtype]), rel=0.12)


def test_saved_bytes_of_the_reference_block_by_hand() -> None:
    """LayerNorms keep their input, all matrices theirs, attention q, k, v, output and a number per head, GELU both."""
    config = {"model_type": "starcoder2", "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 4}
    block = ModelProfile.from_config(config, dtype="float16").layers[1]
    attention = 2 * (64 + 64 + 4 * 64) + 4 * 4 + 8
    mlp = 2 * (64 + 64 + 2 * 256) + 8
    assert block.saved_bytes_per_token == attention + mlp


def test_a_device_of_a_group_keeps_its_share_of_inner_tensors() -> None:
    profile = ModelProfile.from_config(config_of("llama-1"), dtype="float32")
    whole, half = profile.layers[1], profile.sharded(2).layers[1]
    hidden = 4 * (2 * (2 + 1) * 64) + 2 * 4  # inputs, norms' inputs and outputs: all whole
    assert half.saved_bytes_per_token == hidden + (whole.saved_bytes_per_token - hidden) / 2
