"""What one rank does with one micro-batch, and the memory it does it in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lp_plugin.errors import WorkloadError
from lp_plugin.integrations.deepspeed.forward.whole_rows import FixedRotations, whole_rows
from lp_plugin.integrations.deepspeed.generation.lean import LeanPass

__all__ = ["StageWork"]

_MOST_SHAPES = 128
"""Of stages and inputs that a process may compile."""


class StageWork:
    """A stage with inputs and results that stay where they are, so that passes over them can be captured.

    Args:
        module: ``HFPipelineModule``.
        is_first: Whether the stage is the pipeline's first, which takes token ids.
        is_last: Whether it is the last one, which keeps results.
        num_micro_batches: Micro-batches of a run.
        rows: Sequences of each.
        tokens: Of each sequence.
        width: Elements per token of the activation that comes in.
        num_buffers: Activations that there is room for: the one that a pass works on, and one that comes in meanwhile.
        compiled: Whether ``torch.compile`` fuses the stage's kernels. On GPUs passes take fewer kernels by `LeanPass`,
            or by its context for compiled ones; on CPUs they are transformers' own.

    Attributes:
        inputs: Token ids [micro-batches, rows, tokens], or activations [buffers, rows, tokens, width] of the
            micro-batches under way, in turns. Random to begin with: what GPUs spend on zeros is less.
        has_loss: Whether the stage makes results of labels.
    """

    def __init__(
        self,
        module: Any,
        *,
        is_first: bool,
        is_last: bool,
        num_micro_batches: int,
        rows: int,
        tokens: int,
        width: int,
        num_buffers: int,
        compiled: bool,
    ) -> None:
        self._stage, self._is_first, self._is_last = module.stage, is_first, is_last
        self._loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = module.loss_fn if is_last else None
        device = module.device
        self._shape, self._device, self._vocabulary = (rows, tokens), device, module.hf_config.vocab_size
        self.has_loss = self._loss_fn is not None
        if not is_first:
            self.inputs = torch.randn(num_buffers, rows, tokens, width, device=device, dtype=module.torch_dtype)
        self.hold(num_micro_batches)
        self._compiled = compiled
        self._fewer_kernels: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if device.type == "cuda":
            lean = LeanPass(self._stage.model)
            self._fewer_kernels = lean.compiled if compiled else lean
        self._rotations = FixedRotations(self._stage.model)
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self._stage
        if compiled:
            with self.passing():
                self._stage(self.buffer(0))  # makes the rotary tables, which are no part of what is compiled
            self._forward = torch.compile(self._stage.forward, dynamic=False)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, micro-batches run; changes transformers for the whole process meanwhile."""
        limits: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._compiled:
            # beyond its limit torch would run stages of further shapes without compiling them
            limits = torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES, fail_on_recompile_limit_hit=True)
        with torch.no_grad(), limits, self._fewer_kernels, self._rotations, whole_rows():
            yield

    def hold(self, num_micro_batches: int) -> None:
        """Makes room for the inputs, labels and results of so many micro-batches; what was there is lost."""
        shape = (num_micro_batches, *self._shape)
        if self._is_first:
            self.inputs = torch.randint(self._vocabulary, shape, device=self._device)
        self._labels = torch.zeros(shape, dtype=torch.long, device=self._device) if self.has_loss else None
        self._num_micro_batches = num_micro_batches
        self._results: dict[bool, torch.Tensor] = {}
        """Of the loss function (True) or the stage itself."""

    def check(self, inputs: torch.Tensor | None, labels: torch.Tensor | None, num_micro_batches: int) -> bool:
        """Looks at what a run is given.

        Returns:
            Whether the results will be the loss function's.

        Raises:
            WorkloadError: If this stage lacks its inputs, or they have another shape.
        """
        shape = (num_micro_batches, *self._shape)
        labelled = self.has_loss and labels is not None
        if self._is_first:
            _check("inputs", inputs, shape)
        if labelled:
            _check("labels", labels, shape)
        return labelled

    def fill(self, inputs: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        """Takes in the inputs and labels of a run, or of some of its micro-batches."""
        if self._is_first and inputs is not None:
            self.inputs[: len(inputs)].copy_(inputs, non_blocking=True)
        if self._labels is not None and labels is not None:
            self._labels[: len(labels)].copy_(labels, non_blocking=True)

    def buffer(self, micro_batch: int) -> torch.Tensor:
        """Where a micro-batch's input lies, or comes in."""
        return self.inputs[micro_batch % len(self.inputs)]

    def run(self, micro_batch: int, *, labelled: bool) -> torch.Tensor | None:
        """Runs one micro-batch.

        Args:
            micro_batch: Its number.
            labelled: Whether the loss function makes the result.

        Returns:
            What goes to the next stage; None from the last stage, which keeps its result.
        """
        outputs = self._forward(self.buffer(micro_batch))
        if not self._is_last:
            return outputs.contiguous()
        if labelled and self._loss_fn is not None and self._labels is not None:
            outputs = self._loss_fn(outputs, self._labels[micro_batch])
        if labelled not in self._results:
            self._results[labelled] = outputs.new_empty((self._num_micro_batches, *outputs.shape))
        self._results[labelled][micro_batch].copy_(outputs)
        return None

    def results(self, *, labelled: bool) -> torch.Tensor | None:
        """Of the last run, on the last stage."""
        return self._results[labelled] if self._is_last else None


def _check(name: str, given: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if given is None or given.shape != shape:
        found = "missing" if given is None else f"of shape {list(given.shape)}"
        raise WorkloadError(
            f"{name} are {found}; this stage takes {list(shape)}: micro-batches, rows, tokens. "
            "Give a tensor of this shape, or make a pipeline for another one."
        )
