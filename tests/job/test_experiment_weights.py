"""Random weights are those of one model, whichever way it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.materialize import materialize
from lp_plugin.integrations.transformers.random_weights import fill_randomly
from lp_plugin.integrations.transformers.tensor_parallel import check_shardable

SMALL = json.loads((Path(__file__).parents[2] / "examples" / "dense16" / "small" / "config.json").read_text())
SHRUNK = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LAYERS = 6


def config_of(**changes: Any) -> Any:
    fields = SMALL | SHRUNK | {"num_key_value_heads": 4} | changes
    return AutoConfig.for_model(**fields)


def filled(config: Any, start: int, stop: int, *, seed: int = 3, shards: int = 1) -> DecoderStage:
    stage = DecoderStage(config, start, stop)
    check_shardable(stage, shards)
    materialize(stage, "cpu", torch.float32, tie=stage.tied)
    fill_randomly(stage, seed)
    return stage


def tensors(stage: DecoderStage) -> dict[str, torch.Tensor]:
    return {stage.checkpoint_name(name): tensor for name, tensor in stage.model.state_dict().items()}


def test_stages_hold_the_whole_models_tensors() -> None:
    config = config_of()
    whole = tensors(filled(config, 0, LAYERS))
    parts = [tensors(filled(config, start, stop)) for start, stop in ((0, 2), (2, 3), (3, LAYERS))]
    assert sum(map(len, parts)) == len(whole)
    for name, tensor in (item for part in parts for item in part.items()):
        assert torch.equal(tensor, whole[name]), name


def test_a_rank_holds_its_part_of_them() -> None:
    config = config_of()
    whole, stage = tensors(filled(config, 0, LAYERS)), filled(config, 0, LAYERS, shards=2)
    assert len(stage.cuts) > LAYERS
    for name, tensor in tensors(stage).items():
        cut = stage.cuts.get(name)
        expected = whole[name]
        if cut is not None:
            expected = torch.cat([expected.narrow(cut.dim, low, high - low) for low, high in cut.spans], cut.dim)
        assert torch.equal(tensor, expected), name


def test_matrices_vectors_and_seeds() -> None:
    config = config_of(use_bias=True)
    one, other = (tensors(filled(config, 0, LAYERS, seed=seed)) for seed in (3, 4))
    matrices = [name for name, tensor in one.items() if tensor.dim() > 1]
    for name, tensor in one.items():
        if name not in matrices:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
    for name in matrices:
        assert float(one[name].std()) == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(one[name], other[name])
    assert len({float(one[name][0, 0]) for name in matrices}) == len(matrices)


def test_tied_ends_hold_one_matrix() -> None:
    config = config_of(tie_word_embeddings=True)
    first, last, whole = (filled(config, start, stop) for start, stop in ((0, 2), (2, LAYERS), (0, LAYERS)))
    embedding = first.model.get_input_embeddings().weight
    assert torch.equal(last.model.get_output_embeddings().weight, embedding)
    assert whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight
    assert torch.equal(whole.model.get_input_embeddings().weight, embedding)
