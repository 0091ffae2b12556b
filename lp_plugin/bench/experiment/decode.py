"""Decoding: prompts continued by ``engine.generate``, token times taken as they come."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from lp_plugin.bench.experiment.contender import Contender, Trial, meet
from lp_plugin.bench.experiment.engines import Built
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.integrations.deepspeed.generation import generate, release
from lp_plugin.job.ranks import gather

__all__ = ["Decode", "decode_trial"]


class Decode(Contender):
    """Prompts continued greedily, every sequence to its last token; all micro-batches of a replica circle at once."""

    def __init__(self, case: Case, configuration: Configuration, built: Built) -> None:
        super().__init__(case, configuration, built)
        compiled = configuration.execution == "compiled"
        self.execution = ("compiled" if compiled else "graphs") if torch.cuda.is_available() else "eager"
        self._arrived: list[list[float]] = []
        self._made: list[list[int]] = []
        self._station: Any = None
        """Slots, caches and graphs of its own: another one on the same engine may want other ones."""

    def prepare(self) -> None:
        """See `Contender.prepare`."""
        new = self.case.new_tokens
        self._config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        self._prompts = self.tokens.tolist()

    def batch(self) -> None:
        """See `Contender.batch`."""
        self._arrived = [[] for _ in self._prompts]
        self.engine.lp_station = self._station
        self._made = generate(
            self.engine,
            self._prompts,
            generation_config=self._config,
            micro_batch=self.rows,
            num_slots=self.num_micro_batches,
            compiled=self.execution == "compiled",
            on_tokens=lambda position, tokens: self._arrived[position].extend([time.perf_counter()] * len(tokens)),
        )
        self._station = self.engine.lp_station

    def trial(self) -> Trial:
        """See `Contender.trial`."""
        start = meet()
        if self.takes_part:
            self.batch()
        is_head = self.takes_part and self.stage == 0 and self.engine.grid.get_slice_parallel_rank() == 0
        mine = [[when - start for when in each] for each in self._arrived] if is_head else []
        return decode_trial([each for rank in gather(mine) for each in rank])

    def outputs(self) -> NDArray[np.int64] | None:
        """See `Contender.outputs`."""
        return np.array(self._made[: self.rows]) if self._made and not self.replica else None

    def release(self) -> None:
        """See `Contender.release`."""
        self.engine.lp_station = self._station
        release(self.engine)
        self._station = self.engine.lp_station = None


def decode_trial(arrivals: list[list[float]]) -> Trial:
    """From when all sequences' tokens came; later ones that some make before all have begun set no pace.

    Args:
        arrivals: Seconds since the start, of each sequence's tokens.
    """
    first = [times[0] for times in arrivals]
    began, last = max(first), max(times[-1] for times in arrivals)
    later = sum(when > began for times in arrivals for when in times)
    counted = sum(len(times) - 1 for times in arrivals)
    return Trial(
        seconds=(last - began) * counted / later,
        first_token_seconds=statistics.median(first),
        token_seconds=statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in arrivals),
    )
