"""What partitions have in common across engines: which cuts an engine can express, block counts <-> boundaries.

The texts themselves are written and read by the adapters in ``lp_plugin.integrations``; their registry is
`lp_plugin.integrations.formats`. Nothing here or there needs an engine installed.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lp_plugin.errors import PartitionFormatError

__all__ = [
    "MAX_CHARACTERS",
    "CutPlaces",
    "NamedLayer",
    "PartitionFormat",
    "Partitioned",
    "block_starts",
    "blocks_per_stage",
    "boundaries_from_counts",
    "check_boundaries",
    "read_json",
    "reason_against",
    "shown",
]

MAX_CHARACTERS = 4_000_000
"""Longest text that is read: module names of some 100,000 layers."""
_SHOWN_CHARACTERS = 80

CutPlaces = Literal["anywhere", "whole layers", "around blocks", "between blocks"]
"""Where an engine can cut: anywhere in the layer list; not inside a block; not inside a block, nor among the layers
before the first block or after the last; only between two blocks, so that every stage has at least one."""


class NamedLayer(Protocol):
    """What is asked of a layer: `lp_plugin.model.LayerCost` and `lp_plugin.plan.LayerFootprint` have it."""

    @property
    def name(self) -> str:
        """Shown in messages."""

    @property
    def kind(self) -> str:
        """``embedding``, ``block``, ``attention``, ``mlp``, ``norm``, ``head``, ..."""

    @property
    def block(self) -> int | None:
        """The transformer block that the layer is, or is a part of."""


class Partitioned(Protocol):
    """What is asked of a plan."""

    @property
    def layers(self) -> Sequence[NamedLayer]:
        """In model order."""

    @property
    def boundaries(self) -> Sequence[int]:
        """Half-open, one more than stages, from 0 to the number of layers."""

    @property
    def model_type(self) -> str | None:
        """The model's family as transformers names it; None if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionFormat:
    """How one engine writes a partition down."""

    name: str
    """What the user calls it."""
    cuts: CutPlaces
    """Where the engine can cut."""
    check: Callable[[Sequence[NamedLayer], str | None], object]
    """(layers, model type): raises `PartitionFormatError` if the format has no text for any partition of the model."""
    write: Callable[[Sequence[NamedLayer], Sequence[int], str | None], str]
    """(layers, expressible boundaries, model type) -> text."""
    read: Callable[[str, Sequence[NamedLayer], str | None], tuple[int, ...]]
    """(text, layers, model type) -> boundaries; raises `PartitionFormatError`."""


def block_starts(layers: Sequence[NamedLayer]) -> tuple[int, ...]:
    """First layer of each block, then one past the last block.

    Args:
        layers: A single run of blocks with other layers before and after it.

    Raises:
        PartitionFormatError: If there are no blocks, or they are not a single run.
    """
    inside = [index for index, layer in enumerate(layers) if layer.block is not None]
    if not inside:
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        raise PartitionFormatError(
            f"none of the {len(layers)} layers is a transformer block (kinds: {shown(kinds)}), so there are no blocks "
            "to count. Plan from a config.json, or use the format 'deepspeed', which numbers layers of any kind."
        )
    starts = [inside[0]]
    for index in range(inside[0] + 1, inside[-1] + 1):
        layer, before = layers[index], layers[index - 1]
        if layer.block is None or before.block is None or layer.block not in {before.block, before.block + 1}:
            raise PartitionFormatError(
                f"{layer.name!r} follows {before.name!r}: the blocks are not one run (an encoder and a decoder?), and "
                "block counts per stage can't say where it goes. Use the format 'deepspeed', which numbers all layers."
            )
        if layer.block != before.block:
            starts.append(index)
    return (*starts, inside[-1] + 1)


def blocks_per_stage(layers: Sequence[NamedLayer], boundaries: Sequence[int]) -> tuple[int, ...]:
    """Whole transformer blocks on each stage; 0 where a stage has only an embedding, a norm or a head.

    Args:
        layers: In model order.
        boundaries: Half-open, none of them inside a block.

    Raises:
        PartitionFormatError: If a cut is inside a block, or the blocks are not a single run.
    """
    starts = block_starts(layers)
    reason = _reason(layers, boundaries, "whole layers")
    if reason is not None:
        raise PartitionFormatError(f"{reason}. Plan without sub-layer cuts.")
    before = [bisect_left(starts, bound, hi=len(starts) - 1) for bound in boundaries]
    return tuple(high - low for low, high in itertools.pairwise(before))


def boundaries_from_counts(layers: Sequence[NamedLayer], counts: Sequence[int]) -> tuple[int, ...]:
    """Boundaries of block counts: what precedes the blocks joins the first stage, norm and head the last.

    Args:
        layers: In model order; whole blocks or their halves.
        counts: Blocks per stage, at least one each.

    Raises:
        PartitionFormatError: If a stage is empty or the counts don't add up to the model's blocks.
    """
    starts = block_starts(layers)
    blocks = len(starts) - 1
    for stage, count in enumerate(counts):
        if count < 1:
            raise PartitionFormatError(
                f"stage {stage} has {shown(count)} blocks in {shown(list(counts))}; every stage needs at least 1."
            )
    if sum(counts) != blocks:
        raise PartitionFormatError(
            f"the {len(counts)} counts {shown(list(counts))} add up to {shown(sum(counts))}, but the model has "
            f"{blocks} blocks; make them add up to {blocks}."
        )
    inner = (starts[total] for total in itertools.accumulate(counts[:-1]))
    return (0, *inner, len(layers))


