"""The most memory held at once, against tensors of known sizes."""

import pytest
import torch

from lp_plugin.measure.peak import PeakMemory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the CPU's allocator gives")
MIB = 2**20


def made(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


def test_the_largest_sum_counts() -> None:
    with PeakMemory() as peak:
        first, second = made(3), made(4)
        del first
        third = made(2)
        del second, third
    assert peak.num_bytes == 7 * MIB


def test_what_was_before_the_start_counts_if_it_is_still_there() -> None:
    with PeakMemory() as peak:
        kept, dropped = made(1), made(9)
        del dropped
        peak.start()
        other = made(2)
        del other, kept
    assert peak.num_bytes == 3 * MIB


def test_what_was_made_outside_is_passed_over() -> None:
    outside = made(5)
    with PeakMemory() as peak:
        del outside
        inside = made(2)
        del inside
    assert peak.num_bytes == 2 * MIB


def test_backward_passes_are_seen() -> None:
    weight = torch.ones(MIB // 4, requires_grad=True)
    with PeakMemory() as peak:
        weight.exp().sum().backward()
    assert 2 * MIB <= peak.num_bytes < 3 * MIB  # the exponentials, kept for the backward pass, and the gradient
