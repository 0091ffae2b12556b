"""transformers' passes over rows that are tokens throughout, without a question to the device, nor twice the same work.

Without a mask and a cache transformers looks at the positions for several texts packed into one row: the host waits for
the device in every pass, and inside a CUDA graph or a compiled stage, where it can't wait, a mask is made in any case,
with which attention is slower. Rows here are not packed, and positions count up. So rotary tables are the same in every
pass of one shape, and are made once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

__all__ = ["FixedRotations", "whole_rows"]


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, rows without a mask are never packed, and have a mask only where a sliding window needs one.

    Changes transformers for the whole process: one thread at a time. Values stay the same.
    """
    find_packed = masking_utils.find_packed_sequence_indices
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    masking_utils.find_packed_sequence_indices = _never_packed
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _only_where_needed(make_mask)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find_packed
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = make_mask


def _never_packed(position_ids: torch.Tensor) -> None:
    """No row holds several texts."""


@functools.cache  # a compiled stage is compiled again for another function
def _only_where_needed(make_mask: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
    def mask(**inputs: Any) -> torch.Tensor | None:
        return None if _needs_none(inputs) else make_mask(**inputs)

    return mask


def _needs_none(inputs: dict[str, Any]) -> bool:
    """Whether causal (or full) attention to all tokens is meant, as transformers itself finds out elsewhere."""
    skip = inputs.get("allow_is_causal_skip", True) or inputs.get("allow_is_bidirectional_skip", False)
    window = inputs.get("local_size")
    return (
        skip
        and inputs.get("attention_mask") is None
        and inputs["q_length"] == inputs["kv_length"]
        and (window is None or inputs["kv_length"] < window)
    )


class FixedRotations:
    """A context in which a model's rotary tables are made once and kept; can be entered again and again.

    Not for passes of different shapes, nor for rows whose positions don't count up from 0.

    Args:
        model: transformers' model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (owner, name, _FixedRotation(module))
            for owner in model.modules()
            for name, module in owner.named_children()
            if type(module).__name__.endswith("RotaryEmbedding")
        ]

    def __enter__(self) -> None:
        for owner, name, fixed in self._places:
            owner._modules[name] = fixed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, fixed in self._places:
            owner._modules[name] = fixed.original[0]


class _FixedRotation(nn.Module):
    """In place of a module that makes rotary tables: what it made first.

    Args:
        original: The module.

    Attributes:
        original: It, in a tuple: not a part of this one.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)
        self._tables: dict[tuple[Any, ...], Any] = {}

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, *kinds: Any, **named: Any) -> Any:
        kind = (*kinds, *named.items())
        if kind not in self._tables:
            self._tables[kind] = self.original[0](hidden, position_ids, *kinds, **named)
        return self._tables[kind]
