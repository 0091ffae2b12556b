"""What a workload counts, and which ones make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from strategies import STEADY, workloads

from lp_plugin import Workload, WorkloadError
from lp_plugin.quantity import shown


@STEADY
@given(workloads(max_batch=50))
def test_micro_batches_cover_the_batch(workload: Workload) -> None:
    pieces = [
        range(workload.batch)[first : first + workload.micro_batch]
        for first in range(0, workload.batch, workload.micro_batch)
    ]
    assert workload.num_micro_batches == len(pieces)
    assert sum(map(len, pieces)) == workload.batch


def test_tokens_by_phase() -> None:
    for phase, each in (("prefill", 10_000), ("train", 10_000), ("decode", 1)):
        workload = Workload(phase=phase, batch=1024, sequence=10_000)
        assert workload.tokens_per_sequence == each
        assert workload.total_tokens == 1024 * each


def test_an_open_micro_batch_is_not_guessed() -> None:
    workload = Workload(batch=8, sequence=1)
    for name in ("chosen_micro_batch", "num_micro_batches"):
        with pytest.raises(WorkloadError, match="micro_batch is not chosen yet"):
            getattr(workload, name)
    chosen = workload.with_micro_batch(3)
    assert (chosen.chosen_micro_batch, chosen.num_micro_batches) == (3, 3)
    assert workload.micro_batch is None


NO_COUNTS = [0, -1, 1.0, 2.5, True, False, "8", b"8", math.nan, math.inf, [8], {}, 1j, 10**9 + 1, 10**400, 10**5000]


@pytest.mark.parametrize("value", NO_COUNTS, ids=shown)
@pytest.mark.parametrize("field", ["batch", "sequence", "micro_batch", "data_parallel"])
def test_counts_are_whole_numbers_from_one(field: str, value: Any) -> None:
    with pytest.raises(WorkloadError) as caught:
        Workload(**{"phase": "train", "batch": 8, "sequence": 8, field: value})
    assert str(caught.value) == f"{field} is {shown(value)}; it must be a whole number of 1 to 1,000,000,000."


@pytest.mark.parametrize("value", [2, 3, -1, True, False, 0.0, 1.0, math.nan, "1", None, [], {}, 10**5000], ids=shown)
def test_zero_stages(value: Any) -> None:
    with pytest.raises(WorkloadError, match=r"zero_stage is .*; a pipeline takes 0 or 1"):
        Workload(phase="train", batch=1, sequence=1, zero_stage=value)


@pytest.mark.parametrize("value", [0, 1, "yes", None, math.nan, []], ids=shown)
@pytest.mark.parametrize("name", ["checkpointing", "float32_gradients"])
def test_what_is_a_yes_or_no(name: str, value: Any) -> None:
    with pytest.raises(WorkloadError, match=rf"{name} is .*; it must be True or False"):
        Workload(phase="train", batch=1, sequence=1, **{name: value})


@pytest.mark.parametrize(
    "option", [{"checkpointing": True}, {"zero_stage": 1}, {"data_parallel": 2}, {"float32_gradients": True}], ids=str
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_options_of_training_belong_to_training(phase: str, option: dict[str, Any]) -> None:
    assert Workload(phase="train", batch=1, sequence=1, **option)
    with pytest.raises(WorkloadError, match=f"belong to training, but the phase is {phase}"):
        Workload(phase=phase, batch=1, sequence=1, **option)


@pytest.mark.parametrize("field", ["batch", "sequence"])
def test_batch_and_sequence_are_needed(field: str) -> None:
    with pytest.raises(WorkloadError, match=f"{field} is None"):
        Workload(**{"batch": 8, "sequence": 8, field: None})


def test_a_micro_batch_is_no_larger_than_the_batch() -> None:
    assert Workload(batch=8, sequence=1, micro_batch=8).num_micro_batches == 1
    with pytest.raises(WorkloadError, match="micro_batch is 9, more than the batch of 8"):
        Workload(batch=8, sequence=1, micro_batch=9)
    with pytest.raises(WorkloadError, match="more than the batch"):
        Workload(batch=8, sequence=1).with_micro_batch(9)


@pytest.mark.parametrize(
    "phase", ["inference", "", None, "Prefill", 1, math.nan, [], ["train"], "x" * 10**6], ids=shown
)
def test_phases(phase: Any) -> None:
    with pytest.raises(WorkloadError, match="it must be one of prefill, decode, train"):
        Workload(phase=phase, batch=1, sequence=1)


def test_digest_covers_every_field() -> None:
    base = {"phase": "prefill", "batch": 8, "sequence": 16, "micro_batch": 2}
    changes = [{}, {"phase": "decode"}, {"batch": 9}, {"sequence": 17}, {"micro_batch": 4}, {"micro_batch": None}]
    training = [{}, {"checkpointing": True}, {"zero_stage": 1}, {"data_parallel": 2}, {"float32_gradients": True}]
    changes += [{"phase": "train", **option} for option in training]
    digests = [Workload(**{**base, **change}).digest for change in changes]
    assert len(set(digests)) == len(changes)
    assert digests[0] == Workload(**base).digest
    assert all(len(digest) == 64 for digest in digests)
