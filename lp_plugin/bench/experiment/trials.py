"""Turns in changing order, so that a clock that falls meets all; each turn as many batches as it takes to be sure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from deepspeed import comm as dist
from numpy.typing import NDArray

from lp_plugin.bench.experiment.contender import Contender, Outputs, Trial
from lp_plugin.job.ranks import gather

__all__ = ["differs", "passes_per_turn", "take_turn", "time_alone", "turn_order", "warm_up"]

_WARM_UP_SECONDS = {True: 2.0, False: 0.5}
"""At least, by whether there are GPUs, whose clocks fall under load."""
_TURN_SECONDS = {True: 0.3, False: 0.1}
"""A turn of short batches takes the median of as many as fit into this."""
_MOST_PASSES = 51
_MOST_ALONE_SECONDS = {True: 3.0, False: 0.1}
"""A stage alone runs for as long as a trial, but no longer than this. For the first tenths of a second a GPU at its
power limit is several percent faster, so that a short span would give a bound that no trial can reach."""
_TOLERANCE = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.1}
"""Norm of the difference over the norm, after tens of layers whose sums are rounded in another order."""
_EQUAL_TOKENS = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5}
"""Least share of rows whose first tokens agree, and of those whose second do, too, which a decode step makes; likeliest
tokens of random weights lie close together."""


def warm_up(contender: Contender) -> Trial:
    """Trials until clocks, caches and libraries have settled; collective. The last one."""
    passed = 0.0
    while passed < _WARM_UP_SECONDS[torch.cuda.is_available()]:
        trial = contender.trial()
        passed += trial.seconds + trial.first_token_seconds
    return trial


def passes_per_turn(trial: Trial) -> int:
    """Batches of one turn, an odd number; the same on every rank."""
    wanted = math.ceil(_TURN_SECONDS[torch.cuda.is_available()] / max(trial.seconds, 1e-6))
    return min(wanted | 1, _MOST_PASSES)


def take_turn(contender: Contender, passes: int) -> Trial:
    """One turn: the median of each figure over the batches; collective over all ranks of the case."""
    trials = [contender.trial() for _ in range(passes)]
    tokens = [each.token_seconds for each in trials if each.token_seconds is not None]
    return Trial(
        seconds=statistics.median(each.seconds for each in trials),
        first_token_seconds=statistics.median(each.first_token_seconds for each in trials),
        token_seconds=statistics.median(tokens) if tokens else None,
    )


def time_alone(contender: Contender, trial_seconds: float) -> tuple[float, ...]:
    """Seconds of each stage over one micro-batch by itself, the slowest of its ranks; collective over all ranks.

    Right after a turn, so that the devices are as warm as in it. Stages that share a CPU go one after the other.

    Args:
        contender: Whose stages.
        trial_seconds: Of one of its trials; the same on every rank.

    Returns:
        One per stage; empty if that is not measured.
    """
    mine, on_gpu = 0.0, torch.cuda.is_available()
    span_seconds = min(max(trial_seconds, _TURN_SECONDS[on_gpu]), _MOST_ALONE_SECONDS[on_gpu])
    for stage in range(contender.configuration.strategy.pipeline_parallel):
        if contender.takes_part and (on_gpu or stage == contender.stage) and not mine:
            mine = contender.alone_seconds(span_seconds)
        dist.barrier()
    slowest: dict[int, float] = {}
    for stage, seconds in gather((contender.stage, mine)):
        slowest[stage] = max(seconds, slowest.get(stage, 0.0))
    return tuple(slowest[stage] for stage in sorted(slowest)) if all(slowest.values()) else ()


def turn_order(count: int, turns: int) -> list[int]:
    """Positions in the order of their turns: each time from the next one on, and every second time backwards.

    None comes twice in a row, which would spare it what a change of configuration costs.

    Example:
        >>> turn_order(3, 3)
        [0, 1, 2, 0, 2, 1, 2, 0, 1]
    """
    there = list(range(count))
    order = []
    for turn in range(turns if there else 0):
        rotated = there[turn % count :] + there[: turn % count]
        order += rotated[::-1] if turn % 2 else rotated
    return order


def differs(found: Outputs, wanted: Outputs, dtype: str) -> str:
    """Why results are not those of the baseline, but for rounding; empty if they are.

    Args:
        found: Of a configuration.
        wanted: The baseline's; rows that only one of them has are not compared.
        dtype: What the model computes in.
    """
    rows: Sequence[int] = range(min(len(found), len(wanted)))
    mine, theirs = found[rows], wanted[rows]
    if mine.shape != theirs.shape:
        return f"wrong results: shape {mine.shape}, the baseline's is {theirs.shape}"
    if np.issubdtype(mine.dtype, np.integer):
        return _differing_tokens(mine[:, :2] == theirs[:, :2], _EQUAL_TOKENS[dtype])
    error = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    return "" if error <= _TOLERANCE[dtype] else f"wrong results: logits differ from the baseline's by {error:.2g}"


def _differing_tokens(equal: NDArray[np.bool_], least: float) -> str:
    """Which tokens are too often not the baseline's; a row whose first one is another is not followed further.

    Args:
        equal: Whether tokens are the baseline's, [rows, 2].
        least: Share that must be.
    """
    first, second = equal.T
    for name, agree in (("first", first), ("second", second[first])):
        if agree.mean() < least:
            return f"wrong results: {agree.mean():.0%} of {name} tokens are the baseline's"
    return ""
