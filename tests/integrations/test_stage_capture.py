"""A decode step asks the device for nothing and copies nothing to it, or a CUDA graph could not hold it.

Tensors are PyTorch's fake ones on a GPU that is not there: they know their device and have no values, so that asking
for a value fails, and every operation tells on which devices its tensors are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from families import VARIANTS, make_config
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers

ROWS, TOKENS, LENGTH = 3, 4, 12
ELSEWHERE = {"mixtral", "qwen3_moe", "phi3-long"}
"""For experts transformers asks the driver what the GPU can do; changing frequencies are never captured."""


class OneDevice(TorchDispatchMode):
    """Refuses operations over more than one device."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:
            raise RuntimeError(f"{func} is over {sorted(devices)}")
        return made


def put_on_gpu(stage: DecoderStage) -> None:
    for name, tensor in [*stage.model.named_parameters(), *stage.model.named_buffers()]:
        parent, _, child = name.rpartition(".")
        module = stage.model.get_submodule(parent)
        if isinstance(tensor, nn.Parameter):
            empty = torch.empty(tensor.shape, dtype=torch.bfloat16, device="cuda")
            module._parameters[child] = nn.Parameter(empty, requires_grad=False)
        else:
            module._buffers[child] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize("family", [family for family in VARIANTS if family not in ELSEWHERE])
@torch.no_grad()
def test_a_decode_step_stays_on_the_device(family: str) -> None:
    config = make_config(family, 2)
    count = num_layers(config, halves=True)
    cut = (0, 2, count - 1, count)
    stages = [DecoderStage(config, *bounds, halves=True).eval() for bounds in itertools.pairwise(cut)]
    assert all(stage.capturable for stage in stages)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for stage in stages:
            put_on_gpu(stage)
        caches = [stage.new_cache(ROWS, LENGTH) for stage in stages]
        mask = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="cuda")
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device="cuda")
        run(stages, caches, ids, mask)  # memory for the caches; a prefill may wait
        with OneDevice():
            logits = run(stages, caches, ids[:, :1], mask)
    assert logits.shape == (ROWS, 1, config.vocab_size)
    assert logits.device.type == "cuda"


def run(stages: Sequence[DecoderStage], caches: Sequence[Any], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = ids
    for stage, cache in zip(stages, caches, strict=True):
        hidden = stage.step(hidden, attention_mask=mask, position_ids=torch.zeros_like(ids), cache=cache)
    return hidden


@pytest.mark.parametrize(
    "wrong",
    [
        lambda values: values[[0]],
        lambda values: values + torch.tensor(0.0, device="cuda"),
        lambda values: values.cpu(),
    ],
)
def test_copies_are_seen(wrong: Callable[[torch.Tensor], Any]) -> None:
    with FakeTensorMode(), OneDevice(), pytest.raises(RuntimeError, match=r"\['cpu', 'cuda'\]"):
        wrong(torch.zeros(2, device="cuda"))


def test_questions_are_seen() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.zeros(2, device="cuda").sum() > 0)
