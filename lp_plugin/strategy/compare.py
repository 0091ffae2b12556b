"""Data, tensor and pipeline parallelism compared on one cluster: which to take, and whether to pipeline at all.

Every strategy is tried with every number of micro-batches that is a power of two, one per stage and one per sequence;
its stages are cut by the exact solver. See `lp_plugin.strategy.outcome` for what is modelled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lp_plugin.errors import WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.planner import check_request
from lp_plugin.strategy.layouts import LeftOut, Strategy, layouts
from lp_plugin.strategy.outcome import Outcome, Outcomes
from lp_plugin.strategy.verdict import verdict
from lp_plugin.why.margins import NO_GAIN
from lp_plugin.workload import Workload

__all__ = [
    "Comparison",
    "Study",
    "SweepRow",
    "best_of",
    "compare",
    "filling_crossover",
    "micro_batch_sweep",
    "on_front",
    "study",
    "sweep_crossover",
    "usual_strategies",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All strategies for one phase."""

    workload: Workload
    """As asked."""
    outcomes: tuple[Outcome, ...]
    """Most tokens per second first, what does not fit last. Each strategy with the micro-batches that make most tokens
    per second (within 1%: of those the most sequences, then the least latency), and a second time with those that
    answer soonest, if these are others and more than 1% sooner."""
    left_out: tuple[LeftOut, ...]
    """Layouts that were not tried, with the reason."""
    throughput: Outcome | None
    """Most tokens per second; None if nothing fits."""
    latency: Outcome | None
    """Least latency of those with at least as many sequences in flight as that; None if nothing fits."""
    verdict: str
    """Which strategy to take, and why; whether to pipeline."""

    def of(self, strategy: Strategy) -> Outcome | None:
        """The strategy's outcome with most tokens per second; None if it was not tried."""
        return next((outcome for outcome in self.outcomes if outcome.strategy == strategy), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """Some strategies with the same number of micro-batches."""

    num_micro_batches: int
    """That each replica's share of the batch is cut into, or as many as it can be below that."""
    outcomes: tuple[Outcome | None, ...]
    """One per strategy; None where the share has fewer sequences, or nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything about one request: strategies in its phases, micro-batches swept."""

    profile: ModelProfile
    """The layers."""
    cluster: Cluster
    """The devices."""
    comparisons: tuple[Comparison, ...]
    """Of prefill and decode, or of the one phase that there is."""
    swept: tuple[Strategy, ...]
    """See `usual_strategies`."""
    sweeps: tuple[tuple[SweepRow, ...], ...]
    """Of the swept strategies, one per comparison; empty if the micro-batch is given."""
    equal_batch: tuple[Outcome, ...]
    """The swept strategies decoding as many sequences as all of them hold; empty without decode."""


def compare(
    profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints | None = None
) -> Comparison:
    """All strategies for one workload.

    Args:
        profile: The layers, not sharded.
        cluster: The devices, not grouped; all of them are used, and the first one alone.
        workload: Its batch is that of all replicas together.
        constraints: What all replicas together must keep to.

    Raises:
        WorkloadError: If the request makes no sense for the model, or fixes what is compared.

    Example:
        >>> from lp_plugin import Cluster, ModelProfile, Workload
        >>> profile = ModelProfile.from_costs([1.0, 1.0, 1.0, 1.0])
        >>> workload = Workload(batch=8, sequence=1, micro_batch=1)
        >>> compare(profile, Cluster.homogeneous("h200", 2), workload).throughput.strategy.label
        'DP=2'
    """
    return _compared(_outcomes(profile, cluster, workload, constraints))


def micro_batch_sweep(
    profile: ModelProfile,
    cluster: Cluster,
    workload: Workload,
    strategies: Sequence[Strategy] | None = None,
    constraints: Constraints | None = None,
) -> tuple[SweepRow, ...]:
    """Some strategies over numbers of micro-batches: powers of two up to one per sequence.

    Args:
        profile: The layers, not sharded.
        cluster: The devices, not grouped.
        workload: Its micro-batch must be open.
        strategies: Left out: `usual_strategies`.
        constraints: What all replicas together must keep to.

    Raises:
        WorkloadError: If the micro-batch is given, or the request makes no sense for the model.
    """
    if workload.micro_batch is not None:
        raise WorkloadError(f"micro_batch is {workload.micro_batch}, but a sweep varies it; leave it out.")
    outcomes = _outcomes(profile, cluster, workload, constraints)
    return _swept(outcomes, usual_strategies(profile, cluster) if strategies is None else strategies)


def study(profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints | None = None) -> Study:
    """Everything that a report on strategies shows.

    Args:
        profile: The layers, not sharded.
        cluster: The devices, not grouped.
        workload: Prefill and decode are studied together, with this batch and length; training alone.
        constraints: Apply to the workload's own phase; to the other one only as far as they limit memory.

    Raises:
        WorkloadError: If the request makes no sense for the model, or fixes what is compared.
    """
    phases = [workload.phase]
    if workload.phase == "decode" or any(layer.kv_bytes_per_token for layer in profile.layers):
        phases = ["train"] if workload.phase == "train" else ["prefill", "decode"]
    bounds = constraints or Constraints()
    memory = Constraints(max_memory_bytes=bounds.max_memory_bytes)
    swept = usual_strategies(profile, cluster)
    comparisons, sweeps = [], []
    equal: tuple[Outcome, ...] = ()
    for phase in phases:
        limits = bounds if phase == workload.phase else memory
        outcomes = _outcomes(profile, cluster, dataclasses.replace(workload, phase=phase), limits)
        comparisons.append(_compared(outcomes))
        sweeps.append(_swept(outcomes, swept) if workload.micro_batch is None else ())
        if phase == "decode":
            equal = _at_equal_batch(outcomes, swept, memory)
    return Study(
        profile=profile,
        cluster=cluster,
        comparisons=tuple(comparisons),
        swept=swept,
        sweeps=tuple(sweeps),
        equal_batch=equal,
    )


def usual_strategies(profile: ModelProfile, cluster: Cluster) -> tuple[Strategy, ...]:
    """What people usually choose between, as far as it exists on all devices.

    Tensor parallelism as wide as a node allows times pipeline; replicas alone; a pipeline as long as the layers allow.
    """
    kept, _ = layouts(profile, cluster)
    whole = [strategy for strategy in kept if strategy.num_devices == len(cluster.devices)]
    plain = [strategy for strategy in whole if strategy.tensor_parallel == 1]
    widest = max(whole, key=lambda strategy: (-strategy.data_parallel, strategy.tensor_parallel))
    usual = [
        *([widest] if widest.tensor_parallel > 1 else []),
        max(plain, key=lambda strategy: strategy.data_parallel),
        max(plain, key=lambda strategy: strategy.pipeline_parallel),
    ]
    return tuple(dict.fromkeys(usual))


def sweep_crossover(rows: Sequence[SweepRow], challenger: int, baseline: int) -> int | None:
    """Fewest micro-batches of a sweep from which on one strategy is ahead, in every row where both fit.

    Args:
        rows: Of `micro_batch_sweep`.
        challenger: Index of the strategy that is to win.
        baseline: Index of the one that it is to beat.

    Returns:
        The number of micro-batches; None if it is never ahead, or not up to the last row.
    """
    found = None
    for row in rows:
        first, second = row.outcomes[challenger], row.outcomes[baseline]
        if first is None or second is None:
            continue
        if first.tokens_per_second <= second.tokens_per_second:
            found = None
        elif found is None:
            found = row.num_micro_batches
    return found


def filling_crossover(challenger: Outcome, baseline: Outcome) -> int | None:
    """Fewest micro-batches per replica from which on one strategy is ahead, whatever the batch; exact.

    Plans and micro-batch stay as they are; only their number grows, so this says how long a batch must be for a
    pipeline to be filled. With stages of ``s`` seconds, ``d`` replicas and ``g`` seconds for gradients the rate is
    ``d m / (sum(s) + (m - 1) max(s) + g)``, and which of two is larger is decided by a line in ``m``.

    Args:
        challenger: Usually the longer pipeline.
        baseline: What it is to beat.

    Returns:
        The number; None if it is never ahead for good.

    Raises:
        WorkloadError: If one does not fit, micro-batches differ, or it is decode, whose pipeline is not drained.
    """
    sizes = {challenger.micro_batch, baseline.micro_batch}
    if len(sizes) > 1 or sizes == {0} or _phase(challenger) == "decode":
        raise WorkloadError(
            f"{challenger.strategy.label} and {baseline.strategy.label} have micro-batches of {challenger.micro_batch} "
            f"and {baseline.micro_batch} sequences; compare outcomes of prefill or training that fit and agree."
        )
    (first, first_each), (second, second_each) = _line(challenger), _line(baseline)
    replicas, others = challenger.strategy.data_parallel, baseline.strategy.data_parallel
    lead, gain = replicas * second - others * first, replicas * second_each - others * first_each
    if gain <= 0:
        return 1 if lead > 0 and gain == 0 else None
    return 1 if lead > 0 else math.floor(-lead / gain) + 2


def _line(outcome: Outcome) -> tuple[Fraction, Fraction]:
    """Seconds of one micro-batch, and of each further one."""
    seconds = [Fraction(each) for each in outcome.plan.stage_seconds] if outcome.plan else []
    return sum(seconds, Fraction(outcome.gradient_seconds)), max(seconds)


def _phase(outcome: Outcome) -> str:
    return outcome.plan.workload.phase if outcome.plan is not None else ""


def on_front(outcomes: Sequence[Outcome]) -> list[bool]:
    """Whether no other outcome has as many tokens per second and sequences, as little latency, and one of them better.

    Outcomes that don't fit are on no front.
    """
    points = [
        (outcome.tokens_per_second, -outcome.latency_seconds, outcome.max_sequences or 0) if outcome.fits else None
        for outcome in outcomes
    ]
    return [
        point is not None
        and not any(
            other is not None and other != point and all(x >= y for x, y in zip(other, point, strict=True))
            for other in points
        )
        for point in points
    ]


def _outcomes(profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints | None) -> Outcomes:
    """Checks the request."""
    fixed = {"data_parallel": workload.data_parallel, "tensor_parallel": profile.tensor_parallel}
    fixed["group_size"] = cluster.group_size
    for name, value in fixed.items():
        if value > 1:
            raise WorkloadError(f"{name} is {value}, but strategies are compared for all values; leave it out.")
    bounds = constraints or Constraints()
    check_request(profile, cluster, workload, 1, "throughput", bounds)
    return Outcomes(profile, cluster, workload, bounds)


def _compared(made: Outcomes) -> Comparison:
    kept, left_out = layouts(made.profile, made.cluster)
    found = [outcome for strategy in kept for outcome in _best(made, strategy)]
    marked = [dataclasses.replace(outcome, on_front=mark) for outcome, mark in zip(found, on_front(found), strict=True)]
    ranked = sorted(marked, key=lambda outcome: (not outcome.fits, -outcome.tokens_per_second, outcome.latency_seconds))
    fitting = [outcome for outcome in ranked if outcome.fits]
    throughput = fitting[0] if fitting else None
    as_many = [outcome for outcome in fitting if outcome.sequences >= fitting[0].sequences]
    latency = min(as_many, key=lambda outcome: outcome.latency_seconds, default=None)
    return Comparison(
        workload=made.workload,
        outcomes=tuple(ranked),
        left_out=left_out,
        throughput=throughput,
        latency=latency,
        verdict=verdict(ranked, latency, len(made.cluster.devices)),
    )


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Of those within 1% of most tokens per second the one with most sequences in flight, then with least latency."""
    enough = max(outcome.tokens_per_second for outcome in outcomes) * (1 - NO_GAIN)
    fast = [outcome for outcome in outcomes if outcome.tokens_per_second >= enough]
    return min(fast, key=lambda outcome: (-outcome.sequences, outcome.latency_seconds))


def _best(made: Outcomes, strategy: Strategy) -> list[Outcome]:
    """With most tokens per second, and with least latency if that is another; see `Comparison.outcomes`."""
    points = [point for cuts in made.cuts(strategy) if (point := made.at(strategy, cuts)) is not None]
    if not points:
        return [made.misfit(strategy)]
    best = best_of(points)
    quick = min(points, key=lambda point: (point.latency_seconds, -point.tokens_per_second))
    return [best, quick] if quick.latency_seconds < best.latency_seconds * (1 - NO_GAIN) else [best]


def _swept(made: Outcomes, strategies: Sequence[Strategy]) -> tuple[SweepRow, ...]:
    shares = [made.share(strategy) for strategy in strategies]
    counts = sorted({*(1 << exponent for exponent in range(max(shares).bit_length())), max(shares)})
    rows = []
    for count in counts:
        pairs = zip(strategies, shares, strict=True)
        outcomes = tuple(_cut_so(made, strategy, count) if count <= share else None for strategy, share in pairs)
        rows.append(SweepRow(num_micro_batches=count, outcomes=outcomes))
    return tuple(rows)


def _cut_so(made: Outcomes, strategy: Strategy, count: int) -> Outcome | None:
    """None also if fewer sequences fit than there would be micro-batches."""
    outcome = made.at(strategy, count)
    too_few = outcome is not None and outcome.sequences < min(count * strategy.data_parallel, made.workload.batch)
    return None if too_few else outcome


def _at_equal_batch(made: Outcomes, strategies: Sequence[Strategy], limits: Constraints) -> tuple[Outcome, ...]:
    """Decoding as many sequences as all the strategies that fit can hold."""
    best = [_best(made, strategy)[0] for strategy in strategies]
    most = min((outcome.sequences for outcome in best if outcome.fits), default=0)
    if not most:
        return ()
    workload = dataclasses.replace(made.workload, batch=most, micro_batch=None)
    equal = Outcomes(made.profile, made.cluster, workload, limits)
    return tuple(_best(equal, outcome.strategy)[0] for outcome in best if outcome.fits)
