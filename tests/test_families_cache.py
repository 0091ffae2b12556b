"""KV bytes against what transformers' own cache holds after a real prefill, below and above the windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shrunk import DECODERS, SMALL, TRANSLATORS, VARIANTS, build, small_config, their_config
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

from lp_plugin import LayerCost, ModelProfile
from lp_plugin.integrations.transformers.decoder import CACHE_ARGUMENT

SEQUENCES = 2
DECODING = [config for config in SMALL if config["model_type"] in DECODERS]


def name_of(config: dict[str, Any]) -> str:
    family = config["model_type"]
    index = [small_config(family, index) for index in range(len(VARIANTS[family]))].index(config)
    return f"{family}-{index}"


def kept_bytes(layer: LayerCost, tokens: int) -> int:
    """What the profile says that a layer keeps of so many tokens."""
    kept = tokens if layer.kv_window is None else min(tokens, layer.kv_window)
    return layer.kv_bytes_per_token * kept * SEQUENCES


def cached_bytes(cache: DynamicCache) -> list[int]:
    """Bytes of each layer's keys and values."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


@pytest.mark.parametrize("config", DECODING, ids=name_of)
def test_cache_of_a_decoder(config: dict[str, Any]) -> None:
    model = build({**config, "use_cache": True}, "cpu")
    profile = ModelProfile.from_config(config, dtype="float32")
    blocks = [layer for layer in profile.layers if layer.kind == "block"]
    for tokens in (5, 13):  # windows are 2 to 9
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.full((SEQUENCES, tokens), 3), use_cache=True, **{CACHE_ARGUMENT: cache})
        assert [kept_bytes(layer, tokens) for layer in blocks] == cached_bytes(cache)
    others = [layer for layer in profile.layers if layer.kind != "block"]
    assert {(layer.kv_bytes_per_token, layer.kv_window) for layer in others} == {(0, None)}


@pytest.mark.parametrize("family", TRANSLATORS)
def test_cache_of_an_encoder_decoder(family: str) -> None:
    """Keys and values of the target and of a source that is as long."""
    config = small_config(family)
    model, tokens = build({**config, "use_cache": True}, "cpu"), 7
    profile = ModelProfile.from_config(config, dtype="float32")
    ids = torch.full((SEQUENCES, tokens), 3)
    with torch.inference_mode():
        cache = model(ids, decoder_input_ids=ids, use_cache=True).past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    both = zip(cached_bytes(cache.self_attention_cache), cached_bytes(cache.cross_attention_cache), strict=True)
    decoders = [layer for layer in profile.layers if layer.name.startswith("decoder block")]
    assert [kept_bytes(layer, tokens) for layer in decoders] == [own + cross for own, cross in both]
    assert {layer.kv_bytes_per_token for layer in profile.layers if layer not in decoders} == {0}


def test_cache_of_an_encoder_that_was_made_a_decoder() -> None:
    config = {**small_config("bert"), "is_decoder": True, "use_cache": True}
    model, tokens = AutoModelForCausalLM.from_config(their_config(config)).eval(), 6
    with torch.inference_mode():
        cache = model(torch.full((SEQUENCES, tokens), 3), use_cache=True).past_key_values
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    blocks = [layer for layer in ModelProfile.from_config(config).layers if layer.kind == "block"]
    assert [kept_bytes(layer, tokens) for layer in blocks] == cached_bytes(own)
    assert all(layer.causal for layer in blocks)


def test_windows_and_what_is_kept_of_them() -> None:
    """A cache keeps the window without the token that is coming; GPT-Neo's keeps everything."""
    mistral, wide, neo = (
        ModelProfile.from_config(small_config(*which)).layers[-3]
        for which in (("mistral", 1), ("mistral", 0), ("gpt_neo", 0))
    )
    assert (mistral.window, mistral.kv_window) == (6, 5)
    assert (wide.window, wide.kv_window) == (None, None)
    assert (neo.window, neo.kv_window) == (6, None)


def test_a_window_of_one_token_is_not_cut() -> None:
    """transformers keeps the last ``-window + 1`` positions, which for a window of 1 are all of them."""
    config = {**small_config("mistral", 0), "sliding_window": 1}
    model, tokens = build({**config, "use_cache": True}, "cpu"), 4
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.full((SEQUENCES, tokens), 3), use_cache=True, **{CACHE_ARGUMENT: cache})
    blocks = [layer for layer in ModelProfile.from_config(config).layers if layer.kind == "block"]
    assert [kept_bytes(layer, tokens) for layer in blocks] == cached_bytes(cache)


def test_a_latent_cache_is_far_smaller_than_the_heads_it_expands_to() -> None:
    attention = ModelProfile.from_config({"model_type": "deepseek_v3"}, dtype="bfloat16").layers[1]
    assert attention.kv_bytes_per_token == 2 * (512 + 64)
    assert 128 * (192 + 128) * 2 / attention.kv_bytes_per_token > 70