def check_boundaries(boundaries: Sequence[int], num_layers: int) -> None:
    """Refuses boundaries that don't rise from 0 to the number of layers.

    Raises:
        PartitionFormatError: Naming the first stage that is wrong.
    """
    if len(boundaries) < 2:
        raise PartitionFormatError(
            f"{shown(list(boundaries))} makes no stage; give at least the two boundaries [0, {num_layers}]."
        )
    if boundaries[0] != 0 or boundaries[-1] != num_layers:
        raise PartitionFormatError(
            f"the boundaries run from {shown(boundaries[0])} to {shown(boundaries[-1])}; they must run from 0 to "
            f"{num_layers}, the number of layers."
        )
    for stage, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        if stop <= start:
            raise PartitionFormatError(
                f"stage {stage} runs from layer {shown(start)} to {shown(stop)}; a stage needs at least one layer, so "
                "boundaries must rise."
            )


def reason_against(plan: Partitioned, target: PartitionFormat, model_type: str | None) -> str | None:
    """Why an engine can't express a partition, which stage is at fault, and a partition near it that it can.

    Args:
        plan: The partition.
        target: The engine's format.
        model_type: The model's family, where the format names its modules.

    Returns:
        Sentences; None if it can.
    """
    try:
        target.check(plan.layers, model_type)
        allowed = _allowed_cuts(plan.layers, target.cuts)
        reason = _reason(plan.layers, plan.boundaries, target.cuts)
    except PartitionFormatError as error:
        return f"{target.name} can't express this partition: {error}"
    if reason is None:
        return None
    inner = plan.boundaries[1:-1]
    if len(inner) > len(allowed):
        remedy = f"It can cut this model into at most {len(allowed) + 1} stages, not {len(inner) + 1}."
    else:
        near = [0, *_near_cuts(inner, allowed), len(plan.layers)]
        remedy = f"Near it and expressible: boundaries {shown(near, 2000)}."
    return f"{target.name} can't express this partition: {reason}. {remedy}"


def shown(value: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """A value for a message as Python writes it, cut where it is long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= limit else f"{value[:limit]!r}... ({len(value)} characters)"
    text = _plain(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def read_json(text: str, expected: str) -> Any:
    """A JSON text; a key that stands twice in an object is refused.

    Args:
        text: What was given.
        expected: What it should be, for the message.

    Raises:
        PartitionFormatError: If it is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, PartitionFormatError):
            raise
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PartitionFormatError(f"{shown(text)} is not JSON ({problem}); give {expected}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PartitionFormatError(f"{shown(key)} stands twice; a module has one place. Remove one.")
        found[key] = value
    return found


def _plain(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to print whole numbers of thousands of digits
        return "a number of thousands of digits"


def _allowed_cuts(layers: Sequence[NamedLayer], cuts: CutPlaces) -> Sequence[int]:
    """Inner boundaries that an engine can express, rising."""
    if cuts == "anywhere":
        return range(1, len(layers))
    if cuts == "whole layers":
        return [index for index in range(1, len(layers)) if not _same_block(layers, index)]
    starts = block_starts(layers)
    return starts[1:-1] if cuts == "between blocks" else [cut for cut in starts if 0 < cut < len(layers)]


def _same_block(layers: Sequence[NamedLayer], cut: int) -> bool:
    return layers[cut].block is not None and layers[cut].block == layers[cut - 1].block


def _reason(layers: Sequence[NamedLayer], boundaries: Sequence[int], cuts: CutPlaces) -> str | None:
    """Why the first cut that is not allowed is not."""
    allowed = set(_allowed_cuts(layers, cuts))
    for stage, cut in enumerate(boundaries[1:-1], start=1):
        if cut in allowed:
            continue
        before, after = layers[cut - 1], layers[cut]
        if _same_block(layers, cut):
            return (
                f"stage {stage} begins inside block {after.block}, between {before.name!r} and {after.name!r}, "
                "and it cuts between whole blocks only"
            )
        if cuts == "around blocks":
            return (
                f"the cut between {before.name!r} and {after.name!r}, where stage {stage} begins: to it, all layers "
                "before the first block are one, and so are all after the last"
            )
        without = stage - 1 if cut <= block_starts(layers)[0] else stage
        names = [layer.name for layer in layers[boundaries[without] : boundaries[without + 1]]]
        return f"stage {without} has {shown(names)} but no block, and it gives every stage at least one"
    return None


def _near_cuts(inner: Sequence[int], allowed: Sequence[int]) -> list[int]:
    """For each cut an allowed one close to it, all different; there are enough of them."""
    picks: list[int] = []
    for index, cut in enumerate(inner):
        above = min(bisect_left(allowed, cut), len(allowed) - 1)
        below = max(above - 1, 0)
        nearest = below if cut - allowed[below] <= abs(allowed[above] - cut) else above
        lowest = picks[-1] + 1 if picks else 0
        picks.append(min(max(nearest, lowest), len(allowed) - (len(inner) - index)))
    return [allowed[pick] for pick in picks]
