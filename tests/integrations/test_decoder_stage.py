"""Stages of whole layers, encoders, models without their head, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import BERT, FAMILIES, PADDINGS, ROWS, VARIANTS, make_batch, make_config, make_model
from stage_cases import LENGTH, decoding, pieces_of, stage_of
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from lp_plugin import ModelProfile
from lp_plugin.errors import UnsupportedModelError, WorkloadError
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.halves import HALVES, leave_out
from lp_plugin.integrations.transformers.host_constants import NoHostConstants
from lp_plugin.integrations.transformers.runnable import RUNNABLE


def bert_config(num_blocks: int = 3) -> PretrainedConfig:
    return AutoConfig.for_model("bert", **BERT, num_hidden_layers=num_blocks)


def run(stages: list[DecoderStage], value: Any) -> Any:
    for stage in stages:
        value = stage(value)
    return value


def test_every_family_that_runs_is_tested_and_has_halves() -> None:
    tested = {model_type for model_type, _ in FAMILIES.values()}
    assert tested | {"bert"} == RUNNABLE == set(HALVES)


@pytest.mark.parametrize("family", VARIANTS)
@torch.no_grad()
def test_whole_layers(family: str) -> None:
    """Numbered as the profile of whole layers; halves have their own tests, of every piece."""
    whole = make_model(make_config(family, 3))
    count = num_layers(whole.config)
    assert count == len(ModelProfile.from_config(whole.config.to_dict()).layers)
    cuts = ((0, 1, 3, count), (0, 2, 4, count - 1, count), tuple(range(count + 1)))
    chains = [[stage_of(whole, *bounds) for bounds in itertools.pairwise(cut)] for cut in cuts]
    ids, mask = make_batch("left", 0)
    expected = whole(ids, attention_mask=mask, use_cache=False).logits
    for stages in chains:
        assert torch.equal(run(stages, (ids, mask)), expected)
        caches = [stage.new_cache(ROWS, LENGTH) for stage in stages]
        for inputs, logits in decoding(whole):
            hidden = inputs.pop("hidden")
            for stage, cache in zip(stages, caches, strict=True):
                hidden = stage.step(hidden, **inputs, cache=cache)
            assert torch.equal(hidden, logits)


def test_a_stage_is_on_the_meta_device_until_it_is_loaded() -> None:
    stage = DecoderStage(make_config("llama", 3), 0, 6)
    assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}


def test_the_configuration_stays_as_it_is() -> None:
    config = make_config("gemma3", 3)
    before = config.to_dict()
    DecoderStage(config, 2, 3)
    assert config.to_dict() == before


@pytest.mark.parametrize("family", VARIANTS)
@torch.no_grad()
def test_without_its_head_a_model_gives_the_final_hidden_state(family: str) -> None:
    whole = make_model(make_config(family, 3))
    count = num_layers(whole.config)
    cuts = ((0, count), (0, 2, count), (0, 3, count - 1, count))
    chains = [[stage_of(whole, *bounds, head=False) for bounds in itertools.pairwise(cut)] for cut in cuts]
    ids, mask = make_batch("right", 0)
    expected = whole.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    for stages in chains:
        assert torch.equal(run(stages, (ids, mask)), expected)
        names = [name for stage in stages for name, _ in stage.model.named_parameters()]
        assert not any(name.startswith("lm_head") for name in names)
        assert not any(stage.has_head for stage in stages)


# --- encoders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(bert_config(), add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_every_piece_of_an_encoder(bert: PreTrainedModel, halves: bool, padding: str) -> None:
    """Its last layer, the head that it was trained with, is not there: it hands on what it is given."""
    ids, mask = make_batch(padding, 0)
    pieces = pieces_of(bert, halves=halves)
    count = num_layers(bert.config, halves=halves)
    assert count == (8 if halves else 5)
    values: list[Any] = [ids if mask is None else (ids, mask)]
    for start in range(count):
        values.append(pieces[start, start + 1](values[-1]))
    assert torch.equal(values[-1], bert(ids, attention_mask=mask).last_hidden_state)
    for (start, stop), stage in pieces.items():
        found, expected = stage(values[start]), values[stop]
        assert isinstance(found, tuple) == isinstance(expected, tuple)
        assert torch.equal(*(value[0] if isinstance(value, tuple) else value for value in (found, expected)))
    names = [
        pieces[start, start + 1].checkpoint_name(name)
        for start in range(count)
        for name, _ in pieces[start, start + 1].model.named_parameters()
    ]
    assert sorted(names) == sorted(name for name, _ in bert.named_parameters())


def test_an_encoder_has_no_cache() -> None:
    with pytest.raises(UnsupportedModelError, match="a bert model encodes; it can't generate tokens"):
        DecoderStage(bert_config(), 1, 2).new_cache(1, 8)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "bound"),
    [
        ("phi3-long", {}, 32),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, 64),
    ],
)
def test_sequences_that_change_the_frequencies_are_refused(family: str, changes: dict[str, Any], bound: int) -> None:
    """By every stage, those without attention too."""
    config = make_config(family, 3, **changes)
    for layer in range(num_layers(config)):
        stage = DecoderStage(config, layer, layer + 1)
        assert not stage.capturable
        stage.new_cache(2, bound)
        with pytest.raises(WorkloadError, match=rf"sequences of {bound + 1} tokens.*beyond {bound} tokens"):
            stage.new_cache(2, bound + 1)


def test_experts_are_captured_in_bfloat16_alone() -> None:
    stage = DecoderStage(make_config("mixtral", 3), 1, 2)
    assert not stage.capturable
    stage.model.to(torch.bfloat16)
    assert stage.capturable
    assert DecoderStage(make_config("llama", 3), 1, 2).capturable


def test_a_block_with_other_parts_is_not_cut() -> None:
    block = nn.Module()
    block.mlp = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"Module has no 'post_attention_layernorm'.*granularity layer"):
        leave_out(block, HALVES["llama"].mlp)


def test_constants_are_made_on_the_device() -> None:
    values = torch.arange(24).view(2, 3, 4)
    expected = [values[..., [-2], :], values[..., [-1], :], values[[0]], values[[0, 1], [1, 2]], torch.tensor(0.5)]
    with NoHostConstants():
        found = [values[..., [-2], :], values[..., [-1], :], values[[0]], values[[0, 1], [1, 2]], torch.tensor(0.5)]
        assert values[..., [-2], :].data_ptr() == values[:, 1].data_ptr()  # no index was made
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
