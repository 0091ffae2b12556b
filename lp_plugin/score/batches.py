"""Documents of any length -> steps of fixed shape.

DeepSpeed's ``eval_batch`` needs one shape for all micro-batches of a call; with another shape it silently works
on stale data. So every step has one shape, every row is padded on the right to it (under causal attention padding
on the right changes no score), and the engine forgets the shape between steps. Documents are sorted by length and
cut into groups so that padding and pipeline bubbles together cost least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lp_plugin.job.documents import TokenizedDocuments

__all__ = ["IGNORED", "Step", "make_steps", "pad_length"]

IGNORED = -100
"""Label of a position that is not scored (PyTorch's default ``ignore_index``)."""

_MULTIPLE = 8
"""Lengths are padded to a multiple of this: what 16-bit matrix units work in."""
_MOST_GROUPS = 64
"""Cuts considered between groups; more would not change the cost visibly."""
_MICRO_BATCHES_PER_STAGE = 32
"""A step has at most this many micro-batches per stage: its bubble is 3%, and no more than a step is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One ``eval_batch``: micro-batches of one shape."""

    length: int
    """Tokens per row, padding included."""
    rows: int
    """Sequences per micro-batch."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Documents in each micro-batch, at most ``rows``; missing rows are padding."""

    @property
    def documents(self) -> tuple[int, ...]:
        """All documents of the step in order."""
        return tuple(index for micro_batch in self.micro_batches for index in micro_batch)

    @property
    def tokens(self) -> int:
        """Tokens computed per micro-batch, padding included."""
        return self.rows * self.length

    def of_replica(self, replica: int, num_replicas: int) -> Step:
        """What one of several pipelines does: every ``num_replicas``-th micro-batch.

        All do as many; where micro-batches run short, one of padding alone is added.
        """
        mine = self.micro_batches[replica::num_replicas]
        count = -(-len(self.micro_batches) // num_replicas)
        return dataclasses.replace(self, micro_batches=mine + ((),) * (count - len(mine)))

    def inputs(self, documents: TokenizedDocuments, number: int) -> NDArray[np.int64]:
        """Token ids of a micro-batch; [rows, length], 0 for padding."""
        padded = np.zeros((self.rows, self.length), dtype=np.int64)
        for row, index in enumerate(self.micro_batches[number]):
            tokens = documents[index]
            padded[row, : len(tokens)] = tokens
        return padded

    def mask(self, documents: TokenizedDocuments, number: int) -> NDArray[np.int64]:
        """1 for tokens, 0 for padding; [rows, length]. A row of padding alone counts as one token."""
        mask = np.zeros((self.rows, self.length), dtype=np.int64)
        mask[:, 0] = 1
        for row, index in enumerate(self.micro_batches[number]):
            mask[row, : len(documents[index])] = 1
        return mask

    def labels(self, documents: TokenizedDocuments, number: int) -> NDArray[np.int64]:
        """The token that follows each position; [rows, length], `IGNORED` where none does."""
        padded = np.full((self.rows, self.length), IGNORED, dtype=np.int64)
        for row, index in enumerate(self.micro_batches[number]):
            following = documents[index][1:]
            padded[row, : len(following)] = following
        return padded


def pad_length(tokens: int, max_positions: int) -> int:
    """The length a document's row gets."""
    return min(max(-(-tokens // _MULTIPLE) * _MULTIPLE, _MULTIPLE), max_positions)


def make_steps(
    lengths: Sequence[int] | NDArray[np.int64],
    documents: Sequence[int],
    *,
    tokens_per_micro_batch: int,
    num_stages: int,
    max_positions: int,
    num_replicas: int = 1,
) -> list[Step]:
    """Packs documents into steps; every document in exactly one row.

    Args:
        lengths: Tokens of every document of the job.
        documents: Those to pack.
        tokens_per_micro_batch: What the plan's micro-batch holds; shorter rows share it.
        num_stages: Stages of a pipeline.
        max_positions: Longest row.
        num_replicas: Pipelines that share each step's micro-batches.

    Returns:
        Steps, longest rows first (so that a run that does not fit fails at once).
    """
    order = sorted(documents, key=lambda index: (-int(lengths[index]), index))
    padded = [pad_length(int(lengths[index]), max_positions) for index in order]
    steps = []
    for first, last in _groups(padded, tokens_per_micro_batch, num_stages, num_replicas):
        length = padded[first]
        rows = _rows(last - first, length, tokens_per_micro_batch, num_stages * num_replicas)
        micro_batches = [tuple(order[at : min(at + rows, last)]) for at in range(first, last, rows)]
        most = _MICRO_BATCHES_PER_STAGE * num_stages * num_replicas
        steps += [
            Step(length=length, rows=rows, micro_batches=tuple(micro_batches[at : at + most]))
            for at in range(0, len(micro_batches), most)
        ]
    return steps


def _rows(count: int, length: int, tokens_per_micro_batch: int, num_stages: int) -> int:
    """Rows per micro-batch: as many as the token budget holds, but enough micro-batches to fill all stages."""
    return max(1, min(tokens_per_micro_batch // length, -(-count // (4 * num_stages))))


def _groups(
    padded: list[int], tokens_per_micro_batch: int, num_stages: int, num_replicas: int
) -> list[tuple[int, int]]:
    """Cuts the sorted lengths where padding saved outweighs another bubble (dynamic programming over cuts)."""
    changes = [at for at in range(1, len(padded)) if padded[at] != padded[at - 1]]
    stride = max(1, -(-len(changes) // _MOST_GROUPS))
    cuts = [0, *changes[::stride], len(padded)] if padded else [0]
    best = [0.0] + [float("inf")] * (len(cuts) - 1)
    back = [0] * len(cuts)
    for stop in range(1, len(cuts)):
        for start in range(stop):
            count, length = cuts[stop] - cuts[start], padded[cuts[start]]
            rows = _rows(count, length, tokens_per_micro_batch, num_stages * num_replicas)
            cost = best[start] + (-(-count // (rows * num_replicas)) + num_stages - 1) * rows * length
            if cost < best[stop]:
                best[stop], back[stop] = cost, start
    groups = []
    at = len(cuts) - 1
    while at > 0:
        groups.append((cuts[back[at]], cuts[at]))
        at = back[at]
    return groups[::-1]
