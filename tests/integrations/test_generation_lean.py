"""Passes in fewer kernels: the same numbers as transformers' own way, which is back afterwards."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from families import FAMILIES, make_config, make_model
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.models.llama import modeling_llama

from lp_plugin.integrations.deepspeed.generation.lean import LeanPass, lean_cache
from lp_plugin.integrations.transformers.decoder import CACHE_ARGUMENT

BLOCKS, LENGTH, PROMPT, NEW = 3, 12, 6, 3


def new_cache() -> Cache:
    return Cache(layers=[StaticLayer(max_cache_len=LENGTH) for _ in range(BLOCKS)])


@torch.no_grad()
def passes(model: PreTrainedModel, cache: Cache) -> list[torch.Tensor]:
    """Logits of a left-padded prefill and some decode passes."""
    ids = torch.arange(2 * (PROMPT + NEW)).view(2, -1)
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    mask[0, :PROMPT] = 1
    mask[1, 2:PROMPT] = 1
    positions = torch.stack([torch.arange(PROMPT + NEW), (torch.arange(PROMPT + NEW) - 2).clamp(min=0)])
    found = []
    for start, stop in ((0, PROMPT), *((PROMPT + step, PROMPT + step + 1) for step in range(NEW))):
        mask[:, PROMPT:stop] = 1
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, start:stop]}
        if model.config.model_type == "bloom":
            del inputs["position_ids"]
        found.append(model(ids[:, start:stop], use_cache=True, **{CACHE_ARGUMENT: cache}, **inputs).logits[:, -1])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(family: str) -> None:
    model = make_model(make_config(family, BLOCKS))
    expected = passes(model, new_cache())
    cache = lean_cache(new_cache(), torch.device("cpu"))
    for _ in range(2):
        with LeanPass(model):
            torch.testing.assert_close(passes(model, cache), expected, rtol=1e-5, atol=1e-5)
        cache.reset()  # and once more from the start


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 2 * BLOCKS + 1), ("qwen3", 4 * BLOCKS + 1), ("gemma2", 0), ("gpt2", 0)]
)
def test_norms_are_replaced_where_they_compute_the_same(family: str, count: int) -> None:
    model = make_model(make_config(family, BLOCKS))
    with LeanPass(model):
        assert sum("forward" in module.__dict__ for module in model.modules()) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_padding_get_numbers_and_masked_keys_no_share(dtype: torch.dtype) -> None:
    with LeanPass(make_model(make_config("llama", 1))):
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=1, q_length=3, kv_length=4, attention_mask=torch.tensor([[0, 1, 1, 0]]).bool(), dtype=dtype
        )
    shares = (torch.full((4,), 9.0, dtype=dtype) + mask).softmax(dim=-1)
    assert shares.isfinite().all()
    torch.testing.assert_close(
        shares[0, 0, 1:].float(), torch.tensor([[0.0, 1, 0, 0], [0, 0.5, 0.5, 0]]), rtol=0, atol=0
    )


def fail_inside(lean: LeanPass) -> None:
    with lean:
        raise RuntimeError("in between")


def test_everything_is_back_afterwards() -> None:
    model = make_model(make_config("llama", 1))
    lean, rotation = LeanPass(model), modeling_llama.apply_rotary_pos_emb
    with lean:
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_mask
        assert modeling_llama.apply_rotary_pos_emb is not rotation
    for _ in range(2):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
        assert modeling_llama.apply_rotary_pos_emb is rotation
        assert not any("forward" in module.__dict__ for module in model.modules())
        with pytest.raises(RuntimeError, match="in between"):
            fail_inside(lean)


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_other_rotations_stay(family: str) -> None:
    model = make_model(make_config(family, 1))
    source = sys.modules[type(model).__module__]
    before = getattr(source, "apply_rotary_pos_emb", None)
    with LeanPass(model):
        assert getattr(source, "apply_rotary_pos_emb", None) is before


def test_the_cache_holds_what_static_layers_hold() -> None:
    model = make_model(make_config("llama", BLOCKS))
    plain, lean = new_cache(), lean_cache(new_cache(), torch.device("cpu"))
    passes(model, plain)
    passes(model, lean)
    assert int(plain.get_seq_length()) == int(lean.get_seq_length()) == PROMPT + NEW
    for theirs, ours in zip(plain.layers, lean.layers, strict=True):
        assert torch.equal(theirs.keys, ours.keys)
        assert torch.equal(theirs.values, ours.values)
