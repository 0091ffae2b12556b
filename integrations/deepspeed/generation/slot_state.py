"""One slot on one stage: its KV cache, its buffers, and a pass over them, as a CUDA graph on GPUs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lp_plugin.integrations.deepspeed.generation.choosing import Chooser
from lp_plugin.integrations.deepspeed.generation.lean import LeanPass, lean_cache
from lp_plugin.measure.graphs import recorded

__all__ = ["SlotState"]


class SlotState:
    """Everything a decode pass of a slot reads and writes stays where it is, from call to call.

    Args:
        stage: The ``DecoderStage``.
        rows: Sequences.
        length: Tokens per sequence that the cache holds, padding included.
        widths: Elements per token of the activations that come in and go out; the first stage takes tokens instead,
            and the last one gives tokens.
        is_first: Whether the stage is the first.
        chooser: On the last stage, else None.
        lean: The context for passes of the stage's model.
        compiled: Whether ``torch.compile`` fuses the kernels of decode passes, instead of that context but for its
            joint projections.
        device: Of the stage.
        dtype: Of activations.

    Attributes:
        received: What comes in for a decode pass: on the first stage tokens and the flag that all rows have ended,
            int64 [rows + 1]; else the activation of one token per row and that flag, flat [rows * width + 1].
        made: What a decode pass hands on, likewise; on the last stage the chooser's tokens.
    """

    def __init__(
        self,
        stage: Any,
        *,
        rows: int,
        length: int,
        widths: tuple[int, int],
        is_first: bool,
        chooser: Chooser | None,
        lean: LeanPass,
        compiled: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._stage = stage
        self._shape = (rows, 1) if is_first else (rows, 1, widths[0])
        self.chooser = chooser
        self._lean = lean
        self._step = torch.compile(stage.step, dynamic=False) if compiled else stage.step
        self._decoding: contextlib.AbstractContextManager[None] = lean.compiled if compiled else lean
        cache = stage.new_cache(rows, length)
        self._cache = cache if compiled else lean_cache(cache, device)
        self._mask = torch.zeros(rows, length, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._columns = torch.arange(length, device=device)
        if chooser is not None:
            self.made = chooser.tokens
        else:
            self.made = torch.zeros(rows * widths[1] + 1, dtype=dtype, device=device)
        if not is_first:
            self.received = torch.zeros(rows * widths[0] + 1, dtype=dtype, device=device)
        elif chooser is not None:
            self.received = chooser.tokens  # one stage alone
        else:
            self.received = torch.zeros(rows + 1, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    def prefill(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The pass of a new group's prompts.

        Args:
            inputs: Token ids [rows, tokens], padded on the left, or the activation [rows, tokens, width].
            lengths: Real tokens of each row, int64 [rows].

        Returns:
            The activation [rows, tokens, width]; on the last stage the logits [rows, vocabulary] of the last token.
        """
        tokens = inputs.shape[1]
        columns = self._columns
        starts = (tokens - lengths)[:, None]
        self._cache.reset()
        self._mask.copy_((columns >= starts) & (columns < tokens))
        self._column.fill_(tokens)
        self._positions.copy_(lengths[:, None])
        positions = (columns[:tokens] - starts).clamp_(min=0)
        with self._lean:
            outputs = self._stage.step(inputs, attention_mask=self._mask, position_ids=positions, cache=self._cache)
        return outputs if self.chooser is None else outputs[:, -1]

    def decode(self) -> torch.Tensor | None:
        """The pass of one token per row, from ``received`` to ``made``.

        Returns:
            The logits [rows, vocabulary], if the chooser still has to choose; valid until the next pass of any slot.
        """
        if self._graph is None:
            self._decode()
        else:
            self._graph.replay()
        return self._logits

    @property
    def pool(self) -> Any:
        """The memory pool of the captured graph."""
        return None if self._graph is None else self._graph.pool()

    def capture(self, pool: Any) -> None:
        """Records the decode pass as a CUDA graph; what the slot held is lost.

        Args:
            pool: Memory pool that the graphs of all slots share, since they never run at the same time; None for the
                first.
        """
        self._mask[:, 0] = 1
        self._empty()
        self._graph = recorded(self._decode, warm_up=self._decode_and_empty, pool=pool)

    def _empty(self) -> None:
        self._cache.reset()
        self._column.zero_()

    def _decode_and_empty(self) -> None:
        """A warm-up: the first time the cache gets its tensors."""
        self._decode()
        self._empty()

    def _decode(self) -> None:
        """Reads and writes the slot's own tensors alone, and never asks the device for a value."""
        inputs = self.received[:-1].view(self._shape)
        self._mask.index_fill_(1, self._column, 1)
        with self._decoding:
            outputs = self._step(inputs, attention_mask=self._mask, position_ids=self._positions, cache=self._cache)
        self._positions.add_(1)
        self._column.add_(1)
        if self.chooser is None:
            self.made[:-1].view(outputs.shape).copy_(outputs)
            self.made[-1:].copy_(self.received[-1:])
        elif self.chooser.is_plain:
            self.chooser.take_likeliest(outputs[:, -1])
        else:
            self._logits = outputs[:, -1]
