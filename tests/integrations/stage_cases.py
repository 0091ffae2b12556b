"""Stages with the weights of a whole model in memory, and what they are held to."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from families import ROWS, TOKENS, make_batch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from lp_plugin.integrations.transformers.decoder import CACHE_ARGUMENT, DecoderStage, num_layers

NEW_TOKENS = 4
LENGTH = TOKENS + NEW_TOKENS

Piece = tuple[int, int]


def stage_of(whole: PreTrainedModel, start: int, stop: int, **options: Any) -> DecoderStage:
    """A stage with the whole model's own tensors."""
    stage = DecoderStage(whole.config, start, stop, **options)
    tensors = whole.state_dict(keep_vars=True) | dict(whole.named_buffers())
    for name, _ in [*stage.model.named_parameters(), *stage.model.named_buffers()]:
        parent, _, child = name.rpartition(".")
        module, tensor = stage.model.get_submodule(parent), tensors[stage.checkpoint_name(name)]
        (module._parameters if isinstance(tensor, nn.Parameter) else module._buffers)[child] = tensor
    return stage.eval()


def pieces_of(whole: PreTrainedModel, **options: Any) -> dict[Piece, DecoderStage]:
    """Every run of layers as a stage."""
    count = num_layers(whole.config, halves=options.get("halves", False))
    return {piece: stage_of(whole, *piece, **options) for piece in itertools.combinations(range(count + 1), 2)}


def decoding(whole: PreTrainedModel) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """A prefill of prompts padded on the left and decode steps after it, by the whole model: inputs and logits."""
    ids, prompts = make_batch("left", 0)
    assert prompts is not None
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask[:, :TOKENS] = prompts
    positions = (prompts.cumsum(1) - 1).clamp(min=0)
    cache = static_cache(whole)
    steps = []
    for column in range(TOKENS, LENGTH):
        given = {"attention_mask": mask.clone(), "position_ids": positions}
        logits = whole(ids, **given, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
        steps.append(({"hidden": ids, **given}, logits))
        ids, positions = logits.argmax(-1), positions[:, -1:] + 1
        mask[:, column] = 1
    return steps


def static_cache(whole: PreTrainedModel) -> Cache:
    return Cache(layers=[StaticLayer(max_cache_len=LENGTH) for _ in range(whole.config.num_hidden_layers)])


def generated(whole: PreTrainedModel) -> list[list[int]]:
    """New tokens of each prompt alone, by transformers' own `generate`."""
    ids, mask = make_batch("left", 0)
    assert mask is not None
    whole.generation_config.eos_token_id = None
    alone = [row[kept.bool()][None] for row, kept in zip(ids, mask, strict=True)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    made = [whole.generate(prompt, attention_mask=torch.ones_like(prompt), **options) for prompt in alone]
    return [tokens[0, prompt.shape[1] :].tolist() for prompt, tokens in zip(alone, made, strict=True)]
