"""A kind of file that the tool reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GENERATE", "RUN", "Kind"]

RUN = ("run", "model", "--stages", "2", "--output", "out.jsonl", "--input")
"""What scores a file of texts, up to its name."""
GENERATE = ("generate", "model", "--stages", "2", "--output", "out.jsonl", "--max-new-tokens", "4", "--prompts")
"""What continues them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of file."""

    name: str
    """In the tables."""
    form: str
    """For `fuzz_mutations.mutate`."""
    file: str
    """Where it lies in a case's folder."""
    seeds: tuple[bytes, ...]
    """Sound ones."""
    api: Callable[[Path], object]
    """Reads it in a case's folder, which is the current one, by its path."""
    commands: tuple[tuple[str, ...], ...] = ()
    """Arguments of the command line, in a case's folder."""
    model: Path | None = None
    """What ``model/`` in a case's folder is a copy of."""
    beside: tuple[tuple[str, bytes], ...] = ()
    """Names and contents of other files in a case's folder."""
    weight: int = 4
    """Its share of the cases."""
