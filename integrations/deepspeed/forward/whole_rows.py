"""transformers' passes over rows that are tokens throughout, without a question to the device.

Without a mask and a cache transformers looks at the positions for several texts packed into one row: the host waits for
the device in every pass, and inside a CUDA graph or a compiled stage, where it can't wait, a mask is made in any case,
with which attention is slower. Rows here are not packed, and positions count up.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

__all__ = ["whole_rows"]


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
