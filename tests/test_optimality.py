"""The planner against every partition tried: all objectives, constraints, phases and kinds of hardware together."""

from __future__ import annotations

import math
import multiprocessing
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import pytest
from instances import OBJECTIVES, PHASES, random_cluster, random_constraints, random_profile, random_workload
from oracles import best_plan, by_layer
from plain_stages import PlainStages

from lp_plugin import Plan
from lp_plugin.objective import Constraints
from lp_plugin.solver import partition
from lp_plugin.solver.solve import solve

INSTANCES = 20_000
FACTS = (
    "two tiers",
    "three tiers",
    "unequal devices",
    "unequal links",
    "groups",
    "five stages",
    "halves of blocks",
    "experts",
    "tied weights",
    "measured seconds",
    "checkpointing",
    "ZeRO",
    "no constraint",
    "two constraints",
)
BOUNDS = ("max_latency_seconds", "min_tokens_per_second", "min_sequences", "max_memory_bytes", "tier")


@dataclass
class Tally:
    """What was met, and what went wrong; instances by their seed."""

    suboptimal: list[int] = field(default_factory=list)
    """Feasibility or the objective is wrong."""
    unlike: list[int] = field(default_factory=list)
    """As good, but not the partition that ties should give."""
    feasible: Counter[str] = field(default_factory=Counter)
    infeasible: Counter[str] = field(default_factory=Counter)


def what_is_met(stage: PlainStages, objective: str, constraints: Constraints) -> list[str]:
    """Everything about an instance that should be met often."""
    workload, cluster, layers = stage.workload, stage.cluster, stage.profile.layers
    facts = {
        "two tiers": any(len(device.tiers) == 2 for device in cluster.devices),
        "three tiers": any(len(device.tiers) == 3 for device in cluster.devices),
        "unequal devices": len(set(cluster.devices)) > 1,
        "unequal links": len(set(cluster.links)) > 1,
        "groups": cluster.group_size > 1,
        "five stages": len(cluster.devices) == 5,
        "halves of blocks": any(layer.kind == "attention" for layer in layers),
        "experts": any(layer.num_experts for layer in layers),
        "tied weights": sum(layer.shared_key is not None for layer in layers) > 1,
        "measured seconds": any(layer.seconds is not None for layer in layers),
        "checkpointing": workload.checkpointing,
        "ZeRO": workload.zero_stage == 1 and workload.data_parallel > 1,
        "no constraint": not constraints.given,
        "two constraints": len(constraints.given) > 1,
    }
    met = [objective, workload.phase, f"{objective} in {workload.phase}", *constraints.given]
    met += [f"{objective} with {name}" for name in constraints.given]
    assert tuple(facts) == FACTS
    return met + [name for name, holds in facts.items() if holds]


@pytest.fixture(scope="module")
def tally() -> Tally:
    """Of all instances; two processes share them."""
    made = Tally()
    halves = (range(INSTANCES // 2), range(INSTANCES // 2, INSTANCES))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for half in pool.map(tallied, halves):
            made.suboptimal += half.suboptimal
            made.unlike += half.unlike
            made.feasible += half.feasible
            made.infeasible += half.infeasible
    return made


def tallied(seeds: range) -> Tally:
    made = Tally()
    for seed in seeds:
        rng = random.Random(seed)  # noqa: S311 - for the same instances in every run
        profile, workload, objective = random_profile(rng), random_workload(rng), rng.choice(OBJECTIVES)
        cluster = random_cluster(rng, profile.num_layers)
        stage = PlainStages(profile, cluster, workload)
        constraints = random_constraints(rng, stage)
        best = best_plan(stage, objective, constraints)
        with pytest.MonkeyPatch.context() as patch:
            if seed % 10 == 0:  # solved as large problems are
                patch.setattr(partition, "_FEW_RUNS", 0)
            plan = solve(profile, cluster, workload, objective, constraints)
        (made.infeasible if best is None else made.feasible).update(what_is_met(stage, objective, constraints))
        if best is None or plan is None:
            if best is not plan:
                made.suboptimal.append(seed)
        elif value_of(plan, objective) != best.value:
            made.suboptimal.append(seed)
        elif (plan.bottleneck_seconds, plan.boundaries) != (best.bottleneck, best.boundaries):
            made.unlike.append(seed)
    return made


def value_of(plan: Plan, objective: str) -> float:
    """What the objective makes smallest, of a plan."""
    rooms = [stage.max_sequences for stage in plan.stages if stage.max_sequences is not None]
    values = {
        "throughput": plan.bottleneck_seconds,
        "latency": plan.latency_seconds,
        "sequences": -min(rooms, default=math.inf),
        "memory": plan.memory_share,
    }
    return values[objective]


def test_none_of_20_000_instances_is_suboptimal(tally: Tally) -> None:
    assert len(tally.suboptimal) == 0, tally.suboptimal
    assert sum(tally.feasible[objective] + tally.infeasible[objective] for objective in OBJECTIVES) == INSTANCES


def test_of_equals_the_least_bottleneck_the_smallest_spread_and_the_first(tally: Tally) -> None:
    assert len(tally.unlike) == 0, tally.unlike


def test_everything_was_met(tally: Tally) -> None:
    """Each objective, phase, constraint and kind of hardware and model, and both outcomes; and pairs of them."""
    single = {*OBJECTIVES, *PHASES, *BOUNDS, *FACTS}
    pairs = {f"{objective} with {bound}" for objective in OBJECTIVES for bound in BOUNDS}
    pairs |= {f"{objective} in {phase}" for objective in OBJECTIVES for phase in PHASES}
    assert single | pairs == {*tally.feasible} == {*tally.infeasible}
    assert min(tally.feasible.values()) >= 500
    assert min(tally.infeasible[name] for name in single) >= 500
    assert min(tally.infeasible.values()) >= 300


@pytest.mark.parametrize("seed", range(60))
def test_longer_chains_against_a_program_over_all_runs(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    profile, workload = random_profile(rng, range(15, 61)), random_workload(rng)
    cluster = random_cluster(rng, profile.num_layers, memory=8)
    stage = PlainStages(profile, cluster, workload)

    def cost(position: int, start: int, stop: int) -> float | None:
        plain = stage(position, start, stop)
        return plain.seconds if plain.memory_bytes <= cluster.devices[position].memory.usable_bytes else None

    best, plan = by_layer(profile.num_layers, len(cluster.devices), cost), solve(profile, cluster, workload)
    if best is None or plan is None:
        assert best is plan
    else:
        assert (plan.bottleneck_seconds, min(plan.stage_seconds)) == best
