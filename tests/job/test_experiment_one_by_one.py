"""Cases for more GPUs than there are: what one device can tell of them, here one CPU process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_experiment import TINY

from lp_plugin.bench.experiment.command import _run_rank
from lp_plugin.bench.experiment.derived import bubble_limit
from lp_plugin.bench.experiment.job import CaseJob, run_case, write_model
from lp_plugin.bench.experiment.report import TABLES, write_report
from lp_plugin.bench.experiment.results import CaseResult, Results, Row, load_results, save_results
from lp_plugin.bench.experiment.scale_out import needed_times
from lp_plugin.bench.experiment.settings import Case, Configuration, read_experiment
from lp_plugin.job.launch import prepare_environment

SHORTAGE = "needs 2 GPUs; this host shows 1"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaseResult, ...]:
    """Prefill and decode of the tiny experiment, as a host with one GPU runs them."""
    folder = tmp_path_factory.mktemp("short")
    text = TINY.replace('"pp=2 graphs", ', "")  # which no host without a GPU can time
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    experiment = read_experiment(folder / "tiny.toml")
    prepare_environment(None)
    found = []
    for case in experiment.cases[:2]:
        job = CaseJob(
            case=case,
            directory=str(write_model(case, folder / case.name)),
            folder="",
            trials=2,
            tables=frozenset(TABLES),
            times=tuple(needed_times(experiment, case)),
            gpus=1,
        )
        found.append(run_case(job, _run_rank, print))
    return tuple(found)


def rows_of(case: CaseResult) -> dict[str, Row]:
    return {row.name: row for row in case.rows}


def test_what_needs_one_device_runs(cases: tuple[CaseResult, ...]) -> None:
    prefill, decode = map(rows_of, cases)
    assert [name for name, row in prefill.items() if row.seconds] == ["1", "1 stock"]
    assert [name for name, row in decode.items() if row.seconds] == ["1", "1 (again)"]
    short = {name for name, row in (prefill | decode).items() if row.reason == SHORTAGE}
    assert short == {"tp=2", "pp=2 uniform", "pp=2 uniform stock", "dp=2", "pp=2"}
    assert all(len(row.seconds) == 2 for row in (prefill["1"], decode["1"]))


def test_the_others_are_cut_and_predicted(cases: tuple[CaseResult, ...]) -> None:
    prefill, decode = map(rows_of, cases)
    assert prefill["pp=2 uniform"].boundaries == (0, 3, 6)
    assert [each.source for each in prefill["pp=2 uniform"].predictions] == ["catalogue", "timed layers"]
    assert [len(each.stage_seconds) for each in decode["pp=2"].predictions] == [2, 2]
    assert {row.execution for row in decode.values()} == {"eager", ""}  # a compiled one can't run on CPUs at all
    memory = prefill["pp=2 uniform"].memory
    assert [(each.rank, each.loaded, each.peak) for each in memory] == [(0, None, None), (1, None, None)]
    assert all(each.predicted_peak > each.predicted_weights > 0 for each in memory)
    assert sorted(each.tensor_parallel for each in cases[0].layers) == [1, 2]
    assert not cases[0].links.send_bytes


def test_stages_are_timed_one_by_one_where_nothing_is_missing_of_them(cases: tuple[CaseResult, ...]) -> None:
    prefill, decode = map(rows_of, cases)
    timed = {name for name, row in prefill.items() if row.alone_seconds and not row.seconds}
    assert timed == {"pp=2 uniform", "dp=2"}  # of tp=2 all-reduces are missing, and stock is not our own
    stages = prefill["pp=2 uniform"].alone_seconds
    assert len(stages) == 2
    assert all(each > 0 for each in stages)
    assert not any(row.alone_seconds for row in decode.values())
    limit = bubble_limit(cases[0], prefill["pp=2 uniform"])
    assert limit is not None
    assert (limit.share_of_bound, limit.share_of_stages, limit.ratio_without_bubble) == (None, None, None)
    assert limit.slowest_seconds == max(stages)


def test_as_many_processes_as_there_are_gpus_for() -> None:
    wide = Configuration.parse("pp=4")
    case = Case(
        name="four",
        config={},
        dtype="float16",
        processes=4,
        phase="prefill",
        batch=4,
        micro_batch=None,
        sequence=4,
        baseline="1",
        configurations=(wide,),
    )
    for gpus, ranks, reason in (
        (0, 4, ""),
        (1, 1, "needs 4 GPUs; this host shows 1"),
        (3, 1, "needs 4 GPUs; this host shows 3"),
        (4, 4, ""),
        (8, 4, ""),
    ):
        job = CaseJob(case=case, directory="", folder="", trials=2, tables=frozenset(), times=(), gpus=gpus)
        assert (job.ranks, job.shortage(wide), job.shortage(Configuration.parse("1"))) == (ranks, reason, "")


def test_counters_of_their_stages_are_wanted(cases: tuple[CaseResult, ...]) -> None:
    prefill = rows_of(cases[0])
    assert {name for name, row in prefill.items() if row.counters} == {"tp=2", "pp=2 uniform"}
    sent = prefill["pp=2 uniform"].counters
    assert [(each.nvlink_bytes, each.nvlink_reason) for each in sent] == [(None, SHORTAGE)] * 2
    assert sent[0].counted_link_bytes == 3 * 2 * 16 * 64 * 4  # three micro-batches of two rows, one hop


def test_the_report_says_what_was_left_out(
    cases: tuple[CaseResult, ...], tmp_path: Path, main: Callable[..., tuple[int, str, str]]
) -> None:
    results = Results(command="lp-plugin bench", experiment="tiny", title="Tiny", trials=2, cases=cases)
    save_results(results, tmp_path / "results.json")
    write_report(load_results(tmp_path / "results.json"), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert SHORTAGE in text
    bubble = text.partition("Against the bubble bound")[2].partition("Limit of its stages")[0]
    assert any(line.startswith("| pp=2 uniform |") and "not measured" in line for line in bubble.splitlines())
    code, out, _ = main("bench", "report", tmp_path)
    assert (code, SHORTAGE in out) == (0, True)


def test_findings_name_what_ratios_refer_to(cases: tuple[CaseResult, ...], tmp_path: Path) -> None:
    case = dataclasses.replace(cases[0], baseline="1")
    limit = bubble_limit(case, rows_of(case)["pp=2 uniform"])
    assert limit is not None
    results = Results(command="lp-plugin bench", experiment="tiny", title="Tiny", trials=2, cases=(case,))
    write_report(results, tmp_path)
    said = f"by its stages alone pp=2 uniform would make {limit.stages_over_baseline:.3f} times the tokens/s of 1;"
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_took_no_trials_did_not_fail(cases: tuple[CaseResult, ...], tmp_path: Path) -> None:
    """As with ``--table memory-access``: some rows are left out, none was to be timed."""
    rows = tuple(dataclasses.replace(row, seconds=(), alone_seconds=()) for row in cases[0].rows)
    note = "interrupted before all counters were read"
    for case, said, unsaid in (
        (dataclasses.replace(cases[0], rows=rows), "# Tiny", "nothing ran"),
        (dataclasses.replace(cases[0], rows=rows, note=note), f"prefill: {note}.", "nothing ran"),
        (dataclasses.replace(cases[0], rows=rows[:1]), "prefill: nothing ran", note),
    ):
        results = Results(command="lp-plugin bench", experiment="tiny", title="Tiny", trials=2, cases=(case,))
        write_report(results, tmp_path, ["memory-access"])
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert said in text
        assert unsaid not in text
