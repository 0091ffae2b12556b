"""The tokens of a call as they come back to the first stage, and their way to the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lp_plugin.integrations.deepspeed.generation.slots import Group

__all__ = ["Listener", "Results"]

Listener = Callable[[int, list[int]], None]
"""Gets a prompt's position in the call's list, and tokens of it."""


class Results:
    """New tokens per prompt, up to and including the end-of-sequence token.

    Args:
        num_prompts: Prompts of the call.
        new_tokens: At most so many per prompt.
        ends: End-of-sequence tokens.
        on_tokens: Called with each prompt's new tokens as soon as they are known.
        on_finished: Called with all of a prompt's tokens as soon as it has ended.
    """

    def __init__(
        self,
        num_prompts: int,
        new_tokens: int,
        ends: Sequence[int],
        on_tokens: Listener | None = None,
        on_finished: Listener | None = None,
    ) -> None:
        # a count, then tokens; filled, so that a long call has its memory from the start
        self._rows = np.full((num_prompts, new_tokens + 1), 0, dtype=np.int64)
        self._ended = [False] * num_prompts
        self._new_tokens = new_tokens
        self._ends = frozenset(ends)
        self._on_tokens = on_tokens
        self._on_finished = on_finished

    def add(self, group: Group, tokens: Sequence[int]) -> None:
        """Takes one more token of each row of a group; those of prompts that have ended are padding."""
        for prompt, token in zip(group.prompts, tokens, strict=False):
            if self._ended[prompt]:
                continue
            row = self._rows[prompt]
            made = int(row[0]) + 1
            row[0], row[made] = made, token
            self._ended[prompt] = made == self._new_tokens or token in self._ends
            if self._on_tokens is not None:
                self._on_tokens(prompt, [token])
            if self._ended[prompt] and self._on_finished is not None:
                self._on_finished(prompt, row[1 : made + 1].tolist())

    def as_tensor(self, device: torch.device) -> torch.Tensor:
        """The number of tokens of each prompt, then the tokens: int64 [prompts, new tokens + 1]."""
        return torch.from_numpy(self._rows).to(device)

    @staticmethod
    def as_lists(tensor: torch.Tensor) -> list[list[int]]:
        """The tokens of each prompt, out of `as_tensor`."""
        return [row[1 : row[0] + 1] for row in tensor.tolist()]
