"""Packing documents into steps: nothing lost, one shape per step, padding and bubbles cheap."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_plugin.job.documents import TokenizedDocuments
from lp_plugin.score.batches import IGNORED, Step, _groups, _rows, make_steps, pad_length

STEADY = settings(deadline=None, derandomize=True, database=None, max_examples=200)
MAX_POSITIONS = 120
LENGTHS = st.lists(st.integers(0, MAX_POSITIONS), max_size=120)
BUDGETS = st.integers(1, 600)
STAGES = st.integers(1, 5)
REPLICAS = st.integers(1, 3)


def made_of(lengths: list[int]) -> TokenizedDocuments:
    """Documents whose tokens name them: document i is 1000 i, 1000 i + 1, ..."""
    tokens = [1000 * index + at for index, length in enumerate(lengths) for at in range(length)]
    return TokenizedDocuments(
        ids=tuple(range(len(lengths))),
        tokens=np.array(tokens, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def steps_of(
    lengths: list[int], budget: int, stages: int, documents: list[int] | None = None, replicas: int = 1
) -> list[Step]:
    return make_steps(
        lengths,
        range(len(lengths)) if documents is None else documents,
        tokens_per_micro_batch=budget,
        num_stages=stages,
        max_positions=MAX_POSITIONS,
        num_replicas=replicas,
    )


@STEADY
@given(LENGTHS, BUDGETS, STAGES, REPLICAS)
def test_every_document_is_in_exactly_one_row(lengths: list[int], budget: int, stages: int, replicas: int) -> None:
    steps = steps_of(lengths, budget, stages, replicas=replicas)
    placed = Counter(index for step in steps for index in step.documents)
    assert placed == Counter(range(len(lengths)))
    for step in steps:
        assert step.micro_batches
        assert all(1 <= len(micro_batch) <= step.rows for micro_batch in step.micro_batches)
        assert step.length >= max(lengths[index] for index in step.documents)
        assert step.length <= MAX_POSITIONS
        assert step.tokens == step.rows * step.length


@STEADY
@given(st.data(), LENGTHS, BUDGETS, STAGES)
def test_a_resumed_job_packs_the_missing_documents_alone(
    data: st.DataObject, lengths: list[int], budget: int, stages: int
) -> None:
    missing = [index for index in range(len(lengths)) if data.draw(st.booleans())]
    steps = steps_of(lengths, budget, stages, missing)
    assert sorted(index for step in steps for index in step.documents) == missing


@STEADY
@given(LENGTHS, BUDGETS, STAGES, REPLICAS)
def test_replicas_share_the_micro_batches_evenly(lengths: list[int], budget: int, stages: int, replicas: int) -> None:
    for step in steps_of(lengths, budget, stages, replicas=replicas):
        parts = [step.of_replica(number, replicas) for number in range(replicas)]
        assert {(part.rows, part.length) for part in parts} == {(step.rows, step.length)}
        assert len({len(part.micro_batches) for part in parts}) == 1
        dealt = [part.micro_batches[turn] for turn in range(len(parts[0].micro_batches)) for part in parts]
        count = len(step.micro_batches)
        assert tuple(dealt[:count]) == step.micro_batches
        assert dealt[count:] == [()] * (len(dealt) - count)
        assert len(dealt) - count < replicas


@STEADY
@given(LENGTHS, BUDGETS, STAGES)
def test_token_budget_is_kept_unless_one_row_exceeds_it(lengths: list[int], budget: int, stages: int) -> None:
    for step in steps_of(lengths, budget, stages):
        assert step.tokens <= budget or step.rows == 1


@STEADY
@given(LENGTHS, BUDGETS, STAGES)
def test_longest_rows_come_first(lengths: list[int], budget: int, stages: int) -> None:
    steps = steps_of(lengths, budget, stages)
    assert all(first.length >= second.length for first, second in pairwise(steps))
    if lengths:
        assert steps[0].length == pad_length(max(lengths), MAX_POSITIONS)
        assert max(lengths) in {lengths[index] for index in steps[0].micro_batches[0]}


@STEADY
@given(st.integers(0, 500), st.integers(1, 500))
def test_padded_lengths(tokens: int, max_positions: int) -> None:
    padded = pad_length(min(tokens, max_positions), max_positions)
    assert min(tokens, max_positions) <= padded <= max_positions
    assert padded % 8 == 0 or padded == max_positions
    assert padded < tokens + 8 or padded == 8
    assert padded >= 1  # an empty document still has a row


@STEADY
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), BUDGETS, STAGES)
def test_inputs_labels_and_mask_are_those_of_a_naive_loop(lengths: list[int], budget: int, stages: int) -> None:
    documents = made_of(lengths)
    for step in steps_of(lengths, budget, stages):
        for number, micro_batch in enumerate(step.micro_batches):
            inputs, labels = step.inputs(documents, number), step.labels(documents, number)
            mask = step.mask(documents, number)
            assert inputs.shape == labels.shape == mask.shape == (step.rows, step.length)
            assert inputs.dtype == labels.dtype == mask.dtype == np.int64
            for row in range(step.rows):
                tokens = documents[micro_batch[row]].tolist() if row < len(micro_batch) else []
                for at in range(step.length):
                    assert mask[row, at] == (at < max(len(tokens), 1))  # a row without a token would have no mean
                    assert inputs[row, at] == (tokens[at] if at < len(tokens) else 0)
                    assert labels[row, at] == (tokens[at + 1] if at + 1 < len(tokens) else IGNORED)


def cost(groups: list[tuple[int, int]], padded: list[int], budget: int, stages: int, replicas: int) -> int:
    """Tokens that the slowest stage's time is proportional to, fill and drain included."""
    total = 0
    for first, last in groups:
        rows = _rows(last - first, padded[first], budget, stages * replicas)
        micro_batches = len(range(first, last, rows))
        each = len(range(0, micro_batches, replicas))  # of the pipeline with the most
        total += (each + stages - 1) * rows * padded[first]
    return total


