"""``lp-plugin generate`` in real processes: texts, layouts, resumed and interrupted jobs."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted, children
from transformers import AutoModelForCausalLM, AutoTokenizer

from lp_plugin import Cluster, ModelProfile, Workload, make_plan, save_plan
from lp_plugin.generate.job import prepare
from lp_plugin.generate.results import Generated
from lp_plugin.job.journal import Journal

ENDS = [16, 51, 68, 149]
"""End-of-sequence tokens that the model makes sooner or later."""
TEXTS = ["abc", "Alice was beginning", "x", "", "The quick brown fox jumps over", "é 日本 🐇", "a\nb", "zz" * 30, " "]

Command = Callable[..., subprocess.CompletedProcess[str]]
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    """A model whose tokens vary, with several tokens that end a text."""
    directory = make_model(initializer_range=0.2)
    file = directory / "generation_config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(stored | {"eos_token_id": ENDS}), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> Callable[..., list[list[int]]]:
    """What transformers generates for each text alone, after a seed of its own."""
    whole, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)

    def expected(texts: dict[int, str], seed: int = 0, **options: Any) -> list[list[int]]:
        made = []
        for index, text in texts.items():
            inputs = tokenizer(text, return_tensors="pt")
            torch.manual_seed(seed + index)
            output = whole.generate(**inputs, **options)
            made.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        return made

    return expected


def jsonl(path: Path, texts: list[str], ids: list[str | int]) -> Path:
    records = [{"id": identity, "text": text} for identity, text in zip(ids, texts, strict=True)]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def written(output: Path) -> Records:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def decoded(model: Path, token_ids: list[list[int]]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in token_ids]


def test_two_stages_write_what_the_whole_model_generates(
    command: Command, model: Path, expected: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    """More prompts than fit the slots, of very different lengths, ending at different steps; everything written."""
    ids: list[str | int] = [f"é{index}" if index % 3 else 1000 - index for index in range(len(TEXTS))]
    prompts = jsonl(tmp_path / "prompts.jsonl", TEXTS, ids)
    ended = command(
        *("generate", model, "--prompts", prompts, "--stages", 2, "--max-new-tokens", 12, "--micro-batch", 2),
        *("--output", "out.jsonl", "--report", "figures.json", "--stream"),
        cwd=tmp_path,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    tokens = expected(dict(enumerate(TEXTS)), do_sample=False, max_new_tokens=12)
    assert len(set(map(len, tokens))) > 2  # some end early, at different steps
    assert max(map(len, tokens)) == 12
    texts = decoded(model, tokens)
    assert written(tmp_path / "out.jsonl") == [
        {"id": identity, "text": text, "token_ids": row} for identity, text, row in zip(ids, texts, tokens, strict=True)
    ]
    for identity in ids:
        assert ended.stdout.count(f"▌ {identity}  ") == 1
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert figures["num_prompts"] == figures["num_generated"] == len(TEXTS)
    assert figures["num_tokens"] == figures["total_new_tokens"] == sum(map(len, tokens))
    assert (figures["micro_batch"], figures["hosts"], figures["dtype"]) == (2, ["CPU", "CPU"], "float32")
    assert figures["boundaries"][0] == 0
    assert figures["boundaries"][-1] == 6
    assert len(figures["first_token_seconds"]) == len(TEXTS)
    assert 0 < figures["first_token_seconds"][0] < figures["elapsed_seconds"]
    assert figures["written_seconds"] > 0  # by another process's clock
    assert figures["tokens_per_second"] == pytest.approx(figures["num_tokens"] / figures["elapsed_seconds"])
    for name in ("step_seconds", "predicted_step_seconds", "predicted_tokens_per_second"):
        assert figures[name] > 0
    assert f"{len(TEXTS)} of {len(TEXTS)} prompts" in ended.stderr
    assert "bottleneck" in ended.stderr  # the plan, before anything runs
    assert "texts written to out.jsonl" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "Warning" not in ended.stdout + ended.stderr
    left = {"prompts.jsonl", "out.jsonl", "figures.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_replicas_of_tensor_parallel_groups_draw_the_same_tokens(
    command: Command, model: Path, expected: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    """A .txt numbers its lines; each prompt has its own seed, whatever draws it."""
    lines = [text.replace("\n", " ") for text in TEXTS]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = [(number, text) for number, text in enumerate(lines, 1) if text.strip()]
    draw = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
    options = [part for name, value in draw.items() for part in (f"--{name.replace('_', '-')}", value)]
    ended = command(
        *("generate", model, "--prompts", prompts, "--stages", 1, "--tensor-parallel", 2, "--data-parallel", 2),
        *("--max-new-tokens", 8, "--seed", 7, "--output", tmp_path / "out.jsonl", *options),
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    texts = {index: text for index, (_, text) in enumerate(kept)}
    tokens = expected(texts, 7, do_sample=True, max_new_tokens=8, **draw)
    made = written(tmp_path / "out.jsonl")
    assert [record["id"] for record in made] == [number for number, _ in kept]
    assert [record["token_ids"] for record in made] == tokens
    assert "1 stage x 2 tensor-parallel x 2 replicas" in ended.stdout


def test_a_resumed_job_makes_only_what_is_missing_by_a_plan_within_blocks(
    command: Command, model: Path, expected: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    profile = ModelProfile.from_config(model, granularity="sublayer")
    workload = Workload(phase="decode", batch=4, sequence=64)
    plan = make_plan(profile, Cluster.homogeneous("cpu", 2), workload)
    save_plan(plan, tmp_path / "plan.json")
    prompts = jsonl(tmp_path / "prompts.jsonl", TEXTS[:4], [0, 1, 2, 3])
    output, report = tmp_path / "out.jsonl", tmp_path / "figures.json"
    given = {"directory": model, "prompts_path": prompts, "output": output, "max_new_tokens": 5, "num_stages": 2}
    unsaid = dict.fromkeys(inspect.signature(prepare).parameters) | {"data_parallel": 1, "seed": 0, "stream": False}
    job = prepare(**(unsaid | given))
    journal = Journal(output, job.digest, job.prompts.ids, Generated)
    kept = {index: Generated(text=f"kept {index}", token_ids=[index]) for index in (1, 2)}
    journal.append(kept)
    journal._stream.close()
    ended = command(
        *("generate", model, "--prompts", prompts, "--plan", tmp_path / "plan.json", "--max-new-tokens", 5),
        *("--output", output, "--report", report),
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "resuming: 2 of 4 prompts are finished already" in ended.stderr
    records = {record["id"]: record for record in written(output)}
    assert [records[index]["text"] for index in kept] == [record["text"] for record in kept.values()]
    missing = {index: TEXTS[index] for index in (0, 3)}
    assert [records[index]["token_ids"] for index in missing] == expected(missing, do_sample=False, max_new_tokens=5)
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert (figures["num_prompts"], figures["num_generated"]) == (4, 2)
    assert figures["boundaries"] == list(plan.boundaries)
    assert figures["boundaries"][-1] == 9  # 3 blocks in halves


# --- something goes wrong on the way -----------------------------------------------------------------------------


@pytest.fixture
def interrupted(
    model: Path, tmp_path: Path, environment: dict[str, str]
) -> Iterator[tuple[Interrupted, dict[int, str]]]:
    """A job whose ranks take some seconds, and its prompts."""
    draw = random.Random(2)  # noqa: S311 - prompts, not secrets
    texts = {index: "".join(draw.choices("abcdefg hij", k=draw.randrange(1, 30))) for index in range(100)}
    prompts = jsonl(tmp_path / "prompts.jsonl", list(texts.values()), list(texts))
    output = tmp_path / "out.jsonl"
    arguments = ("generate", model, "--prompts", prompts, "--output", output, "--stages", 2, "--micro-batch", 1)
    binary = Path(sys.executable).with_name("lp-plugin")
    job = Interrupted([str(part) for part in (binary, *arguments, "--max-new-tokens", 60)], output, environment)
    yield job, texts
    job.stop()


def test_a_rank_is_killed_while_decoding_and_the_job_goes_on(
    interrupted: tuple[Interrupted, dict[int, str]], expected: Callable[..., list[list[int]]]
) -> None:
    job, texts = interrupted
    process = job.start()
    job.wait_for_more(process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said = job.end(process)
    assert process.returncode == 2
    assert said.count("error") == 1
    assert "error: rank 1 was killed by SIGKILL" in said
    assert "Traceback" not in said
    kept = job.journaled()
    assert 0 < len(kept) < len(texts)
    assert not job.output.exists()

    process = job.start()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"resuming: {len(kept)} of {len(texts)} prompts are finished already" in said
    assert f"{len(texts)} of {len(texts)} prompts" in said
    assert not job.partial.exists()
    records = written(job.output)
    assert [record["id"] for record in records] == list(texts)
    for record in kept:
        assert records[record["index"]]["token_ids"] == record["token_ids"]
    some = {index: texts[index] for index in range(0, len(texts), 9)}
    assert [records[index]["token_ids"] for index in some] == expected(some, do_sample=False, max_new_tokens=60)
