"""``lp-plugin run`` in real processes: scores, plans, launchers, interruptions."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lp_plugin.planfile import load_plan
from lp_plugin.score.batches import make_steps
from lp_plugin.score.documents import read_documents, tokenize
from lp_plugin.score.job import prepare
from lp_plugin.score.journal import Journal, Score
from lp_plugin.score.likelihood import log_likelihoods

EXAMPLES = Path(__file__).parents[2] / "examples"
MAX_POSITIONS = 512
BINARIES = Path(sys.executable).parent
PNG = b"\x89PNG"
Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run and what it left."""

    model: Path
    input: Path
    output: Path
    report: dict[str, Any]
    stdout: str
    stderr: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]


def jsonl(path: Path, texts: list[str], ids: list[str | int] | None = None) -> Path:
    records = [{"id": index if ids is None else ids[index], "text": text} for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


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


def assert_scores_are_the_models(run: Run) -> None:
    """Equal on the same padded rows; within float32's rounding alone and unpadded."""
    documents = tokenize(read_documents(run.input), run.model, MAX_POSITIONS, 264)
    assert [record["id"] for record in run.records] == list(documents.ids)
    assert [record["num_tokens"] for record in run.records] == [length - 1 for length in documents.lengths]
    scores = [record["log_likelihood"] for record in run.records]
    steps = make_steps(
        documents.lengths,
        range(len(documents)),
        tokens_per_micro_batch=run.report["tokens_per_micro_batch"],
        num_stages=len(run.report["hosts"]),
        max_positions=MAX_POSITIONS,
    )
    assert run.report["steps"] == [[step.rows, step.length, len(step.micro_batches)] for step in steps]
    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    before = torch.get_num_threads()
    torch.set_num_threads(run.report["threads"])  # another number adds in another order
    try:
        for step in steps:
            for number, indices in enumerate(step.micro_batches):
                inputs = torch.from_numpy(step.inputs(documents, number))
                labels = torch.from_numpy(step.labels(documents, number))
                with torch.no_grad():
                    values = log_likelihoods(model(inputs, use_cache=False).logits, labels).tolist()
                assert values[: len(indices)] == [scores[index] for index in indices]
        for index in range(len(documents)):
            tokens = torch.from_numpy(documents[index]).long()
            with torch.no_grad():
                logits = model(tokens[None], use_cache=False).logits[0, :-1].double()
            likelihood = logits.log_softmax(dim=-1).gather(1, tokens[1:, None]).sum().item()
            assert scores[index] == pytest.approx(likelihood, rel=1e-5, abs=1e-6)
    finally:
        torch.set_num_threads(before)


def finished(
    process: subprocess.CompletedProcess[str], model: Path, input_path: Path, output: Path, report: Path
) -> Run:
    assert process.returncode == 0, process.stderr[-3000:]
    return Run(
        model=model,
        input=input_path,
        output=output,
        report=json.loads(report.read_text(encoding="utf-8")),
        stdout=process.stdout,
        stderr=process.stderr,
    )


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


def test_one_stage_of_text_with_a_given_micro_batch(
    command: Command, tiny: Path, texts: list[str], tmp_path: Path
) -> None:
    """A .txt numbers its lines; an old output is replaced."""
    lines = [text.replace("\n", " ") for text in texts]
    (tmp_path / "documents.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output, report = tmp_path / "scores.jsonl", tmp_path / "figures.json"
    output.write_text("old", encoding="utf-8")
    options = ("--stages", 1, "--micro-batch", 3, "--output", output, "--report", report)
    ended = command("run", tiny, "--input", tmp_path / "documents.txt", *options)
    run = finished(ended, tiny, tmp_path / "documents.txt", output, report)
    assert run.report["tokens_per_micro_batch"] == 3 * MAX_POSITIONS
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
    """The plan's stages and micro-batch; the host's cores are shared by as many processes as the plan has stages."""
    plan, output, report = (tmp_path / name for name in ("plan.json", "scores.jsonl", "figures.json"))
    workload = ("--batch", 8, "--sequence", 256, "--micro-batch", 4)
    assert command("plan", tiny, "--cluster", "cpu:3", *workload, "-o", plan).returncode == 0
    monkeypatch.delitem(environment, "OMP_NUM_THREADS")
    input_path = jsonl(tmp_path / "documents.jsonl", texts)
    ended = command(
        "run", tiny, "--input", input_path, "--plan", plan, "--output", output, "--report", report, timeout=180
    )
    run = finished(ended, tiny, input_path, output, report)
    assert run.report["boundaries"] == list(load_plan(plan).boundaries)
    assert run.report["tokens_per_micro_batch"] == 4 * 256
    assert run.report["threads"] == max(1, (os.cpu_count() or 1) // 3)
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node3",
        "MASTER_PORT": port,
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


# --- interruptions -----------------------------------------------------------------------------------------------


class Interrupted:
    """A job that is started again and again; ranks take a few seconds to score it all."""

    def __init__(self, model: Path, folder: Path, environment: dict[str, str]) -> None:
        draw = random.Random(1)  # noqa: S311
        source = (EXAMPLES / "text" / "alice.txt").read_text(encoding="utf-8")
        texts = [source[at : at + draw.randrange(150, 500)] for at in range(0, 24_000, 20)]
        self.model, self.input = model, jsonl(folder / "documents.jsonl", texts)
        self.count = len(texts)
        self.output, self.report = folder / "scores.jsonl", folder / "figures.json"
        self.partial = folder / "scores.jsonl.partial"
        files = ("--input", self.input, "--output", self.output, "--report", self.report)
        arguments = (BINARIES / "lp-plugin", "run", model, *files, "--stages", 2, "--micro-batch", 1)
        self.command = list(map(str, arguments))
        self.environment = environment

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def journaled(self) -> list[int]:
        """Documents that have a score."""
        if not self.partial.exists():
            return []
        lines = self.partial.read_text(encoding="utf-8").split("\n")[1:-1]
        return [json.loads(line)["index"] for line in lines]

    def wait_for_more(self, process: subprocess.Popen[str]) -> None:
        """Until another step's scores are on disk."""
        before = len(self.journaled())
        deadline = time.monotonic() + 100
        while len(self.journaled()) <= before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, process: subprocess.Popen[str]) -> str:
        """What it said, once it and its ranks have ended, which must be soon."""
        ranks = children(process.pid)
        start = time.monotonic()
        _, stderr = process.communicate(timeout=15)
        while any(map(alive, ranks)):
            assert time.monotonic() - start < 15, "ranks are still running"
            time.sleep(0.05)
        return stderr


def children(pid: int) -> list[int]:
    """The ranks' processes, multiprocessing's own helper left out."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def interrupted(tiny: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[Interrupted]:
    started: list[subprocess.Popen[str]] = []
    job = Interrupted(tiny, tmp_path, environment)
    start = job.start

    def remembered() -> subprocess.Popen[str]:
        started.append(start())
        return started[-1]

    job.start = remembered  # type: ignore[method-assign]
    yield job
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_interrupted_by_hand_then_by_a_crash_the_job_goes_on(interrupted: Interrupted) -> None:
    process = interrupted.start()
    interrupted.wait_for_more(process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    said = interrupted.end(process)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted; finished documents are kept")
    assert "Traceback" not in said
    first = interrupted.journaled()
    assert 0 < len(first) < interrupted.count
    assert not interrupted.output.exists()

    process = interrupted.start()
    interrupted.wait_for_more(process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said = interrupted.end(process)
    assert process.returncode == 2
    assert said.count("error") == 1
    assert "error: rank 1 was killed by SIGKILL" in said
    assert f"resuming: {len(first)} of {interrupted.count} documents" in said
    assert "Traceback" not in said
    second = interrupted.journaled()
    assert second[: len(first)] == first
    assert len(first) < len(second) < interrupted.count
    assert not interrupted.output.exists()

    process = interrupted.start()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    report = json.loads(interrupted.report.read_text(encoding="utf-8"))
    assert report["num_scored"] == interrupted.count - len(second)
    assert report["num_documents"] == interrupted.count
    assert not interrupted.partial.exists()
    records = [json.loads(line) for line in interrupted.output.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == list(range(interrupted.count))
    assert_likelihoods_are_close(interrupted, records)


def assert_likelihoods_are_close(job: Interrupted, records: list[dict[str, Any]]) -> None:
    """To those of the whole model; rows are padded otherwise than in an uninterrupted run."""
    documents = tokenize(read_documents(job.input), job.model, MAX_POSITIONS, 264)
    model = AutoModelForCausalLM.from_pretrained(job.model).eval()
    for index in range(0, len(documents), 7):
        tokens = torch.from_numpy(documents[index]).long()[None]
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, :-1]
        likelihood = log_likelihoods(logits, tokens[:, 1:]).item()
        assert records[index]["num_tokens"] == len(documents[index]) - 1
        assert records[index]["log_likelihood"] == pytest.approx(likelihood, rel=1e-5)


def test_a_crash_before_the_rename_leaves_nothing_to_score(command: Command, tiny: Path, tmp_path: Path) -> None:
    input_path = jsonl(tmp_path / "documents.jsonl", ["abc", "de"])
    output, report = tmp_path / "scores.jsonl", tmp_path / "figures.json"
    given: dict[str, Any] = {"directory": tiny, "input_path": input_path, "output": output, "num_stages": 1}
    job = prepare(**dict.fromkeys(inspect.signature(prepare).parameters) | given)
    journal = Journal(output, job.digest, job.documents.ids)
    journal.append({index: Score(num_tokens=3 - index, log_likelihood=-float(index + 1)) for index in range(2)})
    journal._stream.close()
    ended = command("run", tiny, "--input", input_path, "--stages", 1, "--output", output, "--report", report)
    run = finished(ended, tiny, input_path, output, report)
    assert "nothing was left to score" in run.stdout
    assert run.report["num_scored"] == 0
    assert [(record["id"], record["log_likelihood"]) for record in run.records] == [(0, -1.0), (1, -2.0)]
    assert not output.with_name("scores.jsonl.partial").exists()


# --- errors that only the ranks can find ---------------------------------------------------------------------------


def test_a_broken_tensor_is_named_once(command: Command, tiny: Path, tmp_path: Path) -> None:
    """Only the last rank reads it; the other must not hang, nor complain."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 64)}, model / "model.safetensors", metadata={"format": "pt"})
    input_path = jsonl(tmp_path / "documents.jsonl", ["abc"])
    ended = command("run", model, "--input", input_path, "--stages", 2, "--output", tmp_path / "scores.jsonl")
    assert ended.returncode == 2
    said = [line for line in ended.stderr.splitlines() if "rank" in line]
    assert len(said) == 1
    assert re.search(r"lm_head\.weight has shape \(3, 64\), but the config asks for \(264, 64\)", said[0])
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "scores.jsonl").exists()


def test_float16_on_a_cpu_is_refused(command: Command, tiny: Path, tmp_path: Path) -> None:
    input_path = jsonl(tmp_path / "documents.jsonl", ["abc"])
    options = ("--stages", 2, "--dtype", "float16", "--output", tmp_path / "scores.jsonl")
    ended = command("run", tiny, "--input", input_path, *options)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "float16 needs a GPU" in ended.stderr
    assert "--dtype float32" in ended.stderr
    assert list(tmp_path.iterdir()) == [input_path]


def test_a_likelihood_that_is_not_finite_names_the_document(command: Command, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][ord("!")] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    input_path = jsonl(tmp_path / "documents.jsonl", ["abc", "a!c"], ["good", "bad"])
    ended = command("run", model, "--input", input_path, "--stages", 1, "--output", tmp_path / "scores.jsonl")
    assert ended.returncode == 2
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "document 'bad' got log-likelihood nan" in errors[0]
    assert "Traceback" not in ended.stderr
    assert Counter(path.name for path in tmp_path.glob("scores*")) == {"scores.jsonl.partial": 1}
