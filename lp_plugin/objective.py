"""What a plan is to be best at, and what it must keep to."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any, Literal

from lp_plugin.errors import WorkloadError
from lp_plugin.quantity import format_bytes, format_seconds, shown

__all__ = ["Constraints", "Objective"]

_LARGEST = 2**53  # larger whole numbers are no exact floats

Objective = Literal["throughput", "latency", "sequences", "memory"]
"""Slowest stage as fast as possible; least seconds through all stages (decoding: until the next token); most
sequences whose KV cache fits; fullest device as empty as possible. Among equals the slowest stage is as fast as
possible, then the spread is smallest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What every plan must keep to; None for no bound.

    Example:
        >>> Constraints(max_latency_seconds=0.5, tier="l2").as_text()
        'latency at most 500 ms, every stage in tier l2'
    """

    max_latency_seconds: float | None = None
    """Seconds of one micro-batch through all stages; decoding: until its turn comes again, its next token."""
    min_tokens_per_second: float | None = None
    """Tokens per second of a full pipeline: the slowest stage's rate, and when decoding the ring's."""
    min_sequences: int | None = None
    """Sequences of the workload's length whose KV cache fits on every stage."""
    max_memory_bytes: int | None = None
    """Bytes on each device, below its own capacity."""
    tier: str | None = None
    """Name of the slowest memory tier that any stage's working set may need."""

    def __post_init__(self) -> None:
        for name in ("max_latency_seconds", "min_tokens_per_second"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_number(value, int | float, sys.float_info.max):
                raise WorkloadError(f"{name} is {shown(value)}; it must be a number over 0 and finite, or left out.")
            object.__setattr__(self, name, float(value))
        for name in ("min_sequences", "max_memory_bytes"):
            value = getattr(self, name)
            if value is not None and not _is_number(value, int, _LARGEST):
                bound = f"a whole number of 1 to {_LARGEST:,}, or left out"
                raise WorkloadError(f"{name} is {shown(value)}; it must be {bound}.")
        if self.tier is not None and (not isinstance(self.tier, str) or not self.tier):
            raise WorkloadError(f"tier is {shown(self.tier)}; it must be the name of a memory tier, or left out.")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the bounds that are set."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def as_text(self) -> str:
        """The bounds in words; empty without any."""
        parts = []
        if self.max_latency_seconds is not None:
            parts.append(f"latency at most {format_seconds(self.max_latency_seconds)}")
        if self.min_tokens_per_second is not None:
            parts.append(f"at least {self.min_tokens_per_second:,.0f} tokens/s")
        if self.min_sequences is not None:
            parts.append(f"room for {self.min_sequences:,} sequences")
        if self.max_memory_bytes is not None:
            parts.append(f"at most {format_bytes(self.max_memory_bytes)} per device")
        if self.tier is not None:
            parts.append(f"every stage in tier {self.tier}")
        return ", ".join(parts)


def _is_number(value: Any, kinds: Any, largest: float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= largest
