"""Partitions as block counts, one per stage: ``5,4,4,4``.

The embedding is on the first stage, final norm and head are on the last; an engine that takes such a text says nothing
else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import (
    NamedLayer,
    PartitionFormat,
    block_starts,
    blocks_per_stage,
    boundaries_from_counts,
    shown,
)

__all__ = ["counts_format"]

_COUNT = re.compile(r"0*([0-9]{1,9})", re.ASCII)


def counts_format(name: str, *, variable: str | None = None) -> PartitionFormat:
    """The format of an engine that takes block counts.

    Args:
        name: The engine.
        variable: The environment variable that it reads them from; ``VARIABLE=5,4,4,4`` is read too.
    """

    def check(layers: Sequence[NamedLayer], model_type: str | None) -> None:
        del model_type
        block_starts(layers)

    def write(layers: Sequence[NamedLayer], boundaries: Sequence[int], model_type: str | None) -> str:
        del model_type
        return ",".join(str(count) for count in blocks_per_stage(layers, boundaries))

    def read(text: str, layers: Sequence[NamedLayer], model_type: str | None) -> tuple[int, ...]:
        del model_type
        bare = text.strip()
        if variable is not None:
            bare = bare.removeprefix(f"{variable}=").strip()
        bare = bare.strip("'\"")
        blocks = len(block_starts(layers)) - 1
        entries = bare.split(",", maxsplit=blocks)
        if len(entries) > blocks:
            raise PartitionFormatError(
                f"{shown(bare)} has more stages than the model's {blocks} blocks; give at most {blocks} counts."
            )
        return boundaries_from_counts(layers, [_count(entry, bare) for entry in entries])

    return PartitionFormat(name=name, cuts="between blocks", check=check, write=write, read=read)


def _count(entry: str, whole: str) -> int:
    found = _COUNT.fullmatch(entry.strip())
    if found is None:
        raise PartitionFormatError(
            f"{shown(entry.strip())} in {shown(whole)} is not a number of blocks; give whole numbers separated by "
            "commas, e.g. 5,4,4,4."
        )
    return int(found[1])
