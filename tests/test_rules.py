"""How engines split without being told, against their own statements and slow tellings of their rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from chains import Layer, chain

from lp_plugin import PartitionFormatError, WorkloadError
from lp_plugin.exchange.counts import blocks_per_stage
from lp_plugin.exchange.rules import BLOCK_RULES, RULES, boundaries_of_rule, deepspeed_uniform


def dealt(num_blocks: int, num_stages: int, order: list[int]) -> tuple[int, ...]:
    """An even split, then what is left over dealt out one by one."""
    counts = [num_blocks // num_stages] * num_stages
    for stage in order[: num_blocks % num_stages]:
        counts[stage] += 1
    return tuple(counts)


def front_to_back(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    return tuple(len(part) for part in np.array_split(np.arange(num_blocks), num_stages))


SLOW: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "vllm": lambda blocks, stages: dealt(blocks, stages, [*range(stages - 2, -1, -1), stages - 1]),
    "sglang": lambda blocks, stages: dealt(blocks, stages, list(range(stages - 1, -1, -1))),
    "tensorrt_llm": front_to_back,
    "transformers_native": lambda blocks, stages: dealt(blocks, stages, list(range(stages))),
}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vllm", (7, 7, 8, 8, 8, 8, 8, 7)),
        ("sglang", (7, 7, 7, 8, 8, 8, 8, 8)),
        ("tensorrt_llm", (8, 8, 8, 8, 8, 7, 7, 7)),
        ("transformers_native", (8, 8, 8, 8, 8, 7, 7, 7)),
    ],
)
def test_61_blocks_on_8_stages(name: str, counts: tuple[int, ...]) -> None:
    assert BLOCK_RULES[name](61, 8) == counts
    boundaries = boundaries_of_rule(name, chain(61), 8)
    assert boundaries == (0, *(1 + total for total in itertools.accumulate(counts[:-1])), 64)


@pytest.mark.parametrize("name", SLOW)
def test_rules_for_many_sizes(name: str) -> None:
    for stages in range(1, 17):
        for blocks in range(stages, 4 * stages + 3):
            counts = BLOCK_RULES[name](blocks, stages)
            assert counts == SLOW[name](blocks, stages)
            assert all(type(count) is int for count in counts)
            assert blocks_per_stage(chain(blocks), boundaries_of_rule(name, chain(blocks), stages)) == counts


@pytest.mark.parametrize("stages", range(1, 9))
def test_megatron_divides_or_refuses(stages: int) -> None:
    for blocks in range(stages, 40):
        if blocks % stages == 0:
            assert BLOCK_RULES["megatron_even"](blocks, stages) == (blocks // stages,) * stages
        else:
            with pytest.raises(WorkloadError, match=f"divides {blocks} blocks over {stages} stages only if"):
                BLOCK_RULES["megatron_even"](blocks, stages)


def test_deepspeed_uniform_counts_all_layers() -> None:
    assert boundaries_of_rule("deepspeed_uniform", chain(16), 4) == (0, 5, 10, 15, 19)
    for stages in range(1, 12):
        for layers in range(stages, 40):
            sizes = [high - low for low, high in itertools.pairwise(deepspeed_uniform(layers, stages))]
            assert tuple(sizes) == front_to_back(layers, stages)


@pytest.mark.parametrize("name", RULES)
def test_stages_without_layers_are_refused(name: str) -> None:
    for stages in (0, -1):
        with pytest.raises(WorkloadError, match="stages make no pipeline; give at least 1"):
            boundaries_of_rule(name, chain(4), stages)
    with pytest.raises(WorkloadError, match=r"8 stages for . (blocks|layers) leave a stage empty; give at most"):
        boundaries_of_rule(name, chain(4), 8)


def test_wrong_names_and_layers_without_blocks_are_named() -> None:
    with pytest.raises(WorkloadError, match="no rule 'vLLM'; known are deepspeed_uniform, megatron_even, sglang"):
        boundaries_of_rule("vLLM", chain(4), 2)
    with pytest.raises(PartitionFormatError, match="none of the 3 layers is a transformer block"):
        boundaries_of_rule("vllm", [Layer(f"layer {index}", "layer") for index in range(3)], 2)
    plain = [Layer(f"layer {index}", "layer") for index in range(3)]
    assert boundaries_of_rule("deepspeed_uniform", plain, 2) == (0, 2, 3)
