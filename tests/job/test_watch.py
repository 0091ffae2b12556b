"""Ranks watch over one another: who dies, hangs or fails is named by the others, soon, and all end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lp_plugin import WorkloadError
from lp_plugin.job.place import Place, at, here, set_stage, set_step
from lp_plugin.job.watch.timeout import check_timeout
from lp_plugin.job.watch.watch import EXIT_LOST_PEER

TIMEOUT = 1.5
KILLED = -9
Case = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cases(environment: dict[str, str]) -> dict[str, Case]:
    """What watch_cases.py saw."""
    script = Path(__file__).with_name("watch_cases.py")
    ended = subprocess.run(
        [sys.executable, script],
        env=environment | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(name, rank) for name, ranks in found.items() for rank in ranks if rank["hung"]] == []
    return found


def said(case: Case, rank: int) -> list[str]:
    """Lines of a rank that are not the test's own."""
    text = "".join(line for _, line in case[rank]["lines"])
    return [line for line in text.splitlines() if line and not line.startswith("ACTS")]


def seconds(case: Case, word: str) -> float:
    """From the act to the line that tells of it."""
    acted = next(float(line.split()[1]) for rank in case for _, line in rank["lines"] if "ACTS" in line)
    return min(at for rank in case for at, line in rank["lines"] if word in line) - acted


def check_survivors(case: Case, victim: int, what: str) -> None:
    """All others end with the code for it; the first of them says who, where and why, once."""
    others = [rank for rank in range(len(case)) if rank != victim]
    assert [case[rank]["code"] for rank in others] == [EXIT_LOST_PEER] * len(others)
    (line,) = said(case, others[0])
    assert re.fullmatch(
        rf"rank {others[0]} stops: rank {victim} on \S+ \(stage {victim}, step 7, forward of micro-batch 3\) {what}",
        line,
    )
    assert [said(case, rank) for rank in others[1:]] == [[]] * (len(others) - 1)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_named_at_once(victim: int, cases: dict[str, Case]) -> None:
    case = cases[f"killed {victim}"]
    assert case[victim]["code"] == KILLED
    check_survivors(case, victim, r"died\.")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_after_the_timeout_and_killed(victim: int, cases: dict[str, Case]) -> None:
    case = cases[f"stopped {victim}"]
    assert case[victim]["code"] == KILLED
    check_survivors(case, victim, rf"hung: no sign of life for {TIMEOUT} s\.")
    assert seconds(case, "hung") >= TIMEOUT - 0.5


def test_a_rank_that_ends_without_goodbye_has_died(cases: dict[str, Case]) -> None:
    assert cases["exited"][1]["code"] == 0
    check_survivors(cases["exited"], 1, r"died\.")


def test_a_rank_that_lives_but_does_not_move_is_named(cases: dict[str, Case]) -> None:
    """It computes; the others, who don't move either, wait for it."""
    assert cases["stuck"][1]["code"] in {KILLED, EXIT_LOST_PEER}
    check_survivors(cases["stuck"], 1, rf"hung: it has not moved for {TIMEOUT} s\.")


def test_ranks_that_all_wait_for_one_another_end(cases: dict[str, Case]) -> None:
    case = cases["all wait"]
    lines = [line for rank in range(3) for line in said(case, rank)]
    assert len(lines) == 1
    assert "hung: it waits, as all others do, for 1.5 s" in lines[0]
    assert all(rank["code"] in {KILLED, EXIT_LOST_PEER} for rank in case)


def test_who_waits_for_one_that_loads_is_left_in_peace(cases: dict[str, Case]) -> None:
    """For as long as it takes, which is longer than the timeout here; only then it dies."""
    case = cases["takes its time"]
    assert case[1]["code"] == 7
    assert said(case, 0)[0].endswith("(stage 1, step 7, load) died.")
    assert seconds(case, "died") > 2 * TIMEOUT


def test_an_error_is_told_once_and_ends_all(cases: dict[str, Case]) -> None:
    case = cases["failed"]
    assert [rank["code"] for rank in case] == [EXIT_LOST_PEER, 2, EXIT_LOST_PEER]
    assert [said(case, rank) for rank in range(3)] == [[], ["error (rank 1): no such file"], []]


def test_a_mistake_is_told_with_its_traceback(cases: dict[str, Case]) -> None:
    case = cases["mistaken"]
    assert [rank["code"] for rank in case] == [EXIT_LOST_PEER, 1, EXIT_LOST_PEER]
    assert [len(said(case, rank)) > 1 for rank in range(3)] == [False, True, False]
    assert said(case, 1)[-1] == "ValueError: a mistake"


def test_a_terminated_rank_ends_though_it_computes(cases: dict[str, Case]) -> None:
    assert cases["terminated"][1]["code"] == 128 + 15
    check_survivors(cases["terminated"], 1, r"died\.")


def test_another_version_on_one_host_is_named_before_anything_runs(cases: dict[str, Case]) -> None:
    case = cases["other versions"]
    assert [rank["code"] for rank in case] == [EXIT_LOST_PEER] * 3
    assert re.search(
        r"rank 2 on \S+ has other versions than rank 0: torch 1\.0 \(rank 0: \S+\); install", said(case, 0)[0]
    )


def test_ranks_that_are_done_leave_in_any_order(cases: dict[str, Case]) -> None:
    assert [rank["code"] for rank in cases["leaves early"]] == [0, 0, 0]
    assert [said(cases["leaves early"], rank) for rank in range(3)] == [[], [], []]


@pytest.mark.parametrize("value", [0.0, 0.9, -1.0, 1e9, float("nan")])
def test_a_timeout_that_makes_no_sense_is_refused(value: float) -> None:
    with pytest.raises(WorkloadError, match=r"--timeout is .* s; give 1 to 86,400 seconds"):
        check_timeout(value, "--timeout")


def test_places_read_as_a_sentence() -> None:
    set_stage(2)
    set_step(5)
    at("receive", 4)
    assert str(here()) == "stage 2, step 5, receive of micro-batch 4"
    set_step(None)
    at("")
    assert here() == Place(stage=2)
    assert str(Place()) == "its own code"
