"""Log-likelihoods against a float64 log-softmax written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lp_plugin.score.batches import IGNORED
from lp_plugin.score.likelihood import log_likelihoods


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    probabilities = logits.double().log_softmax(dim=-1)
    return [
        math.fsum(probabilities[row, at, label].item() for at, label in enumerate(line) if label != IGNORED)
        for row, line in enumerate(labels.tolist())
    ]


def test_is_the_sum_of_float64_log_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4, 33, 50, generator=generator)
    labels = torch.randint(50, (4, 33), generator=generator)
    labels[1, 7:] = IGNORED
    labels[2, ::3] = IGNORED
    result = log_likelihoods(logits, labels)
    assert result.dtype == torch.float64
    assert result.shape == (4,)
    assert result.tolist() == pytest.approx(by_hand(logits, labels), rel=1e-6)


def test_logits_at_ignored_labels_do_not_matter() -> None:
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[3, IGNORED, 0, IGNORED]])
    other = logits.clone()
    other[0, 1], other[0, 3] = 1e4, -7.0
    assert torch.equal(log_likelihoods(logits, labels), log_likelihoods(other, labels))


@pytest.mark.parametrize("length", [1, 8])
def test_row_without_a_label_is_zero(length: int) -> None:
    """A document of one token: nothing follows it."""
    logits = torch.randn(2, length, 5)
    labels = torch.full((2, length), IGNORED)
    assert log_likelihoods(logits, labels).tolist() == [0.0, 0.0]


def test_rows_are_independent_of_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 9, 11, generator=generator)
    labels = torch.randint(11, (6, 9), generator=generator)
    alone = [log_likelihoods(logits[row : row + 1], labels[row : row + 1]).item() for row in range(6)]
    assert log_likelihoods(logits, labels).tolist() == alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_first(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(3))).to(dtype)
    labels = torch.arange(80).remainder(64).view(2, 40)
    assert log_likelihoods(logits, labels).tolist() == pytest.approx(by_hand(logits, labels), rel=1e-6)


def test_long_rows_do_not_lose_small_terms() -> None:
    """A float32 sum over 20,000 tokens would be wrong in the fifth digit."""
    logits = torch.zeros(1, 20_000, 3)
    labels = torch.zeros(1, 20_000, dtype=torch.long)
    assert log_likelihoods(logits, labels).item() == pytest.approx(-20_000 * math.log(3), rel=1e-7)


def test_certain_and_impossible_tokens() -> None:
    logits = torch.tensor([[[0.0, -torch.inf], [200.0, -200.0]]])
    assert log_likelihoods(logits, torch.tensor([[0, 0]])).item() == 0.0
    assert log_likelihoods(logits, torch.tensor([[IGNORED, 1]])).item() == -400.0
    assert log_likelihoods(logits, torch.tensor([[1, 0]])).item() == -math.inf
