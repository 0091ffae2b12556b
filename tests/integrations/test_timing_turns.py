"""Layers are timed by the ranks that have a turn alone: on unequal devices the others would measure another card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lp_plugin.measure.layers import REPEATS, WARM_UP


def test_a_rank_without_a_turn_times_nothing_and_shares_the_result(start: Callable[..., str], tmp_path: Path) -> None:
    script = Path(__file__).with_name("timing_turns.py")
    start("torchrun", "--standalone", "--nproc-per-node", "2", script, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    timed = 1 + WARM_UP + REPEATS  # once for the shape of its output, then to time it
    assert first["calls"] == [timed, timed]
    assert second["calls"] == [1, 1]
    assert first["seconds"] == second["seconds"]
    assert all(seconds > 0 for seconds in first["seconds"])
