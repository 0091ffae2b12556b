"""Training through DeepSpeed's engine in real processes: every way in gives the same losses as the same cut by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from commands import Start
from ports import free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "train"
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
CONFIG = ("--deepspeed_config", EXAMPLE / "ds.json")
Ranks = tuple[dict[str, Any], dict[str, Any]]

TRAINED = [
    "cache-aware",
    "one stage",
    "plan",
    "tied",
    "mixed",
    "profile",
    "profile, inference",
    "profile, tied",
    "profile, mixed",
]
EVALUATED = ["frozen", "profile, frozen"]


@pytest.fixture(scope="module")
def ranks(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both ranks of deepspeed_cases.py saw."""
    folder = tmp_path_factory.mktemp("Cases")
    start(*TORCHRUN, Path(__file__).with_name("deepspeed_cases.py"), folder)
    first, second = (json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    return first, second


def losses_by_hand(ranks: Ranks, parts: list[int]) -> list[float]:
    return ranks[1][f"by hand {parts}"]["losses"]


def check_example(output: str, ranks: Ranks) -> list[int]:
    """The example's line of JSON against the same boundaries by hand; returns the boundaries."""
    (line,) = (line for line in output.splitlines() if '{"parts"' in line)
    printed = json.loads(line[line.index("{") :])
    assert len(printed["losses"]) == 5
    assert printed["losses"] == losses_by_hand(ranks, printed["parts"])
    return printed["parts"]


# the three ways in, as a user starts them


@pytest.mark.parametrize("script", ["train_import.py", "train_subclass.py"])
def test_an_import_or_the_subclass_trains_as_the_same_cut_by_hand(script: str, start: Start, ranks: Ranks) -> None:
    parts = check_example(start(*TORCHRUN, EXAMPLE / script, *CONFIG), ranks)
    assert parts == ranks[0]["cache-aware"]["ours"]["parts"]


def test_an_unchanged_script_trains_under_torchrun(start: Start, ranks: Ranks) -> None:
    output = start(*TORCHRUN, "--no-python", "lp-plugin", "launch", EXAMPLE / "train.py", *CONFIG)
    assert check_example(output, ranks) == ranks[0]["cache-aware"]["ours"]["parts"]


def test_an_unchanged_script_trains_under_deepspeeds_launcher(start: Start, ranks: Ranks) -> None:
    launcher = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--no_python", "--no_local_rank")
    output = start(*launcher, "lp-plugin", "launch", EXAMPLE / "train.py", *CONFIG)
    assert check_example(output, ranks) == ranks[0]["cache-aware"]["ours"]["parts"]


def test_the_example_is_told_apart_by_its_boundaries(ranks: Ranks) -> None:
    """Each cut has other losses, and ours is not DeepSpeed's own: the tests above compare something."""
    curves = {name: tuple(case["losses"]) for name, case in ranks[1].items() if name.startswith("by hand")}
    assert len(curves) == 6
    assert len(set(curves.values())) == 6
    assert ranks[0]["cache-aware"]["ours"]["parts"] != ranks[0]["parameters, stock"]["parts"]


# methods


@pytest.mark.parametrize("case", TRAINED + EVALUATED)
def test_losses_weights_and_random_state_equal_the_same_cut_by_hand(case: str, ranks: Ranks) -> None:
    for rank in ranks:
        ours, by_hand = rank[case]["ours"], rank[case]["by hand"]
        assert ours.pop("planned") is True
        assert by_hand.pop("planned") is False
        assert ours == by_hand
        assert ("losses" in ours) == (case in TRAINED)


@pytest.mark.parametrize("case", TRAINED + EVALUATED)
def test_boundaries_are_plain_rising_and_the_same_on_all_ranks(case: str, ranks: Ranks) -> None:
    first, second = (rank[case]["ours"] for rank in ranks)
    parts = first["parts"]
    assert parts == second["parts"]
    assert first["plain"]
    assert second["plain"]
    assert parts[0] == 0
    assert parts == sorted(set(parts)), "a stage is empty"
    stages = [first["local"], second["local"]] if len(parts) == 3 else [first["local"]]
    assert stages == [[low, high] for low, high in itertools.pairwise(parts)]


def test_both_stages_of_one_share_the_batches(ranks: Ranks) -> None:
    """Pipeline of one stage, two data-parallel ranks."""
    assert ranks[0]["one stage"]["ours"]["parts"] == [0, 7]
    assert ranks[0]["one stage"]["ours"]["losses"] == ranks[1]["one stage"]["ours"]["losses"]


def test_cache_aware_balances_work_and_not_parameters(ranks: Ranks) -> None:
    """An embedding costs nothing, the head twice the hidden layers; a tied embedding is a head where it is used so."""
    assert ranks[0]["cache-aware"]["ours"]["parts"] == [0, 6, 7]
    assert ranks[0]["tied"]["ours"]["parts"] == [0, 4, 5]


def test_frozen_layers_count(ranks: Ranks) -> None:
    weights = [12 * 300 + 300, 300 * 300 + 300, 300 * 12 + 12, 12 * 10 + 10, 0]
    assert ranks[0]["frozen, counted"]["bytes"] == [4 * count for count in weights]
    assert ranks[0]["frozen, counted"]["parts"] == [0, 1, 5]  # DeepSpeed would count the third layer alone


@pytest.mark.parametrize("case", ["plan, prefix in capitals", "plan, by section"])
def test_a_plan_file_keeps_the_case_of_its_path(case: str, ranks: Ranks) -> None:
    for rank in ranks:
        assert rank[case]["parts"] == rank["plan"]["ours"]["parts"] == [0, 1, 7]


@pytest.mark.parametrize(
    "method", ["uniform", "parameters", "Parameters", "type:dense", "type:Linear$", "type:nothing", "cache_aware"]
)
def test_deepspeeds_own_methods_and_errors_are_deepspeeds(method: str, ranks: Ranks) -> None:
    for rank in ranks:
        assert rank[f"{method}, imported"] == rank[f"{method}, stock"]
    expected = {"type:nothing": "RuntimeError", "cache_aware": "NotImplementedError"}
    assert ranks[0][f"{method}, imported"].get("error") == expected.get(method)


@pytest.mark.parametrize(
    ("case", "like"),
    [
        ("cache-aware, in capitals", "cache-aware"),
        ("subclass", "cache-aware"),
        ("subclass of a user", "cache-aware"),
        ("section overrides", "uniform"),
        ("subclass, own section", "uniform"),
    ],
)
def test_which_method_counts(case: str, like: str, ranks: Ranks) -> None:
    for rank in ranks:
        expected = rank[like]["ours"] if like == "cache-aware" else rank[f"{like}, stock"]
        assert rank[case]["parts"] == expected["parts"]
        assert rank[case]["planned"] == (like == "cache-aware")


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("plan, other layers", "PlanFileError", ["7 layers", "has 5"]),
        ("plan, other stages", "PlanFileError", ["2 stages", "has 1"]),
        ("plan, missing", "PlanFileError", ["Missing.json", "does not exist"]),
        ("plan, another on one host", "RuntimeEnvironmentError", ["rank 1 on ", "has another plan", "than rank 0 on "]),
        ("stages outnumber layers", "WorkloadError", ["2 stages", "1 layers"]),
        ("profile, nothing to infer", "DeepSpeedConfigError", ["infer", '"input"']),
        ("profile, wrong input", "DeepSpeedConfigError", ["Linear 0", "4x13", '"input"']),
        ("profile, fails on one rank", "DeepSpeedConfigError", ["OnlyWithoutGradients 1", "no gradients here"]),
    ],
)
def test_every_rank_refuses_with_the_same_error(case: str, error: str, says: list[str], ranks: Ranks) -> None:
    for rank in ranks:
        assert rank[case]["error"] == error
        assert all(part in rank[case]["message"] for part in says)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_stage_and_micro_batch_that_first_are_not_finite_are_named(stage: int, ranks: Ranks) -> None:
    """By that stage alone: the next one only hands on what it got."""
    case = f"not finite, stage {stage}"
    assert ranks[stage][case]["error"] == "NotFiniteError"
    assert f"the output of stage {stage} for micro-batch 2 of step" in ranks[stage][case]["message"]
    assert ranks[1 - stage][case] == {"evaluated": True}
    assert [rank["finite"] for rank in ranks] == [{"evaluated": True}] * 2
