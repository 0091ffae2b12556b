"""Every run of layers of every family, whole layers and halves, as a stage: exact against the whole model.

A run of layers takes what the layers before it give to what the layers after it are given, whatever the cut, so that
any chain of stages gives what the whole model gives.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import PADDINGS, VARIANTS, make_batch, make_config, make_model
from stage_cases import LENGTH, ROWS, Piece, decoding, generated, pieces_of
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer

from lp_plugin import ModelProfile
from lp_plugin.integrations.transformers.decoder import DecoderStage

Case = tuple[PreTrainedModel, dict[Piece, DecoderStage]]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    """A whole model of three blocks, and all its runs of halves."""
    whole = make_model(make_config(request.param, 3))
    return whole, pieces_of(whole, halves=True)


def singles(pieces: dict[Piece, DecoderStage]) -> list[DecoderStage]:
    return [stage for (start, stop), stage in pieces.items() if stop == start + 1]


def plain(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def test_each_tensor_is_on_one_stage(case: Case) -> None:
    whole, pieces = case
    held = {
        piece: [stage.checkpoint_name(name) for name, _ in stage.model.named_parameters(remove_duplicate=False)]
        for piece, stage in pieces.items()
    }
    layers = [held[start, stop] for start, stop in held if stop == start + 1]
    everything = [name for name, _ in whole.named_parameters(remove_duplicate=False)]
    assert sorted(itertools.chain.from_iterable(layers)) == sorted(everything)
    for (start, stop), names in held.items():
        assert sorted(names) == sorted(itertools.chain.from_iterable(layers[start:stop])), (start, stop)
    profile = ModelProfile.from_config(whole.config.to_dict(), granularity="sublayer")
    numbers = [sum(parameter.numel() for parameter in stage.parameters()) for stage in singles(pieces)]
    assert numbers == [layer.parameters for layer in profile.layers]


def test_caches_hold_the_length_in_every_attention(case: Case) -> None:
    whole, pieces = case
    layers = ModelProfile.from_config(whole.config.to_dict(), granularity="sublayer").layers
    for (start, stop), stage in pieces.items():
        cache = stage.new_cache(ROWS, LENGTH)
        assert len(cache) == sum(layer.kind in {"attention", "block"} for layer in layers[start:stop])
        assert all(type(layer) is StaticLayer and layer.max_cache_len == LENGTH for layer in cache.layers)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_scores(case: Case, padding: str) -> None:
    whole, pieces = case
    ids, mask = make_batch(padding, 0)
    values: list[Any] = [ids if mask is None else (ids, mask)]
    for stage in singles(pieces):
        values.append(stage(values[-1]))
    assert torch.equal(values[-1], whole(ids, attention_mask=mask, use_cache=False).logits)
    for (start, stop), stage in pieces.items():
        assert torch.equal(plain(stage(values[start])), plain(values[stop])), (start, stop)


@torch.no_grad()
def test_decodes(case: Case) -> None:
    whole, pieces = case
    caches = {piece: stage.new_cache(ROWS, LENGTH) for piece, stage in pieces.items()}
    steps = decoding(whole)
    for number, (inputs, logits) in enumerate(steps):
        given = {name: tensor for name, tensor in inputs.items() if name != "hidden"}
        found = {}
        values = [inputs["hidden"]]
        for start, stage in enumerate(singles(pieces)):
            found[start, start + 1] = stage.step(values[-1], **given, cache=caches[start, start + 1])
            values.append(found[start, start + 1])
        assert torch.equal(values[-1], logits), number
        for (start, stop), stage in pieces.items():
            if (start, stop) not in found:
                value = stage.step(values[start], **given, cache=caches[start, stop])
                expected = values[stop] if stop < len(values) - 1 else logits
                assert torch.equal(value, expected), (number, start, stop)
    tokens = torch.cat([logits.argmax(-1) for _, logits in steps], dim=1)
    assert tokens.tolist() == generated(whole)
