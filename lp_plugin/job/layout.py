"""How many processes a job has, and what they are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Replicas of a pipeline of tensor-parallel groups; one process each."""

    num_stages: int
    """Stages of a pipeline."""
    tensor_parallel: int = 1
    """Processes that share the layers of a stage."""
    data_parallel: int = 1
    """Pipelines, each with documents of its own."""

    @property
    def num_processes(self) -> int:
        """Of the whole job."""
        return self.num_stages * self.tensor_parallel * self.data_parallel

    def __str__(self) -> str:
        """Such as ``2 stages x 2 tensor-parallel x 3 replicas``."""
        parts = [f"{self.num_stages} stages" if self.num_stages > 1 else "1 stage"]
        if self.tensor_parallel > 1:
            parts.append(f"{self.tensor_parallel} tensor-parallel")
        if self.data_parallel > 1:
            parts.append(f"{self.data_parallel} replicas")
        return " x ".join(parts)
