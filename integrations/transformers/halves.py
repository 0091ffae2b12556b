"""Half a block: attention with its norms, or the MLP with its norms.

A stage whose first or last block is cut between them holds transformers' own block, in which stand-ins take the place
of the absent half: they have no parameters, write no cache, and add nothing to the residual. Only blocks whose halves
follow each other can be cut; `lp_plugin.model.ModelProfile` says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lp_plugin.errors import UnsupportedModelError

__all__ = ["HALVES", "Halves", "leave_out"]


class _NoAttention(nn.Module):
    """Nothing to add, and no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class _NoMlp(nn.Module):
    """Nothing to add."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class _AttentionPassed(nn.Module):
    """The input of an attention that adds the residual itself."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


class _MlpPassed(nn.Module):
    """The residual of an MLP that adds it itself."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """What a family's blocks consist of: name of a child -> what stands in its place where its half is absent."""

    attention: Mapping[str, type[nn.Module]]
    """Attention and its norms."""
    mlp: Mapping[str, type[nn.Module]]
    """The MLP, or the experts, and its norms."""


_COMMON = Halves(
    attention={"input_layernorm": nn.Identity, "self_attn": _NoAttention},
    mlp={"post_attention_layernorm": nn.Identity, "mlp": _NoMlp},
)
_FOUR_NORMS = Halves(
    attention={
        "input_layernorm": nn.Identity,
        "self_attn": _NoAttention,
        "post_attention_layernorm": nn.Identity,
    },
    mlp={"pre_feedforward_layernorm": nn.Identity, "mlp": _NoMlp, "post_feedforward_layernorm": nn.Identity},
)
HALVES: Mapping[str, Halves] = {
    **dict.fromkeys(
        ("granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "starcoder2"), _COMMON
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _FOUR_NORMS),
    "bert": Halves(
        attention={"attention": _AttentionPassed},
        mlp={"intermediate": nn.Identity, "output": _MlpPassed},
    ),
    "bloom": Halves(
        attention={"input_layernorm": nn.Identity, "self_attention": _AttentionPassed},
        mlp={"post_attention_layernorm": nn.Identity, "mlp": _MlpPassed},
    ),
    "falcon": Halves(
        attention={"input_layernorm": nn.Identity, "self_attention": _NoAttention},
        mlp={"post_attention_layernorm": nn.Identity, "mlp": _NoMlp},
    ),
    "gpt2": Halves(
        attention={"ln_1": nn.Identity, "attn": _NoAttention},
        mlp={"ln_2": nn.Identity, "mlp": _NoMlp},
    ),
    "gpt_neox": Halves(
        attention={"input_layernorm": nn.Identity, "attention": _NoAttention},
        mlp={"post_attention_layernorm": nn.Identity, "mlp": _NoMlp},
    ),
    "olmo2": Halves(
        attention={"self_attn": _NoAttention, "post_attention_layernorm": nn.Identity},
        mlp={"mlp": _NoMlp, "post_feedforward_layernorm": nn.Identity},
    ),
    "opt": Halves(
        attention={"self_attn": _NoAttention, "self_attn_layer_norm": nn.Identity},
        mlp={"fc1": nn.Identity, "activation_fn": nn.Identity, "fc2": _NoMlp, "final_layer_norm": nn.Identity},
    ),
}
"""``model_type`` -> its halves."""


def leave_out(block: nn.Module, half: Mapping[str, type[nn.Module]]) -> None:
    """Puts stand-ins in the place of half a block.

    Args:
        block: transformers' own.
        half: `Halves.attention` or `Halves.mlp` of its family.

    Raises:
        UnsupportedModelError: If the block has other parts.
    """
    for name, stand_in in half.items():
        if not isinstance(getattr(block, name, None), nn.Module):
            raise UnsupportedModelError(
                f"{type(block).__name__} has no {name!r}, so it can't be cut between attention and MLP; "
                "plan whole blocks (granularity layer)."
            )
        setattr(block, name, stand_in())
