"""How fast the device multiplies matrices, by size and precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lp_plugin.measure.turns import Runner, seconds_in_turns

__all__ = ["MatmulRate", "matmul_rates"]

_SIZES = {"cuda": (512, 1024, 2048, 4096, 8192, 16384), "cpu": (128, 256, 512, 1024)}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_SECONDS = 0.1
"""Larger matrices are left out if one product of a smaller one takes longer than an eighth of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulRate:
    """Square matrices, ``size`` x ``size``."""

    dtype: str
    """Precision of the factors and the product."""
    size: int
    """Rows and columns."""
    flops_per_second: float
    """``2 * size ** 3`` over the median seconds."""
    spread: float = 0.0
    """Of the seconds of repeats, between the quartiles, over the median."""


def matmul_rates(device: torch.device) -> tuple[MatmulRate, ...]:
    """Rates of dense products of random matrices, at sustained clocks.

    Args:
        device: To measure.

    Returns:
        By precision (float32, float16, bfloat16), then by size.
    """
    return tuple(rate for dtype in _DTYPES for rate in _rates(device, dtype))


def _rates(device: torch.device, dtype: torch.dtype) -> Iterator[MatmulRate]:
    for size in _SIZES[device.type]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(left)

        def multiply(
            left: torch.Tensor = left, right: torch.Tensor = right, product: torch.Tensor = product
        ) -> torch.Tensor:
            return torch.mm(left, right, out=product)

        (timed,) = seconds_in_turns([Runner(run=multiply)], device)
        yield MatmulRate(
            dtype=str(dtype).removeprefix("torch."),
            size=size,
            flops_per_second=2 * size**3 / timed.seconds,
            spread=timed.spread,
        )
        if 8 * timed.seconds > _MOST_SECONDS:
            return