@STEADY
@given(st.lists(st.integers(0, 400), min_size=1, max_size=150), BUDGETS, STAGES, REPLICAS)
def test_groups_cost_no_more_than_one_or_one_per_length(
    lengths: list[int], budget: int, stages: int, replicas: int
) -> None:
    padded = [pad_length(length, 400) for length in sorted(lengths, reverse=True)]  # at most 50 different ones
    groups = _groups(padded, budget, stages, replicas)
    assert [first for first, _ in groups] == [0, *(last for _, last in groups[:-1])]
    assert groups[-1][1] == len(padded)
    changes = [at for at in range(1, len(padded)) if padded[at] != padded[at - 1]]
    per_length = list(pairwise([0, *changes, len(padded)]))
    chosen = cost(groups, padded, budget, stages, replicas)
    assert chosen <= cost([(0, len(padded))], padded, budget, stages, replicas)
    assert chosen <= cost(per_length, padded, budget, stages, replicas)


@STEADY
@given(st.lists(st.sampled_from([8, 16, 24, 64]), min_size=1, max_size=40), st.integers(1, 300), STAGES, REPLICAS)
def test_groups_are_the_cheapest(lengths: list[int], budget: int, stages: int, replicas: int) -> None:
    """Against every way to cut between different lengths."""
    padded = sorted(lengths, reverse=True)
    changes = [at for at in range(1, len(padded)) if padded[at] != padded[at - 1]]
    every = [[at for bit, at in enumerate(changes) if chosen >> bit & 1] for chosen in range(2 ** len(changes))]
    cheapest = min(cost(list(pairwise([0, *cuts, len(padded)])), padded, budget, stages, replicas) for cuts in every)
    assert cost(_groups(padded, budget, stages, replicas), padded, budget, stages, replicas) == cheapest


def test_many_different_lengths_stay_in_a_bounded_number_of_groups() -> None:
    lengths = list(range(8, 8 * 500, 8))
    steps = make_steps(lengths, range(499), tokens_per_micro_batch=4096, num_stages=2, max_positions=4096)
    assert sorted(index for step in steps for index in step.documents) == list(range(499))
    assert len({step.length for step in steps}) <= 65


def test_equal_documents_fill_the_pipeline() -> None:
    steps = steps_of([100] * 64, 1000, 4)
    assert [(step.rows, step.length, len(step.micro_batches)) for step in steps] == [(4, 104, 16)]


def test_equal_documents_fill_all_replicas() -> None:
    steps = steps_of([100] * 64, 1000, 4, replicas=2)
    assert [(step.rows, step.length, len(step.micro_batches)) for step in steps] == [(2, 104, 32)]


def test_a_large_job_is_cut_into_steps_of_one_shape() -> None:
    steps = steps_of([8] * 1000, 8, 2)
    assert {(step.rows, step.length) for step in steps} == {(1, 8)}
    assert [len(step.micro_batches) for step in steps] == [64] * 15 + [40]


def test_no_documents() -> None:
    assert steps_of([], 8, 2) == []


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_single_document(stages: int) -> None:
    (step,) = steps_of([5], 8, stages)
    assert (step.rows, step.length, step.micro_batches) == (1, 8, ((0,),))
