"""Every family against transformers' own models on the meta device: parameters part by part, and products."""

from __future__ import annotations

import ast
import subprocess
import sys
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
    VARIANTS,
    build,
    full_config,
    numel,
    parameters_by_part,
    small_config,
    their_config,
)
from transformers import PreTrainedModel

from lp_plugin import LayerCost, ModelProfile
from lp_plugin.model.architecture import Experts, read_architecture, read_config
from lp_plugin.model.families import FAMILIES

FULL = [full_config(family) for family in sorted(FAMILIES)]
ALL = SMALL + FULL
ALL_IDS = SMALL_IDS + sorted(FAMILIES)


def test_every_family_has_small_configs_that_differ() -> None:
    assert sorted(VARIANTS) == sorted(FAMILIES)
    assert all(len(variants) >= 2 for variants in VARIANTS.values())
    assert len(DECODERS) >= 30
    assert len(FAMILIES) >= 50


@pytest.mark.parametrize("config", ALL, ids=ALL_IDS)
def test_parameters_and_products_are_those_of_transformers(config: dict[str, Any]) -> None:
    model = build(config)
    profile = ModelProfile.from_config(config, dtype="bfloat16")
    theirs = parameters_by_part(model)
    ours = {layer.name: layer for layer in profile.layers}
    assert len(ours) == profile.num_layers
    assert set(theirs) <= set(ours)
    assert set(ours) - set(theirs) <= {"norm"}  # of a family whose norms have no parameters
    for name, layer in ours.items():
        parameters = theirs.get(name, {})
        assert layer.parameters == numel(parameters), name
        assert layer.weight_bytes == 2 * numel(parameters), name
        if layer.kind in {"block", "head"}:
            assert layer.flops_per_token == 2 * touched(parameters, layer, model), name
    assert profile.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shared_between_parts(theirs) == sum(layer.shared_bytes // 2 for layer in profile.layers if layer.shared_key)


def touched(parameters: dict[str, torch.nn.Parameter], layer: LayerCost, model: PreTrainedModel) -> int:
    """Weights of matrices that one token is multiplied with: tables of norms and positions are none."""
    total = 0
    for name, parameter in parameters.items():
        if parameter.dim() == 3:  # experts
            total += parameter[0].numel() * layer.experts_per_token
            assert parameter.shape[0] == layer.num_experts
        elif parameter.dim() == 2 and not any(part in name for part in ("_norm.", "relative_attention", "_proj_bias")):
            total += parameter.numel()
    return total


def shared_between_parts(parts: dict[str, dict[str, torch.nn.Parameter]]) -> int:
    """Elements that a part shares with another, counted in each."""
    everywhere = [parameter for part in parts.values() for parameter in part.values()]
    return sum(p.numel() for p in everywhere if sum(p is other for other in everywhere) > 1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    """Sizes that parameters do not show."""
    config = full_config(family)
    ours, theirs = read_architecture(config), their_config(config)
    last = ours.blocks[-1].attention
    heads = getattr(theirs, "decoder_attention_heads", None) or theirs.num_attention_heads
    assert last.num_heads == heads
    if family in TRANSLATORS:
        assert len(ours.encoder_blocks) == theirs.num_hidden_layers
        assert len(ours.blocks) == getattr(theirs, "decoder_layers", None) or theirs.num_decoder_layers
    else:
        assert ours.num_layers == len(ours.blocks) == theirs.num_hidden_layers
    positions = getattr(theirs, "max_position_embeddings", None) or getattr(theirs, "max_seq_len", None)
    if family in {"roberta", "camembert", "xlm-roberta"}:
        positions -= theirs.pad_token_id + 1
    assert ours.max_positions == (None if family == "bloom" else positions)
    kinds = getattr(theirs, "layer_types", None)
    if kinds is not None and theirs.sliding_window:
        assert [block.attention.window is not None for block in ours.blocks] == [
            kind == "sliding_attention" for kind in kinds
        ]
    mlp = ours.blocks[-1].mlp
    named = mlp.expert.activation if isinstance(mlp, Experts) else mlp.activation
    keys = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
    assert {getattr(theirs, key) for key in keys if hasattr(theirs, key)} <= {named}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    for config in (full_config(family), small_config(family, 0), small_config(family, 1)):
        their_config(config).save_pretrained(tmp_path)
        assert read_architecture(read_config(tmp_path)) == read_architecture(config)


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_sees_both_ways_and_caches_nothing(family: str) -> None:
    layers = ModelProfile.from_config(small_config(family)).layers
    assert not any(layer.kv_bytes_per_token or layer.runs_once for layer in layers)
    assert not any(layer.causal for layer in layers if layer.kind == "block")


def test_a_window_of_an_encoder_is_both_sides_together() -> None:
    layers = ModelProfile.from_config(small_config("modernbert")).layers
    assert [layer.window for layer in layers if layer.kind == "block"] == [None, 8, 8]
    assert their_config(small_config("modernbert")).sliding_window == 4  # to each side
    gemma = {**small_config("gemma3_text"), "use_bidirectional_attention": True}
    assert [layer.window for layer in ModelProfile.from_config(gemma).layers if layer.kind == "block"] == [6, None, 6]
    assert their_config(gemma).sliding_window - 1 == 3  # to each side
    assert not any(layer.causal for layer in ModelProfile.from_config(gemma).layers if layer.kind == "block")


@pytest.mark.parametrize("family", TRANSLATORS)
def test_a_chain_of_encoder_and_decoder(family: str) -> None:
    config = small_config(family)
    profile = ModelProfile.from_config(config, dtype="float16")
    names = [layer.name for layer in profile.layers]
    switch = names.index("decoder embedding")
    assert names[0] == "embedding"
    assert names[-1] == "head"
    assert all(layer.runs_once for layer in profile.layers[:switch])
    assert not any(layer.runs_once for layer in profile.layers[switch:])
    blocks = [layer for layer in profile.layers if layer.kind == "block"]
    assert [layer.block for layer in blocks] == list(range(len(blocks)))
    hidden = 2 * 64
    outputs = [layer.output_bytes_per_token for layer in profile.layers]
    decoders = [layer for layer in profile.layers if layer.name.startswith("decoder block")]
    carried = [hidden] * switch + [2 * hidden] * len(decoders)  # the last block hands on its own alone
    assert outputs[: switch + len(decoders)] == carried
    assert outputs[switch + len(decoders) : -1] == [hidden] * (profile.num_layers - switch - len(decoders) - 1)
    assert profile.input_bytes_per_token == 16
    encoder, decoder = blocks[0], blocks[-1]
    assert encoder.flops_per_cross_pair == 0 < decoder.flops_per_cross_pair == decoder.flops_per_pair
    assert not encoder.causal
    assert decoder.causal


def test_only_the_family_asked_for_is_imported() -> None:
    """From a fresh process: reading Llama loads neither the other families nor a framework."""
    code = (
        "import sys; from lp_plugin import ModelProfile; ModelProfile.from_config({'model_type': 'llama'});"
        "print([m for m in sys.modules if m.startswith('lp_plugin.model.families') or m in {'torch', 'transformers'}])"
    )
    loaded = ast.literal_eval(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.decode()
    )
    assert sorted(loaded) == [
        "lp_plugin.model.families",
        "lp_plugin.model.families.base",
        "lp_plugin.model.families.gated",
    ]


def test_equal_blocks_are_counted_once() -> None:
    """A deep model costs no more than its distinct blocks: they are the same objects."""
    deep = read_architecture({**small_config("gemma3_text"), "num_hidden_layers": 4_096, "sliding_window_pattern": 6})
    assert len(deep.blocks) == 4_096
    assert len({id(block) for block in deep.blocks}) == 2
