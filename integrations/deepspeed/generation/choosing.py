"""Choosing the tokens of one slot on the last stage, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList

from lp_plugin.integrations.deepspeed.generation.sampling import Sampling

__all__ = ["BROKEN", "Chooser"]

BROKEN = 2
"""Added to a slot's flag from the pass on whose logits were not numbers."""


class Chooser:
    """The rows of one slot: which have ended, what they have seen, where their randomness comes from.

    Args:
        sampling: How tokens are chosen.
        rows: Rows of the slot.
        length: Tokens per row at most, padding and new ones together.

    Attributes:
        tokens: int64 [rows + 1]: the newest token of each row, and at the end a flag: 1 if all rows have ended, else 0;
            `BROKEN` more if logits were not numbers.
    """

    def __init__(self, sampling: Sampling, rows: int, length: int) -> None:
        device = sampling.device
        self.tokens = torch.zeros(rows + 1, dtype=torch.long, device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._broken = torch.zeros(1, dtype=torch.bool, device=device)
        self._made = torch.zeros(1, dtype=torch.long, device=device)
        self._history = torch.zeros(rows, length, dtype=torch.long, device=device)
        self._ends = torch.tensor(sampling.ends, dtype=torch.long, device=device)
        self.use(sampling)

    def use(self, sampling: Sampling) -> None:
        """Takes over the options of a new call; the end tokens, ``min_new_tokens`` and padding must be the same."""
        self._sampling = sampling
        self._generators: list[torch.Generator] = []
        self._row_processors: list[LogitsProcessorList] = []
        self._starts: list[int] = []
        self._prompt_tokens = self._filled = 0

    @property
    def is_plain(self) -> bool:
        """Whether `take_likeliest` chooses, else `choose`."""
        return self._sampling.plain

    def begin(self, prompts: torch.Tensor, lengths: Sequence[int], seeds: Sequence[int]) -> None:
        """A new group takes the slot.

        Args:
            prompts: Token ids [rows, tokens], padded on the left.
            lengths: Real tokens of each prompt; rows beyond them are empty and have ended.
            seeds: Of each prompt.
        """
        tokens = prompts.shape[1]
        self._broken.fill_(False)
        self._made.zero_()
        self._ended.fill_(True)
        self._ended[: len(lengths)] = False
        self._history[:, :tokens] = prompts
        self._prompt_tokens = self._filled = tokens
        self._starts = [tokens - length for length in lengths]
        if self._sampling.by_row:
            self._row_processors = [
                self._sampling.row_processors(self._history[row : row + 1, start:tokens])
                for row, start in enumerate(self._starts)
            ]
        if self._sampling.samples:
            self._generators = [torch.Generator(prompts.device).manual_seed(seed) for seed in seeds]

    def take_likeliest(self, logits: torch.Tensor) -> None:
        """Chooses when the sampling is plain; nothing but tensor operations, so that a CUDA graph can hold it.

        Args:
            logits: [rows, vocabulary].
        """
        self._broken.logical_or_(logits.isnan().any())
        if self._sampling.min_new_tokens > 0:
            too_early = self._made < self._sampling.min_new_tokens
            logits = logits.index_fill(1, self._ends, float("-inf")).where(too_early, logits)
        self._made.add_(1)
        self._finish(logits.argmax(dim=-1))

    def choose(self, logits: torch.Tensor) -> None:
        """Chooses with transformers' processors, and at random if that is asked for.

        Args:
            logits: [rows, vocabulary].
        """
        self._broken.logical_or_(logits.isnan().any())
        scores = logits.float()
        if self._sampling.by_row:
            each = [
                processors(self._history[row : row + 1, start : self._filled], scores[row : row + 1])
                for row, (processors, start) in enumerate(zip(self._row_processors, self._starts, strict=True))
            ]
            scores = torch.cat([*each, scores[len(each) :]])
        scores = self._sampling.shared(self._history[:, self._prompt_tokens - 1 : self._filled], scores)
        tokens = self._draw(scores) if self._sampling.samples else scores.argmax(dim=-1)
        self._finish(tokens)
        self._history[:, self._filled] = self.tokens[:-1]
        self._filled += 1

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        """One token per row, as ``torch.multinomial`` draws it from the row's generator."""
        shares = scores.softmax(dim=-1)
        noise = torch.ones_like(shares)
        for row, generator in enumerate(self._generators):
            noise[row].exponential_(generator=generator)
        return shares.div_(noise).argmax(dim=-1)

    def _finish(self, tokens: torch.Tensor) -> None:
        tokens = tokens.masked_fill(self._ended, self._sampling.padding)
        if self._sampling.ends:
            self._ended.logical_or_((tokens[:, None] == self._ends).any(dim=1))
        self.tokens[:-1].copy_(tokens)
        self.tokens[-1:].copy_(self._ended.all() + BROKEN * self._broken)
