"""What the tests of loading share: stages from a directory, what they give, and directories changed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_batch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from lp_plugin.errors import WeightsError
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.weights import check_checkpoint, load_stage

Saved = dict[str, tuple[Path, PreTrainedModel]]
Tensors = dict[str, torch.Tensor]


def loaded(config: PretrainedConfig, directory: Path, start: int, stop: int, **options: Any) -> DecoderStage:
    stage = DecoderStage(config, start, stop, **options)
    load_stage(stage, directory, "cpu", torch.float32)
    return stage.eval()


def scored(config: PretrainedConfig, directory: Path, **options: Any) -> torch.Tensor:
    """Logits of a batch, by uneven stages."""
    count = num_layers(config)
    value: Any = make_batch("none", 0)[0]
    with torch.no_grad():
        for bounds in itertools.pairwise((0, 2, count - 1, count)):
            value = loaded(config, directory, *bounds, **options)(value)
    return value


def expected(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(make_batch("none", 0)[0], use_cache=False).logits


def changed(directory: Path, change: Callable[[Tensors], Tensors], target: Path) -> Path:
    """A copy of a model directory with its tensors replaced by ``change(tensors)``."""
    shutil.copytree(directory, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def refusals(config: PretrainedConfig, directory: Path) -> set[str]:
    """What `check_checkpoint` and the loading of each single layer say."""
    attempts: list[Callable[[], Any]] = [lambda: check_checkpoint(config, directory)]
    attempts += [lambda layer=layer: loaded(config, directory, layer, layer + 1) for layer in range(num_layers(config))]
    messages = set()
    for attempt in attempts:
        with pytest.raises(WeightsError) as caught:
            attempt()
        messages.add(str(caught.value))
    return messages
