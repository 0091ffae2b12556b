"""What the tests of ``lp-plugin run`` share: a finished run, and what its scores must be."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lp_plugin.job.documents import read_documents, tokenize
from lp_plugin.score.batches import make_steps
from lp_plugin.score.likelihood import log_likelihoods

EXAMPLES = Path(__file__).parents[3] / "examples"
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


def assert_scores_are_the_models(run: Run) -> None:
    """Equal on the same padded rows; within float32's rounding alone and unpadded, or with tensor parallelism."""
    documents = tokenize(read_documents(run.input), run.model, MAX_POSITIONS, 264)
    assert [record["id"] for record in run.records] == list(documents.ids)
    assert [record["num_tokens"] for record in run.records] == [length - 1 for length in documents.lengths]
    scores = [record["log_likelihood"] for record in run.records]
    replicas = run.report["data_parallel"]
    steps = make_steps(
        documents.lengths,
        range(len(documents)),
        tokens_per_micro_batch=run.report["tokens_per_micro_batch"],
        num_stages=len(run.report["hosts"]),
        max_positions=MAX_POSITIONS,
        num_replicas=replicas,
    )
    counts = [len(step.of_replica(0, replicas).micro_batches) for step in steps]
    assert run.report["steps"] == [[step.rows, step.length, each] for step, each in zip(steps, counts, strict=True)]
    shared = run.report["tensor_parallel"] > 1  # sums over processes are rounded otherwise
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
                found = [scores[index] for index in indices]
                assert found == (pytest.approx(values[: len(indices)], rel=1e-6) if shared else values[: len(indices)])
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
