"""Megatron-LM: ``--pipeline-model-parallel-layout "Et*5|t*4|t*4|t*3L"``.

``E`` is the embedding, ``t`` a decoder layer, ``L`` the loss with head and final norm, ``m`` a multi-token-prediction
layer, ``|`` the end of a stage; ``x*N`` and ``(...)*N`` repeat, groups don't nest, commas say nothing. Grammar as
documented in NVIDIA/Megatron-LM, ``docs`` ("Custom Pipeline Model Parallel Layout") and
``megatron/core/transformer/pipeline_parallel_layer_layout.py``, ``PipelineParallelLayerLayout.parse_str_to_list``.
Megatron also takes layouts with empty stages and with several (virtual) stages per device; a plan has neither. In a
shell the text needs quotes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import NamedLayer, PartitionFormat, block_starts, blocks_per_stage, shown

__all__ = ["FORMAT"]

_ITEM = re.compile(r"(?:\((?P<group>[^()]+)\)|(?P<symbol>[EtLm|]))(?:\*(?P<times>[0-9]+))?", re.ASCII)
_Runs = list[tuple[str, int]]
"""Symbols with how often they stand in a row."""


def _write(layers: Sequence[NamedLayer], boundaries: Sequence[int], model_type: str | None) -> str:
    del model_type
    counts = blocks_per_stage(layers, boundaries)
    stages = ["t" * count if count < 2 else f"t*{count}" for count in counts]
    return f"E{'|'.join(stages)}L"


def _read(text: str, layers: Sequence[NamedLayer], model_type: str | None) -> tuple[int, ...]:
    del model_type
    starts = block_starts(layers)
    blocks = len(starts) - 1
    bare = text.strip().replace(",", "")
    runs = _runs(bare, limit=2 * blocks + 4)  # at most E, L, every block, and a stage for each of them
    _check_content(runs, blocks)
    boundaries, seen = [0], 0
    position = 0  # in the layer list
    for stage, run in enumerate(_stages(runs)):
        if not run:
            raise PartitionFormatError(
                f"stage {stage} of {shown(bare)} is empty; Megatron-LM lets it idle, a plan gives every stage at "
                "least one layer. Leave the stage out."
            )
        for symbol, times in run:
            seen += times if symbol == "t" else 0
            position = {"E": starts[0], "t": starts[seen], "L": len(layers)}[symbol]
        boundaries.append(position)
    return tuple(boundaries)


def _runs(text: str, limit: int) -> _Runs:
    """The text with its groups written out; not its runs, so that a large repeat costs nothing."""
    found: _Runs = []
    for symbol, group, times in _items(text, limit):
        if group is None:
            found += [(symbol, times)] if times else []
            continue
        inner = [(one, number) for one, _, number in _items(group, limit) if number]
        if len(found) + len(inner) * times > limit:
            raise PartitionFormatError(
                f"the group {shown(group)} stands {times} times in {shown(text)}: more than the {limit} symbols "
                "that this model's layers and their stages can make; lower the repeat."
            )
        found += inner * times
    return found


def _items(text: str, limit: int) -> list[tuple[str, str | None, int]]:
    """(symbol, group, repeats) from left to right."""
    items: list[tuple[str, str | None, int]] = []
    position = 0
    while position < len(text):
        item = _ITEM.match(text, position)
        if item is None:
            raise PartitionFormatError(
                f"{text[position]!r} in {shown(text)} is not part of a layout; known are E, t, L, |, x*N and "
                "(...)*N without a group inside, e.g. 'Et*5|(t*4|)*2t*3L'."
            )
        if item["group"] is not None and item["times"] is None:
            raise PartitionFormatError(
                f"the group {shown(item['group'])} has no repeat; write (...)*N, or leave the parentheses out."
            )
        digits = (item["times"] or "1").lstrip("0") or "0"
        if len(digits) > 9:
            raise PartitionFormatError(f"{shown(digits)} repeats in {shown(text)} are too many; lower the number.")
        items.append((item["symbol"] or "", item["group"], int(digits)))
        if len(items) > limit:
            raise PartitionFormatError(
                f"{shown(text)} has more than the {limit} symbols that this model's layers and their stages can "
                "make; leave some out."
            )
        position = item.end()
    return items


def _check_content(runs: _Runs, blocks: int) -> None:
    """Refuses a wrong number of symbols, or symbols in a wrong order."""
    flat = [(symbol, times) for symbol, times in runs if symbol != "|"]
    total = {symbol: sum(times for one, times in flat if one == symbol) for symbol in "EtLm"}
    if total["m"]:
        raise PartitionFormatError(
            f"the layout has {total['m']} multi-token-prediction layers (m), but the plan's layer list has none; "
            "leave them out."
        )
    for symbol, meaning in (("E", "the embedding"), ("L", "the loss, with final norm and head")):
        if total[symbol] != 1:
            raise PartitionFormatError(f"{symbol} ({meaning}) stands {total[symbol]} times; it must stand once.")
    if total["t"] != blocks:
        raise PartitionFormatError(
            f"the layout has {total['t']} decoder layers (t), but the model has {blocks} blocks; make them {blocks}."
        )
    if flat[0][0] != "E" or flat[-1][0] != "L":
        raise PartitionFormatError(
            f"the layout's layers run from {flat[0][0]} to {flat[-1][0]}; they must run from E to L."
        )


def _stages(runs: _Runs) -> list[_Runs]:
    stages: list[_Runs] = [[]]
    for symbol, times in runs:
        if symbol != "|":
            stages[-1].append((symbol, times))
            continue
        stages.append([])
        if times > 1:  # the first stage between two bars is empty, which is refused
            stages.append([])
    return stages


def _check(layers: Sequence[NamedLayer], model_type: str | None) -> None:
    del model_type
    starts = block_starts(layers)
    if starts[0] == 0 or starts[-1] == len(layers):
        missing = "before the first" if starts[0] == 0 else "after the last"
        raise PartitionFormatError(
            f"a layout names an embedding (E) and a head (L), but the model has no layer {missing} block. Use the "
            "format 'deepspeed', which numbers all layers."
        )


FORMAT = PartitionFormat(name="megatron", cuts="around blocks", check=_check, write=_write, read=_read)
"""``--pipeline-model-parallel-layout``; the embedding alone or the head alone can be a stage."""
