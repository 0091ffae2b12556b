"""DeepSpeed: ``[0, 5, 9, 13, 19]``, what a ``PipelineModule`` keeps in ``parts``: boundaries over its layer list.

The same numbers as `Plan.boundaries`, so every partition can be written, sub-layer cuts too; they are true of a
PipelineModule whose layer list is the plan's. To apply one, save it in a plan file and use
``partition_method="plan:PATH"`` (`lp_plugin.integrations.deepspeed`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import NamedLayer, PartitionFormat, check_boundaries, read_json, shown

__all__ = ["FORMAT"]

_EXPECTED = "a JSON list of layer numbers, e.g. [0, 5, 9, 13, 19]"


def _check(layers: Sequence[NamedLayer], model_type: str | None) -> None:
    del layers, model_type  # every list of layers can be numbered


def _write(layers: Sequence[NamedLayer], boundaries: Sequence[int], model_type: str | None) -> str:
    del layers, model_type
    return json.dumps(list(boundaries))


def _read(text: str, layers: Sequence[NamedLayer], model_type: str | None) -> tuple[int, ...]:
    del model_type
    parts = read_json(text, _EXPECTED)
    if not isinstance(parts, list):
        raise PartitionFormatError(f"{shown(parts)} is a JSON {type(parts).__name__}; give {_EXPECTED}.")
    if len(parts) > len(layers) + 1:
        raise PartitionFormatError(
            f"{len(parts)} boundaries make more stages than the model's {len(layers)} layers; give at most "
            f"{len(layers) + 1} boundaries."
        )
    for part in parts:
        if type(part) is not int:
            raise PartitionFormatError(f"{shown(part)} among the boundaries is no whole number; give {_EXPECTED}.")
    check_boundaries(parts, len(layers))
    return tuple(parts)


FORMAT = PartitionFormat(name="deepspeed", cuts="anywhere", check=_check, write=_write, read=_read)
"""Boundaries over the layer list."""
