"""``lp-plugin run`` in real processes: scores, plans, launchers, interruptions."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port
from runs import BINARIES, EXAMPLES, MAX_POSITIONS, PNG, Command, Run, assert_scores_are_the_models, finished, jsonl

from lp_plugin import Cluster, ModelProfile, Workload, save_plan
from lp_plugin.solver.solve import evaluate


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Very different lengths, an empty text (one token), the longest that fits, beyond ASCII, line feeds."""
    source = (EXAMPLES / "text" / "alice.txt").read_text(encoding="utf-8")
    draw = random.Random(0)  # noqa: S311 - documents, not secrets
    starts = draw.sample(range(20_000), 130)
    cut = [
        source[at : at + (draw.randrange(1, 40) if number % 4 else draw.randrange(200, 500))]
        for number, at in enumerate(starts)
    ]
    return [*cut[:20], "", "é 日本 🐇", "x" * (MAX_POSITIONS - 1), *cut[20:], "a\nb", " "]


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_stages(command: Command, tiny: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A .jsonl on 2 stages, with everything that can be written."""
    folder = tmp_path_factory.mktemp("two")
    ids: list[str | int] = [f"é{index}" if index % 3 else 1000 - index for index in range(len(texts))]
    input_path = jsonl(folder / "documents.jsonl", texts, ids)
    ended = command(
        *("run", tiny, "--input", input_path, "--stages", 2, "--micro-batch", 6, "--output", "scores.jsonl"),
        *("--report", "figures.json", "--timeline", "timeline.png"),
        cwd=folder,
    )
    return finished(ended, tiny, input_path, folder / "scores.jsonl", folder / "figures.json")


def test_scores_are_those_of_the_whole_model(two_stages: Run) -> None:
    assert_scores_are_the_models(two_stages)
    assert len({rows for rows, _, _ in two_stages.report["steps"]}) > 1  # steps of different shapes in one engine
    empty = next(record for record in two_stages.records if record["num_tokens"] == 0)
    assert math.copysign(1, empty["log_likelihood"]) == 1  # 0.0, not -0.0
    assert empty["log_likelihood"] == 0


def test_the_example_that_checks_scores_agrees(two_stages: Run, environment: dict[str, str]) -> None:
    report = two_stages.output.with_name("figures.json")
    ended = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "check_scores.py"),
            *map(str, (two_stages.model, two_stages.input, two_stages.output, report)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(two_stages.records)} documents" in ended.stdout


def test_perplexity_and_tables_are_printed(two_stages: Run) -> None:
    tokens = sum(record["num_tokens"] for record in two_stages.records)
    likelihood = math.fsum(record["log_likelihood"] for record in two_stages.records)
    perplexity = math.exp(-likelihood / tokens)
    assert f"perplexity   {perplexity:.6g} over {tokens:,} tokens of {len(two_stages.records)} documents" in (
        two_stages.stdout
    )
    assert two_stages.report["perplexity"] == pytest.approx(perplexity)
    assert "scores written to scores.jsonl" in two_stages.stdout
    assert "bottleneck" in two_stages.stderr  # the plan, before anything runs
    assert f"{len(two_stages.records)} of {len(two_stages.records)} documents" in two_stages.stderr
    assert "Traceback" not in two_stages.stdout + two_stages.stderr
    assert "Warning" not in two_stages.stdout + two_stages.stderr


def test_report_and_timeline_are_written(two_stages: Run) -> None:
    report = two_stages.report
    assert report["hosts"] == ["CPU", "CPU"]
    assert report["dtype"] == "float32"
    assert report["boundaries"][0] == 0
    assert report["boundaries"][-1] == 6
    assert report["num_documents"] == report["num_scored"] == len(two_stages.records)
    for name in ("wall_seconds", "predicted_seconds", "tokens_per_second", "bubble_bound_seconds"):
        assert report[name] > 0
    for name in ("stage_seconds", "stage_alone_seconds", "predicted_stage_seconds", "predicted_memory_bytes"):
        assert len(report[name]) == 2
        assert min(report[name]) > 0
    assert 0 < report["bubble_fraction"] < 1
    timeline = two_stages.output.with_name("timeline.png").read_bytes()
    assert timeline.startswith(PNG)
    assert len(timeline) > 5000
    left = {"documents.jsonl", "scores.jsonl", "figures.json", "timeline.png"}
    assert {path.name for path in two_stages.output.parent.iterdir()} == left


def test_two_pipelines_of_one_stage_with_a_given_micro_batch(
    command: Command, tiny: Path, texts: list[str], tmp_path: Path
) -> None:
    """A .txt numbers its lines; an old output is replaced."""
    lines = [text.replace("\n", " ") for text in texts]
    (tmp_path / "documents.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output, report = tmp_path / "scores.jsonl", tmp_path / "figures.json"
    output.write_text("old", encoding="utf-8")
    options = ("--stages", 1, "--data-parallel", 2, "--micro-batch", 3, "--output", output, "--report", report)
    ended = command("run", tiny, "--input", tmp_path / "documents.txt", *options)
    run = finished(ended, tiny, tmp_path / "documents.txt", output, report)
    assert run.report["tokens_per_micro_batch"] == 3 * MAX_POSITIONS
    assert run.report["data_parallel"] == 2
    assert run.report["num_scored"] == len(run.records)
    assert [record["id"] for record in run.records] == [at for at, line in enumerate(lines, 1) if line.strip()]
    assert_scores_are_the_models(run)


def test_three_stages_of_a_plan_file(
    command: Command,
    tiny: Path,
    texts: list[str],
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan's stages, micro-batch and half blocks; its processes share the host's cores."""
    plan, output, report = (tmp_path / name for name in ("plan.json", "scores.jsonl", "figures.json"))
    profile = ModelProfile.from_config(tiny, granularity="sublayer")
    workload = Workload(batch=8, sequence=256, micro_batch=4)
    save_plan(evaluate(profile, Cluster.homogeneous("cpu", 3), workload, (0, 2, 5, 9)), plan)
    monkeypatch.delitem(environment, "OMP_NUM_THREADS")
    input_path = jsonl(tmp_path / "documents.jsonl", texts)
    ended = command(
        "run", tiny, "--input", input_path, "--plan", plan, "--output", output, "--report", report, timeout=180
    )
    run = finished(ended, tiny, input_path, output, report)
    assert run.report["boundaries"] == [0, 2, 5, 9]
    assert run.report["tokens_per_micro_batch"] == 4 * 256
    assert run.report["threads"] == max(1, (os.cpu_count() or 1) // 3)
    assert_scores_are_the_models(run)


def test_a_plan_whose_stages_are_shared(command: Command, tiny: Path, texts: list[str], tmp_path: Path) -> None:
    """Two stages of two processes each."""
    plan, output, report = (tmp_path / name for name in ("plan.json", "scores.jsonl", "figures.json"))
    options = ("--batch", 8, "--sequence", 256, "--micro-batch", 4, "--tensor-parallel", 2)
    assert command("plan", tiny, "--cluster", "cpu:4", *options, "-o", plan).returncode == 0
    input_path = jsonl(tmp_path / "documents.jsonl", texts[:30])
    ended = command("run", tiny, "--input", input_path, "--plan", plan, "--output", output, "--report", report)
    run = finished(ended, tiny, input_path, output, report)
    assert (run.report["tensor_parallel"], run.report["data_parallel"], len(run.report["hosts"])) == (2, 1, 2)
    assert_scores_are_the_models(run)


def test_documents_of_one_token_alone(command: Command, tiny: Path, tmp_path: Path) -> None:
    """Nothing follows their only token: no perplexity, and valid JSON all the same."""
    input_path = jsonl(tmp_path / "documents.jsonl", ["", ""])
    output, report = tmp_path / "scores.jsonl", tmp_path / "figures.json"
    ended = command("run", tiny, "--input", input_path, "--stages", 1, "--output", output, "--report", report)
    run = finished(ended, tiny, input_path, output, report)
    assert run.records == [{"id": index, "num_tokens": 0, "log_likelihood": 0.0} for index in range(2)]
    assert run.report["perplexity"] is None


# --- launchers ---------------------------------------------------------------------------------------------------


def torchrun(processes: int, *arguments: object, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(str(BINARIES / "torchrun"), "--standalone", f"--nproc_per_node={processes}", "--no-python"),
            *(str(BINARIES / "lp-plugin"), *map(str, arguments)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_torchrun_gives_the_same_scores(two_stages: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    output, report = tmp_path / "scores.jsonl", tmp_path / "figures.json"
    micro_batch = two_stages.report["tokens_per_micro_batch"] // MAX_POSITIONS
    ended = torchrun(
        *(2, "run", two_stages.model, "--input", two_stages.input, "--stages", 2, "--micro-batch", micro_batch),
        *("--output", output, "--report", report),
        environment=environment,
    )
    run = finished(ended, two_stages.model, two_stages.input, output, report)
    assert run.records == two_stages.records
    assert run.stdout.count("perplexity") == 1


def test_wrong_number_of_processes_is_said_once(two_stages: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    output = tmp_path / "scores.jsonl"
    ended = torchrun(
        *(2, "run", two_stages.model, "--input", two_stages.input, "--stages", 3, "--output", output),
        environment=environment,
    )
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert "2 processes for 3 stages" in said[0]
    assert "pass --stages 2" in said[0]
    assert list(tmp_path.iterdir()) == []


def slurm(*arguments: object, environment: dict[str, str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two tasks that SLURM's variables tell apart."""
    common = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node3",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [
        subprocess.Popen(
            [str(BINARIES / "lp-plugin"), *map(str, arguments)],
            env=environment | common | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    try:
        ended = [task.communicate(timeout=120) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, *said) for task, said in zip(tasks, ended, strict=True)]


def test_slurm_tasks_run_one_job(two_stages: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    output = tmp_path / "scores.jsonl"
    micro_batch = two_stages.report["tokens_per_micro_batch"] // MAX_POSITIONS
    options = ("--stages", 2, "--micro-batch", micro_batch, "--output", output)
    first, second = slurm("run", two_stages.model, "--input", two_stages.input, *options, environment=environment)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == two_stages.records
    assert "perplexity" in first[1]
    assert second[1:] == ("", "")


def test_slurm_task_0_finds_the_input_wrong_and_the_others_end(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.monotonic()
    first, second = slurm(
        *("run", tmp_path / "nowhere", "--input", "a.txt", "--stages", 2, "--output", tmp_path / "scores.jsonl"),
        environment=environment,
    )
    assert first[0] == 2
    assert len(first[2].splitlines()) == 1
    assert "nowhere does not exist" in first[2]
    assert second[0] != 0
    assert "Traceback" not in second[2]
    assert time.monotonic() - start < 60
