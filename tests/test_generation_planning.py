"""Rows, slots and boundaries of generation against every possibility tried, and its memory against plain sums."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from pathlib import Path

import pytest
from dense16 import DENSE16
from instances import random_cluster, random_profile
from oracles import all_cuts
from plain_stages import PlainStages

from lp_plugin import Cluster, Device, InfeasibleError, LayerCost, ModelProfile, PlanFileError, Workload, WorkloadError
from lp_plugin.generate.planning import GenerationPlan, plan_generation
from lp_plugin.planfile import load_plan, save_plan

CLOSE = 1.05  # how far the chosen number of slots may be from the fastest
SMALL = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "dtype": "float32",
}


def small(**changes: object) -> ModelProfile:
    return ModelProfile.from_config(SMALL | changes)


def on_cpu(cluster: Cluster, capacity: int | None = None) -> Cluster:
    """The same devices, called cpu: launched eagerly, and without a library's workspace; or one tier of memory."""

    def device(each: Device) -> Device:
        if capacity is None:
            return dataclasses.replace(each, name="cpu")
        memory = dataclasses.replace(each.memory, capacity_bytes=capacity, usable_fraction=1.0)
        return dataclasses.replace(each, name="cpu", tiers=(memory,))

    return dataclasses.replace(cluster, devices=tuple(device(each) for each in cluster.devices))


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be generated."""

    prompts: int
    prompt_tokens: int
    new_tokens: int


class Oracle:
    """Every partition of a job with so many rows and slots, by plain loops; plain costs only (no architecture)."""

    def __init__(self, profile: ModelProfile, cluster: Cluster, job: Job, rows: int, slots: int) -> None:
        static = [dataclasses.replace(layer, window=None, kv_window=None) for layer in profile.layers]
        first = [self._one_logit(layer, job.prompt_tokens) for layer in static]
        length = job.prompt_tokens + job.new_tokens
        self.job, self.slots, self.rows, self.cluster = job, slots, rows, cluster
        self.decode = PlainStages(
            dataclasses.replace(profile, layers=tuple(static)),
            cluster,
            Workload(phase="decode", batch=rows * slots, sequence=length, micro_batch=rows),
        )
        self.prefill = PlainStages(
            dataclasses.replace(profile, layers=tuple(first)),
            cluster,
            Workload(phase="prefill", batch=rows * slots, sequence=job.prompt_tokens, micro_batch=rows),
        )

    @staticmethod
    def _one_logit(layer: LayerCost, tokens: int) -> LayerCost:
        if layer.kind != "head":
            return layer
        return dataclasses.replace(
            layer,
            traffic_bytes_per_token=layer.traffic_bytes_per_token / tokens,
            flops_per_token=layer.flops_per_token / tokens,
            output_bytes_per_token=layer.output_bytes_per_token / tokens,
            buffer_bytes_per_token=layer.buffer_bytes_per_token / tokens,
        )

    def memory(self, stage: int, start: int, stop: int) -> int:
        step, first = self.decode(stage, start, stop), self.prefill(stage, start, stop)
        passing = step.activation_bytes + step.buffer_bytes
        before = math.ceil(first.activation_bytes * self.slots / 2) + first.buffer_bytes
        return step.weight_bytes + step.kv_bytes + max(passing, before)

    def seconds(self, bounds: tuple[int, ...]) -> float:
        """Until the last token, group by group."""
        runs = list(enumerate(itertools.pairwise(bounds)))
        step = [self.decode(stage, *run).seconds for stage, run in runs]
        first = [self.prefill(stage, *run).seconds for stage, run in runs]
        left, total = math.ceil(self.job.prompts / self.rows), 0.0
        while left > 0:
            slots = min(left, self.slots)
            total += sum(first) + (slots - 1) * max(first)
            total += (self.job.new_tokens - 1) * max(sum(step), slots * max(step))
            left -= slots
        return total

    def best(self) -> tuple[float, float] | None:
        """Seconds of the slowest stage and of the job, of the partition with the fastest slowest stage that fits."""
        found = []
        for bounds in all_cuts(self.decode.profile.num_layers, len(self.cluster.devices)):
            runs = list(enumerate(itertools.pairwise(bounds)))
            devices = self.cluster.devices
            if all(self.memory(stage, *run) <= devices[stage].memory.usable_bytes for stage, run in runs):
                seconds = [self.decode(stage, *run).seconds for stage, run in runs]
                found.append((max(seconds), max(seconds) - min(seconds), bounds))
        return None if not found else (min(found)[0], self.seconds(min(found)[2]))


def all_rows_and_slots(prompts: int, stages: int) -> list[tuple[int, int]]:
    """Those with a group for every slot."""
    pairs = itertools.product(range(1, prompts + 1), range(1, stages + 1))
    return [(rows, slots) for rows, slots in pairs if math.ceil(prompts / rows) >= slots]


def plan(profile: ModelProfile, cluster: Cluster, job: Job, micro_batch: int | None = None) -> GenerationPlan | None:
    try:
        return plan_generation(
            profile, cluster, num_stages=len(cluster.devices), micro_batch=micro_batch, **dataclasses.asdict(job)
        )
    except InfeasibleError:
        return None


def test_random_chains_get_the_best_boundaries_and_fit_whenever_anything_does() -> None:
    rng, feasible, infeasible = random.Random(5), 0, 0  # noqa: S311 - for the same instances in every run
    for _ in range(150):
        profile = random_profile(rng, sizes=(2, 3, 4, 5))
        cluster = on_cpu(random_cluster(rng, profile.num_layers), capacity=rng.choice([None, rng.randrange(50, 600)]))
        job = Job(prompts=rng.randint(1, 5), prompt_tokens=rng.randint(1, 5), new_tokens=rng.randint(1, 4))
        made = plan(profile, cluster, job)
        pairs = all_rows_and_slots(job.prompts, len(cluster.devices))
        any_fits = any(Oracle(profile, cluster, job, *pair).best() is not None for pair in pairs)
        assert (made is not None) == any_fits
        feasible, infeasible = feasible + any_fits, infeasible + (not any_fits)
        if made is None:
            continue
        oracle = Oracle(profile, cluster, job, made.micro_batch, made.num_slots)
        best = oracle.best()
        assert best is not None
        assert made.plan.bottleneck_seconds == pytest.approx(best[0], rel=1e-12, abs=1e-12)
        assert made.predicted_seconds == pytest.approx(oracle.seconds(made.plan.boundaries), rel=1e-12, abs=1e-12)
        runs = list(enumerate(itertools.pairwise(made.plan.boundaries)))
        assert made.stage_memory_bytes == tuple(oracle.memory(stage, *run) for stage, run in runs)
        assert made.stage_memory_bytes == tuple(stage.memory_bytes for stage in made.plan.stages)
    assert min(feasible, infeasible) > 15


@pytest.mark.parametrize("capacity", [2_000_000, 1_200_000, 900_000, 800_000])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_other_rows_and_slots_are_much_faster(stages: int, capacity: int) -> None:
    described = small(tie_word_embeddings=True)
    profile = dataclasses.replace(described, architecture=None)  # as plain costs, which the oracle knows
    cluster = on_cpu(Cluster.homogeneous("cpu", stages), capacity=capacity)
    for prompts in (1, 2, 5, 12):
        job = Job(prompts=prompts, prompt_tokens=12, new_tokens=9)
        made = plan(profile, cluster, job)
        tried = [Oracle(profile, cluster, job, *pair).best() for pair in all_rows_and_slots(prompts, stages)]
        seconds = [best[1] for best in tried if best is not None]
        assert (made is not None) == bool(seconds)
        if made is not None:
            assert made.predicted_seconds <= CLOSE * min(seconds)
            close = [
                pair[1]
                for pair, best in zip(all_rows_and_slots(prompts, stages), tried, strict=True)
                if best is not None and best[1] <= min(seconds)
            ]
            assert made.num_slots >= min(close)


def test_memory_is_weights_and_whole_caches_and_what_a_prefill_needs() -> None:
    rows, slots, prompt, new = 3, 2, 40, 24
    profile = small(num_key_value_heads=2)
    made = plan_generation(
        profile,
        on_cpu(Cluster.homogeneous("cpu", 2)),
        prompts=6,
        prompt_tokens=prompt,
        new_tokens=new,
        num_stages=2,
        micro_batch=rows,
    )
    assert made.num_slots == slots
    head_dim, kv_heads, length, size = 16, 2, prompt + new, 4
    kv = 2 * kv_heads * head_dim * size * length * rows * slots
    hidden = rows * prompt * 64 * size
    mlp = rows * prompt * (2 * 64 + 3 * 256) * size
    mask = rows * prompt * length
    attention = rows * prompt * (2 * 64 + 64 + 2 * 32 + 64) * size + mask * size + rows * 2 * 64 * size * length
    for stage, weights, total in zip(made.plan.stages, made.weight_bytes, made.stage_memory_bytes, strict=True):
        blocks = sum("block" in name for name in stage.layers)
        assert stage.kv_bytes == blocks * kv
        assert total == weights + stage.kv_bytes + 2 * 2 * hidden + max(mlp, attention) + mask
    assert sum(made.weight_bytes) == 4 * profile.num_parameters


def test_windows_save_nothing_in_a_static_cache() -> None:
    windows = {"model_type": "mistral", "sliding_window": 8}
    cluster = Cluster.homogeneous("cpu", 2)
    shape = {"prompts": 4, "prompt_tokens": 30, "new_tokens": 10, "num_stages": 2}
    with_windows = plan_generation(small(**windows), cluster, **shape)
    without = plan_generation(small(**windows | {"sliding_window": None}), cluster, **shape)
    assert with_windows.stage_memory_bytes == without.stage_memory_bytes
    assert with_windows.predicted_seconds == without.predicted_seconds


def test_as_many_slots_as_stages_where_it_makes_no_difference_and_no_more_than_groups() -> None:
    profile = ModelProfile.from_config(DENSE16)
    cluster = Cluster.parse("h200:4")
    shape = {"prompt_tokens": 128, "new_tokens": 64, "num_stages": 4}
    made = plan_generation(profile, cluster, prompts=64, **shape)
    assert (made.num_slots, made.micro_batch) == (4, 16)
    assert plan_generation(profile, cluster, prompts=3, **shape).num_slots <= 3
    assert plan_generation(profile, cluster, prompts=64, micro_batch=32, **shape).num_slots == 2
    assert plan_generation(profile, cluster, prompts=5, micro_batch=8, **shape).micro_batch == 5


def test_a_sharded_model_has_the_figures_of_one_device() -> None:
    profile = small()
    shape = {"prompts": 4, "prompt_tokens": 30, "new_tokens": 10, "num_stages": 2, "micro_batch": 2}
    whole = plan_generation(profile, on_cpu(Cluster.homogeneous("cpu", 2)), **shape)
    half = plan_generation(profile.sharded(2), on_cpu(Cluster.homogeneous("cpu", 4)).grouped(2), **shape)
    assert half.plan.tensor_parallel == 2
    for one, both in zip(half.plan.stages, whole.plan.stages, strict=True):
        assert one.kv_bytes * 2 == both.kv_bytes
        assert both.weight_bytes / 2 <= one.weight_bytes < both.weight_bytes * 0.51


def test_given_boundaries_are_used_and_the_plan_survives_its_file(tmp_path: Path) -> None:
    profile, cluster = small(), Cluster.homogeneous("cpu", 2)
    shape = {"prompts": 4, "prompt_tokens": 30, "new_tokens": 10, "num_stages": 2}
    best = plan_generation(profile, cluster, **shape)
    uneven = dataclasses.replace(best.plan, boundaries=(0, 2, 7))
    made = plan_generation(profile, cluster, plan=uneven, **shape)
    assert made.plan.boundaries == (0, 2, 7)
    assert made.plan.bottleneck_seconds >= best.plan.bottleneck_seconds
    assert (made.plan.model_digest, made.plan.cluster_digest) == (profile.digest, cluster.digest)
    save_plan(made.plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made.plan
    with pytest.raises(PlanFileError, match="7 layers in 2 stages, the model 8 in 2"):
        plan_generation(small(num_hidden_layers=5), cluster, plan=made.plan, **shape)
    with pytest.raises(PlanFileError, match="7 in 1"):
        plan_generation(profile, cluster, plan=made.plan, **shape | {"num_stages": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "prompts is 0; it must be a whole number of at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"new_tokens": True}, "new_tokens is True"),
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"num_stages": 3}, "3 stages for 2 devices"),
        ({"prompt_tokens": 250}, "sequence is 260 tokens, but .* allows 256"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes: dict[str, int], message: str) -> None:
    shape = {"prompts": 4, "prompt_tokens": 30, "new_tokens": 10, "num_stages": 2}
    with pytest.raises(WorkloadError, match=message):
        plan_generation(small(), Cluster.homogeneous("cpu", 2), **shape | changes)


def test_what_does_not_fit_says_what_would() -> None:
    profile = small()
    shape = {"prompts": 64, "prompt_tokens": 120, "new_tokens": 100, "num_stages": 1}
    tight = on_cpu(Cluster.homogeneous("cpu", 1), capacity=2_200_000)
    with pytest.raises(InfeasibleError) as raised:
        plan_generation(profile, tight, micro_batch=4, **shape)
    assert "no room to generate for 4 prompts at a time (220 tokens each" in str(raised.value)
    assert "does not fit" in raised.value.table
    assert raised.value.remedies
    for remedy in raised.value.remedies:
        words = remedy.split()
        number = next(int(word) for word in words if word.isdigit())
        if "stages" in remedy:
            larger = dataclasses.replace(Cluster.homogeneous("cpu", number), devices=tight.devices * number)
            for stages, fits in ((number, True), (number - 1, False)):
                smaller = larger.subset(stages)
                assert (_fits(profile, smaller, shape | {"num_stages": stages}, 4)) == fits
        elif "micro-batch" in remedy:
            assert _fits(profile, tight, shape, number)
            assert not _fits(profile, tight, shape, number + 1)
        else:
            assert _fits(profile, tight, shape | {"prompt_tokens": number}, 4)
            assert not _fits(profile, tight, shape | {"prompt_tokens": number + 1}, 4)


def _fits(profile: ModelProfile, cluster: Cluster, shape: dict[str, int], micro_batch: int) -> bool:
    try:
        plan_generation(profile, cluster, micro_batch=micro_batch, **shape)
    except InfeasibleError:
        return False
    return True


def test_the_reference_model_of_the_benchmark() -> None:
    """Two stages of 64 requests: about 2.4 GB each, most of it weights; the whole batch in flight."""
    profile = ModelProfile.from_config(DENSE16.parent / "bench" / "llama16")
    made, compiled = (
        plan_generation(
            profile,
            Cluster.parse("h200:2"),
            prompts=64,
            prompt_tokens=128,
            new_tokens=64,
            num_stages=2,
            compiled=compiled,
        )
        for compiled in (False, True)
    )
    assert (made.micro_batch, made.num_slots) == (32, 2)
    assert all(2.2e9 < total < 2.6e9 for total in made.stage_memory_bytes)
    on_one = made.plan.stages[0].buffer_bytes
    eager = plan_generation(
        profile,
        on_cpu(Cluster.parse("h200:2")),
        prompts=64,
        prompt_tokens=128,
        new_tokens=64,
        num_stages=2,
        plan=made.plan,
    )
    assert on_one - eager.plan.stages[0].buffer_bytes == 2 * 32 * 2**20  # cuBLAS workspaces
    assert compiled.plan.bottleneck_seconds < made.plan.bottleneck_seconds  # fewer kernels
    assert made.plan.bottleneck_seconds < eager.plan.bottleneck_seconds  # launches are replayed
    assert compiled.stage_memory_bytes == made.stage_memory_bytes
    assert made.tokens_per_second == pytest.approx(64 * 64 / made.predicted_seconds)
