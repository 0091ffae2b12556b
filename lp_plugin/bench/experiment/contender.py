"""A configuration that is ready to run: its engine, its share of the work, one trial at a time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from deepspeed import comm as dist
from numpy.typing import NDArray

from lp_plugin.bench.experiment.engines import Built
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.job.ranks import gather
from lp_plugin.measure.layers import synchronize

__all__ = ["Contender", "Outputs", "Trial", "meet", "random_tokens", "share_of", "timed"]

Outputs: TypeAlias = NDArray[np.float32] | NDArray[np.int64]
"""Logits of each row, float32 [rows, vocabulary], or its new tokens, int64 [rows, tokens]."""

_SEED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One batch, from a common start."""

    seconds: float
    """As `Row.seconds`."""
    first_token_seconds: float
    """As `Row.first_token_seconds`."""
    token_seconds: float | None = None
    """As `Row.token_seconds`."""


class Contender(ABC):
    """One configuration in the processes of a case; those that it does not use wait.

    Args:
        case: The work.
        configuration: Which.
        built: Its engine.

    Attributes:
        takes_part: Whether this rank works for it.
        ranks: Those that do.
        stage: This rank's stage.
        execution: How stages run, once that is known.
    """

    def __init__(self, case: Case, configuration: Configuration, built: Built) -> None:
        self.case, self.configuration, self.built = case, configuration, built
        self.engine = built.engine
        grid = self.engine.grid
        self.replica: int = grid.data_parallel_id
        self.stage: int = grid.get_stage_id()
        self.num_replicas = configuration.strategy.data_parallel
        alone = configuration.strategy.num_devices == 1
        self.ranks = (0,) if alone else tuple(range(case.processes))
        self.takes_part = dist.get_rank() in self.ranks
        self.execution = ""
        self.rows = built.plan.workload.chosen_micro_batch
        first, stop = share_of(case.batch, self.replica if self.takes_part else 0, self.num_replicas)
        vocabulary = self.engine.module.hf_config.vocab_size
        self.tokens = random_tokens(case.batch, case.sequence, vocabulary)[first:stop]

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return torch.device(self.engine.device)

    @property
    def num_micro_batches(self) -> int:
        """Of this rank's replica."""
        return -(-len(self.tokens) // self.rows)

    def alone_once(self) -> None:
        """This rank's stage over one micro-batch without neighbours, so that want of memory shows where none waits."""
        if self.takes_part:
            with torch.no_grad():
                self._whole_stage()(self._stage_input())
            synchronize()

    @abstractmethod
    def prepare(self) -> None:
        """Makes what trials use; collective over the ranks that take part."""

    @abstractmethod
    def batch(self) -> None:
        """One batch on this rank, from the start to the last result on the device; collective over `ranks`."""

    @abstractmethod
    def trial(self) -> Trial:
        """One batch, timed; collective over all ranks of the case."""

    @abstractmethod
    def outputs(self) -> Outputs | None:
        """What the last batch made of the first micro-batch; on a rank that has it, None elsewhere."""

    def alone_seconds(self, span_seconds: float) -> float:
        """This rank's pass over one micro-batch by itself, in the chosen execution; 0 if it is not measured.

        Args:
            span_seconds: What the passes take together of which it is the mean, about.
        """
        del span_seconds
        return 0.0

    @abstractmethod
    def release(self) -> None:
        """Gives back the memory of graphs and caches; weights stay with the engine."""

    def _whole_stage(self) -> Callable[[Any], Any]:
        """The stage with the loss at its end, as the engine runs it."""
        module = self.engine.module
        return module.with_loss(module) if module.stage.has_head else module

    def _stage_input(self) -> torch.Tensor:
        """A micro-batch of random values in the shape that this rank's stage takes."""
        module, shape = self.engine.module, (self.rows, self.case.sequence)
        if module.stage.has_embedding:
            return torch.randint(module.hf_config.vocab_size, shape, device=module.device)
        hidden = torch.randn((*shape, module.hf_config.hidden_size), device=module.device)
        return hidden.to(module.torch_dtype)

    def _micro_batches(self) -> torch.Tensor:
        """int64 [micro-batches, rows, tokens]; a last one that is not full is filled up with sequences again."""
        needed = self.num_micro_batches * self.rows
        filled = np.resize(self.tokens, (needed, self.case.sequence))
        shaped = filled.reshape(self.num_micro_batches, self.rows, self.case.sequence)
        return torch.from_numpy(np.ascontiguousarray(shaped)).to(self.engine.device)


def timed(takes_part: bool, run: Callable[[], Any]) -> float:
    """Seconds from a common start until the last rank's device is done; collective over all ranks of the case."""
    start = meet()
    if takes_part:
        run()
        synchronize()
    return max(gather(time.perf_counter() - start if takes_part else 0.0))


def meet() -> float:
    """The time at which all ranks' devices are idle and all have come; collective."""
    synchronize()
    dist.barrier()
    synchronize()
    return time.perf_counter()


def share_of(batch: int, replica: int, num_replicas: int) -> tuple[int, int]:
    """Half-open range of the sequences that one replica takes; the first ones take one more if it does not divide."""
    size, more = divmod(batch, num_replicas)
    first = replica * size + min(replica, more)
    return first, first + size + (replica < more)


def random_tokens(batch: int, sequence: int, vocabulary: int) -> NDArray[np.int64]:
    """The same tokens for every configuration, [batch, sequence]."""
    return np.random.default_rng(_SEED).integers(vocabulary, size=(batch, sequence))
