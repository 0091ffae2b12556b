"""``lp-plugin run`` when something goes wrong on the way: interruptions, killed ranks, errors of the ranks alone."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted, children
from runs import BINARIES, EXAMPLES, MAX_POSITIONS, Command, finished, jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lp_plugin.job.documents import read_documents, tokenize
from lp_plugin.job.journal import Journal
from lp_plugin.score.job import prepare
from lp_plugin.score.likelihood import log_likelihoods
from lp_plugin.score.scores import Score

# --- interruptions -----------------------------------------------------------------------------------------------


class ScoreJob(Interrupted):
    """A job whose ranks take a few seconds to score it all."""

    def __init__(self, model: Path, folder: Path, environment: dict[str, str]) -> None:
        draw = random.Random(1)  # noqa: S311
        source = (EXAMPLES / "text" / "alice.txt").read_text(encoding="utf-8")
        texts = [source[at : at + draw.randrange(150, 500)] for at in range(0, 24_000, 40)]
        self.model, self.input = model, jsonl(folder / "documents.jsonl", texts)
        self.count = len(texts)
        self.report = folder / "figures.json"
        output = folder / "scores.jsonl"
        files = ("--input", self.input, "--output", output, "--report", self.report)
        arguments = (BINARIES / "lp-plugin", "run", model, *files, "--stages", 2, "--micro-batch", 1)
        super().__init__(list(map(str, arguments)), output, environment)

    def indices(self) -> list[int]:
        """Documents that have a score."""
        return [record["index"] for record in self.journaled()]


@pytest.fixture
def interrupted(tiny: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[ScoreJob]:
    job = ScoreJob(tiny, tmp_path, environment)
    yield job
    job.stop()


def test_interrupted_by_hand_then_by_a_crash_the_job_goes_on(interrupted: ScoreJob) -> None:
    process = interrupted.start()
    interrupted.wait_for_more(process)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    said = interrupted.end(process)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted; what is finished is kept")
    assert "Traceback" not in said
    first = interrupted.indices()
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
    second = interrupted.indices()
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


def assert_likelihoods_are_close(job: ScoreJob, records: list[dict[str, Any]]) -> None:
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
    given: dict[str, Any] = {
        "directory": tiny,
        "input_path": input_path,
        "output": output,
        "num_stages": 1,
        "data_parallel": 1,
    }
    job = prepare(**dict.fromkeys(inspect.signature(prepare).parameters) | given)
    journal = Journal(output, job.digest, job.documents.ids, Score)
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
    """Before a rank starts."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 64)}, model / "model.safetensors", metadata={"format": "pt"})
    input_path = jsonl(tmp_path / "documents.jsonl", ["abc"])
    ended = command("run", model, "--input", input_path, "--stages", 2, "--output", tmp_path / "scores.jsonl")
    assert ended.returncode == 2
    said = ended.stderr.splitlines()
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
