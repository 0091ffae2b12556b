"""``lp-plugin bench FILE.toml``: a tiny experiment in real processes, and what becomes of those that fail."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_experiment import ROOT, TINY

from lp_plugin.bench.experiment.results import Results, Row, load_results
from lp_plugin.bench.experiment.settings import read_experiment

Command = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command has left, its output as ``stdout.txt`` beside."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    done = command("bench", "tiny.toml", "-o", folder / "out", cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (folder / "out" / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return folder / "out"


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return load_results(folder / "results.json")


def rows_of(results: Results, case: int) -> dict[str, Row]:
    return {row.name: row for row in results.cases[case].rows}


def test_rows_are_measured_or_say_why_not(results: Results) -> None:
    prefill, decode = rows_of(results, 0), rows_of(results, 1)
    ran = {"tp=2", "pp=2 uniform", "pp=2 uniform stock", "dp=2", "1"}
    assert {name for name, row in prefill.items() if not row.reason} == ran | {"tp=2 (again)"}
    assert "needs CUDA GPUs" in prefill["pp=2 graphs"].reason
    assert "eval_batch waits for all processes" in prefill["1 stock"].reason
    assert {name for name, row in decode.items() if not row.reason} == {"pp=2", "dp=2", "1", "1 (again)"}
    assert "needs a GPU" in decode["1 compiled"].reason
    assert "float16 needs a GPU" in results.cases[2].reason
    for row in (row for case in results.cases for row in case.rows):
        assert len(row.seconds) == len(row.first_token_seconds) == (0 if row.reason else 2)
        assert all(seconds > 0 for seconds in row.seconds)


def test_turns_keep_the_control_apart(results: Results) -> None:
    there = ["tp=2", "pp=2 uniform", "pp=2 uniform stock", "tp=2 (again)", "dp=2", "1"]
    assert list(results.cases[0].turns) == [*there, there[0], *reversed(there[1:])]
    assert results.cases[1].turns[:4] == ("1", "pp=2", "1 (again)", "dp=2")


def test_figures_of_a_row(results: Results) -> None:
    prefill, decode = rows_of(results, 0), rows_of(results, 1)
    pipeline = prefill["pp=2 uniform"]
    assert (pipeline.boundaries, pipeline.execution, len(pipeline.alone_seconds)) == ((0, 3, 6), "eager", 2)
    assert prefill["pp=2 uniform stock"].execution == "stock"
    assert [prediction.source for prediction in pipeline.predictions] == ["catalogue", "timed layers"]
    assert [each.source for each in prefill["pp=2 uniform stock"].predictions] == ["catalogue"]
    assert all(0 < seconds < min(pipeline.seconds) for seconds in pipeline.alone_seconds)
    assert [each.rank for each in pipeline.memory] == [each.rank for each in pipeline.split] == [0, 1]
    assert [each.rank for each in prefill["1"].memory] == [each.rank for each in prefill["1"].split] == [0]
    assert pipeline.flops == prefill["tp=2"].flops == prefill["1"].flops > 0
    assert pipeline.peak_flops == 0  # of a CPU nobody knows it
    assert decode["pp=2"].token_seconds
    assert all(seconds > 0 for row in decode.values() for seconds in row.token_seconds)


def test_counters_are_read_where_they_are_asked_for(results: Results) -> None:
    prefill, decode = rows_of(results, 0), rows_of(results, 1)
    assert {name for name, row in prefill.items() if row.counters} == {"tp=2", "pp=2 uniform"}
    assert not any(row.counters for row in decode.values())
    sent = prefill["pp=2 uniform"].counters
    assert [(each.stage, each.reason) for each in sent] == [(0, "there is no GPU"), (1, "there is no GPU")]
    assert sent[0].counted_link_bytes == 3 * 2 * 16 * 64 * 4  # three micro-batches of two rows, one hop
    assert all(each.counted_bytes > 0 for each in sent)


def test_the_machine_is_described(results: Results) -> None:
    case = results.cases[0]
    assert sorted(each.tensor_parallel for each in case.layers) == [1, 2]
    assert case.links.ranks == 2
    assert case.environment is not None
    assert (case.environment.backend, len(case.environment.devices)) == ("gloo", 1)
    assert {"torch", "deepspeed", "transformers", "lp_plugin"} <= case.environment.versions.keys()
    assert socket.gethostname() not in json.dumps(dataclasses.asdict(case.environment))


def test_the_report_and_its_renewal(folder: Path, main: Main) -> None:
    assert "on the engine of pp=2 uniform" in (folder / "stdout.txt").read_text(encoding="utf-8")
    assert "Time split" in (folder / "report.md").read_text(encoding="utf-8")
    code, out, _ = main("bench", "report", folder, "--table", "consistency")
    assert code == 0
    assert "prefill" in out
    assert "Time split" not in (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["missing.toml"], None, "missing.toml can't be read"),
        (["-o", "somewhere", "missing.toml"], None, "missing.toml can't be read"),
        (["bad.toml"], "trials = 'x'", "trials is 'x'"),
        (["bad.toml", "--table", "speed"], TINY, "--table 'speed' is unknown; give of: performance, time-split"),
        (["bad.toml"], TINY.replace('title = "Tiny"', 'calibration = "no.toml"'), "no.toml"),
        (["bad.toml", "-o", "bad.toml"], TINY, "folder bad.toml can't be written"),
        (["report", "."], None, "results.json can't be read"),
        (["planer"], None, "Did you mean 'planner'"),
    ],
)
def test_bad_input_ends_at_once(
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    text: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("bad.toml").write_text(text, encoding="utf-8")
    code, _, err = main("bench", *arguments)
    assert code == 2
    assert message in err


def test_help_shows_the_experiment(main: Main) -> None:
    code, out, _ = main("bench", "--help")
    assert code == 0
    assert "FILE.toml" in out
    assert "Run an experiment" in out


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "bench").glob("*.toml")), ids=lambda file: file.stem)
def test_examples_are_understood(file: Path) -> None:
    assert read_experiment(file).cases


def test_the_example_for_cpus() -> None:
    cases = read_experiment(ROOT / "examples" / "bench" / "cpu.toml").cases
    assert {(case.processes, case.phase) for case in cases} == {(2, "prefill"), (4, "prefill"), (2, "decode")}


def test_all_sequences_are_shared_out() -> None:
    from lp_plugin.bench.experiment.contender import random_tokens, share_of

    for batch, replicas in ((5, 2), (8, 4), (3, 3), (7, 1)):
        shares = [range(*share_of(batch, replica, replicas)) for replica in range(replicas)]
        assert [index for share in shares for index in share] == list(range(batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert np.array_equal(random_tokens(3, 4, 10), random_tokens(3, 4, 10))


def test_results_that_differ_by_more_than_rounding() -> None:
    from lp_plugin.bench.experiment.trials import differs

    logits = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    assert not differs(logits[:1] * np.float32(1 + 1e-6), logits, "float32")
    assert "differ from the baseline's by 0.01" in differs(logits * np.float32(1.01), logits, "float32")
    assert not differs(logits * np.float32(1.01), logits, "float16")
    assert "wrong results" in differs(logits * np.float32("nan"), logits, "bfloat16")
    assert "shape" in differs(logits[:, :3], logits, "float32")
    tokens = np.array([[1, 2], [3, 4]])
    assert not differs(tokens, tokens, "float32")
    assert "50% of first tokens" in differs(tokens, np.array([[1, 2], [4, 4]]), "float32")
    assert "50% of second tokens" in differs(tokens, np.array([[1, 2], [3, 5]]), "float32")
    assert not differs(tokens, np.array([[1, 2], [4, 5]]), "float16")  # the second row went astray before
    assert "0% of second tokens" in differs(tokens, np.array([[1, 3], [4, 4]]), "float16")


def test_turns_change_their_order() -> None:
    from lp_plugin.bench.experiment.trials import turn_order

    assert turn_order(4, 3) == [0, 1, 2, 3, 0, 3, 2, 1, 2, 3, 0, 1]
    assert turn_order(0, 3) == []
    for count in range(2, 9):
        order = turn_order(count, 12)
        assert all(first != second for first, second in itertools.pairwise(order))
        assert {tuple(sorted(turn)) for turn in zip(*[iter(order)] * count, strict=True)} == {tuple(range(count))}


def test_tokens_made_before_all_sequences_have_begun_set_no_pace() -> None:
    """The second sequence begins at 3 s, when the first has two tokens; five come in the 4 s from then on."""
    from lp_plugin.bench.experiment.decode import decode_trial

    trial = decode_trial([[1.0, 2.0, 4.0, 6.0], [3.0, 5.0, 6.0, 7.0]])
    assert trial.seconds == pytest.approx(4.0 * 6 / 5)
    assert trial.first_token_seconds == 2.0
    assert trial.token_seconds == pytest.approx((5 / 3 + 4 / 3) / 2)


def test_engines_need_room_beside_each_other() -> None:
    from lp_plugin.bench.experiment.engines import no_room

    assert not no_room([60, 40], [[40, 60]], 100)
    assert no_room([60, 101], [], 100) == "does not fit: needs 101 B of the 100 B of a device"
    assert no_room([60, 40], [[10, 30], [10, 31]], 100) == (
        "does not fit beside the others: together 101 B of the 100 B of a device; put it in a case of its own"
    )
