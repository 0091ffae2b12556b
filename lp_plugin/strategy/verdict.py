"""A comparison of strategies in sentences: which to take, whether to pipeline, and why."""

from __future__ import annotations

from collections.abc import Sequence

from lp_plugin.quantity import format_bytes, format_seconds
from lp_plugin.strategy.outcome import Outcome
from lp_plugin.why.margins import NO_GAIN

__all__ = ["verdict"]

_WORTH_SAYING = 0.15
"""Part of a difference that a cause must explain to be named."""


def verdict(outcomes: Sequence[Outcome], soonest: Outcome | None, num_devices: int) -> str:
    """Which strategy makes most tokens per second and why, which answers soonest, which holds most sequences.

    Args:
        outcomes: The best first; what does not fit last.
        soonest: With least latency; None if nothing fits.
        num_devices: Of the cluster.
    """
    fitting = [outcome for outcome in outcomes if outcome.fits]
    if soonest is None:
        nearest = min(outcomes, key=lambda outcome: outcome.memory_share)
        return f"Nothing fits; nearest to it is {nearest.strategy.label}, which {nearest.reason}."
    if num_devices == 1:
        return f"{_rate(fitting[0])}; there is nothing to divide."
    return " ".join([_whether(fitting, outcomes), *_others(fitting, soonest)])


def _whether(fitting: Sequence[Outcome], outcomes: Sequence[Outcome]) -> str:
    """Whether to pipeline, and why."""
    best = fitting[0]
    pipelined = _is_pipeline(best)
    rival = next((each for each in fitting if _is_pipeline(each) != pipelined), None)
    start = ("Pipeline: " if pipelined else "Don't pipeline: ") + _rate(best)
    if rival is None:
        missing = [each for each in outcomes if not each.fits and _is_pipeline(each) != pipelined]
        reasons = "; ".join(f"{each.strategy.label} {each.reason}" for each in missing)
        name = "nothing without a pipeline" if pipelined else "no pipeline"
        return f"{start}; {name} fits ({reasons})." if missing else f"{start}; {name} is possible."
    name = f"{rival.strategy.label}, the best {'without a pipeline' if pipelined else 'pipeline'}"
    if best.tokens_per_second <= rival.tokens_per_second * (1 + NO_GAIN):
        start = f"A pipeline gains next to nothing: {_rate(best)}" if pipelined else start
        return f"{start}; {name}, makes as many within {NO_GAIN:.0%}."
    gain = best.tokens_per_second / rival.tokens_per_second - 1
    return f"{start}, {gain:.1%} more than {name}, which {_loses_by(best, rival)}."


def _others(fitting: Sequence[Outcome], soonest: Outcome) -> list[str]:
    """What to take for latency or room instead."""
    best = fitting[0]
    roomiest = max(fitting, key=lambda outcome: outcome.max_sequences or 0)
    sentences = []
    if soonest.latency_seconds < best.latency_seconds * (1 - NO_GAIN):
        sentences.append(
            f"Least latency: {_name(soonest)}, {format_seconds(soonest.latency_seconds)} against "
            f"{format_seconds(best.latency_seconds)}."
        )
    if (roomiest.max_sequences or 0) > (best.max_sequences or 0) * (1 + NO_GAIN):
        sentences.append(
            f"Most room: {roomiest.strategy.label} keeps the KV cache of {roomiest.max_sequences:,} sequences "
            f"against {best.max_sequences or 0:,}."
        )
    return sentences


def _loses_by(best: Outcome, rival: Outcome) -> str:
    """The causes of the rival's loss, the largest first."""
    lost = {cause: seconds - _seconds(best)[cause] for cause, seconds in _seconds(rival).items()}
    least = _WORTH_SAYING * sum(lost.values())
    causes = sorted((cause for cause in lost if lost[cause] >= least), key=lambda cause: -lost[cause])
    return " and ".join(_in_words(cause, best, rival) for cause in causes)


def _seconds(outcome: Outcome) -> dict[str, float]:
    """Seconds per token by what they are spent on."""
    whole = 1 / outcome.tokens_per_second
    communication, bubble = outcome.communication_share, outcome.bubble
    return {
        "compute": whole * (1 - communication - bubble),
        "communication": whole * communication,
        "bubble": whole * bubble,
    }


def _in_words(cause: str, best: Outcome, rival: Outcome) -> str:
    if cause == "bubble":
        return f"waits {rival.bubble:.1%} of its time (against {best.bubble:.1%})"
    if cause == "communication":
        return f"communicates {rival.communication_share:.1%} of its time (against {best.communication_share:.1%})"
    if rival.sequences < best.sequences:
        return f"holds only {rival.sequences:,} sequences at once (against {best.sequences:,})"
    if rival.weight_bytes_per_token > best.weight_bytes_per_token * (1 + NO_GAIN):
        read, less = format_bytes(rival.weight_bytes_per_token), format_bytes(best.weight_bytes_per_token)
        return f"reads {read} of weights per token (against {less})"
    if rival.plan is not None and rival.sequences < rival.strategy.data_parallel * rival.plan.workload.batch:
        return f"can't divide {rival.sequences:,} sequences evenly by {rival.strategy.data_parallel} replicas"
    return "computes longer per token"


def _rate(outcome: Outcome) -> str:
    return f"{_name(outcome)} makes {outcome.tokens_per_second:,.0f} tokens/s"


def _name(outcome: Outcome) -> str:
    size = outcome.micro_batch
    return f"{outcome.strategy.label} with micro-batches of {size:,} sequence{'s' if size > 1 else ''}"


def _is_pipeline(outcome: Outcome) -> bool:
    return outcome.strategy.pipeline_parallel > 1
