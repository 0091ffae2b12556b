"""Larger clusters by simulation: curves over the number of devices, and their table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lp_plugin.bench.experiment.document import Figures
from lp_plugin.bench.experiment.results import Results, SimulatedRow
from lp_plugin.bench.experiment.wording import boundaries_text, change_text, in_one_line, share_text, tokens_text

__all__ = ["SHARDED", "WHOLE_LAYERS", "rates_by_family", "scaling_tables", "simulated_cases", "starting_point"]

SHARDED = "TP x PP"
"""The family that others are compared with."""
WHOLE_LAYERS = "PP"
"""The family of pipelines of whole layers."""


def simulated_cases(simulated: Sequence[SimulatedRow]) -> dict[str, list[SimulatedRow]]:
    """Rows by the case whose layers they use, in order."""
    found: dict[str, list[SimulatedRow]] = {}
    for row in simulated:
        found.setdefault(row.case, []).append(row)
    return found


def rates_by_family(simulated: Sequence[SimulatedRow]) -> dict[str, dict[int, float]]:
    """Curves of one case: tokens per second by number of devices, ascending; rows without figures left out."""
    curves: dict[str, dict[int, float]] = {}
    for row in sorted(simulated, key=lambda each: each.devices):
        if not row.reason:
            curves.setdefault(_family(row), {})[row.devices] = row.tokens_per_second
    return curves


def _family(row: SimulatedRow) -> str:
    """What a curve is made of: ``TP x PP``, ``PP``, ``PP, sub-layer cuts`` or ``DP``."""
    kinds = re.findall(r"(DP|TP|PP)=", row.strategy)
    family = SHARDED if "TP" in kinds else " x ".join(kinds) or row.strategy
    return f"{family}, sub-layer cuts" if row.granularity == "sublayer" else family


def starting_point(curves: Mapping[str, Mapping[int, float]], family: str) -> tuple[int, float]:
    """What a curve is compared with: fewest devices and their rate; of finer cuts those of whole layers.

    Args:
        curves: Of one case, as `rates_by_family` gives them.
        family: One of them.
    """
    curve = curves[family]
    if family.startswith(f"{WHOLE_LAYERS},"):
        curve = curves.get(WHOLE_LAYERS, curve)
    fewest = min(curve)
    return fewest, curve[fewest]


def scaling_tables(results: Results) -> list[Figures]:
    """A table per case that larger clusters were simulated for."""
    return [_scaling_table(rows, case) for case, rows in simulated_cases(results.simulated).items()]


def _scaling_table(simulated: Sequence[SimulatedRow], case: str) -> Figures:
    curves = rates_by_family(simulated)
    rows = []
    for row in sorted(simulated, key=lambda each: each.devices):
        cuts = "halves of blocks" if row.granularity == "sublayer" else "whole layers"
        if row.reason:
            start = (str(row.devices), row.strategy, cuts, "not simulated")
            rows.append((*start, *[""] * 5, in_one_line(row.reason)))
            continue
        baseline = curves.get(SHARDED, {}).get(row.devices)
        fewest, least = starting_point(curves, _family(row))
        speedup, ideal = row.tokens_per_second / least, row.devices / fewest
        is_compared = baseline is not None and _family(row) != SHARDED
        rows.append(
            (
                str(row.devices),
                row.strategy,
                cuts,
                tokens_text(row.tokens_per_second),
                change_text(row.tokens_per_second / baseline - 1) if baseline and is_compared else "",
                "" if row.devices == fewest else f"{speedup:.2f} of {ideal:.2f}",
                share_text(row.bubble_fraction),
                share_text(row.communication_fraction),
                boundaries_text(row.boundaries),
                "; ".join(row.assumed),
            )
        )
    headings = ("devices", "strategy", "cuts between", "tokens/s", "over TP x PP", "speed-up of ideal", "bubble")
    return Figures(
        title=f"Simulated from the layers and links of {case}",
        headings=(*headings, "communication", "boundaries", "assumed, not measured"),
        rows=tuple(rows),
        texts=frozenset({1, 2, 8, 9}),
        notes=(
            "SIMULATED: no such cluster was run. By the schedule that predicts the measured rows, fed with the "
            "same layer times and links.",
        ),
    ).without_empty()
