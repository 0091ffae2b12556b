"""The examples that load a model, each as a person would start it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import BIN, Start
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = ["Down, down, down.", "", "Would the fall never come to an end?", "I wonder.", "Down, down, down, down."]
TEXTS = [line for line in LINES if line]
Example = Callable[..., str]


@pytest.fixture
def example(own_process: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Example:
    """Runs a script in this process and returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) >= 7
    assert {name: count for name, count in lengths.items() if count >= 80} == {}


def test_score(example: Example, text_models: Path, lines: Path) -> None:
    printed = example("score.py", text_models / "llama", lines).splitlines()
    assert printed[0] == "boundaries (0, 6)"
    rows = [re.fullmatch(r" *(\S+) +(\S+) a token  (.*)", row) for row in printed[1:]]
    found = [(float(row[1]), float(row[2]), row[3]) for row in rows if row]
    assert sorted(text for _, _, text in found) == sorted(TEXTS)
    assert [each for _, each, _ in found] == sorted((each for _, each, _ in found), reverse=True)
    assert all(total == pytest.approx(each * len(text), abs=1e-2) for total, each, text in found)


def test_generate(example: Example, text_models: Path) -> None:
    printed = example("generate.py", text_models / "llama", *TEXTS[:2], "--max-new-tokens", 5, "--sample", "--seed", 3)
    assert [row.split(" | ")[0] for row in printed.splitlines()] == TEXTS[:2]


def test_embed(example: Example, text_models: Path, lines: Path) -> None:
    printed = example("embed.py", text_models / "bert", lines).splitlines()
    assert printed[0].endswith(f"{TEXTS[0]} | {TEXTS[3]}")  # nearly the same words
    assert printed[3].endswith(f"{TEXTS[3]} | {TEXTS[0]}")


def test_deepspeed_config(example: Example, text_models: Path) -> None:
    config = EXAMPLES / "train" / "ds.json"
    rows = json.loads(config.read_text(encoding="utf-8"))["train_micro_batch_size_per_gpu"]
    printed = example("deepspeed_config.py", text_models / "llama", "--deepspeed_config", config)
    assert f"float32, {rows} rows a micro-batch" in printed
    assert "stage 0: layers 0 .. 5 on cpu" in printed
    assert "log-likelihood -" in printed


def test_forward(start: Start, text_models: Path) -> None:
    printed = start(
        *(BIN / "torchrun", "--standalone", "--nproc-per-node=2", EXAMPLES / "forward.py", text_models / "llama"),
        *("--micro-batches", "3", "--rows", "2", "--tokens", "16", "--repeats", "1"),
    )
    assert "eager: logits [3, 2, 16, 264], largest difference from eval_batch 0\n" in printed
    assert re.search(r"a batch takes \S+ ms with eval_batch, \S+ ms with ForwardPipeline\n", printed)


def test_forward_pipeline_of_the_page(
    own_process: None, text_models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = (EXAMPLES.parent / "docs" / "bench.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(import torch\n.*?)```", page, re.DOTALL)
    script = tmp_path / "snippet.py"
    script.write_text(snippet.replace("MODEL_DIR", str(text_models / "llama")), encoding="utf-8")
    made = runpy.run_path(str(script))
    assert made["logits"].shape == (8, 4, 64, 264)
    assert re.search(r"^eager \S+\n", capsys.readouterr().out, re.MULTILINE)
    model = AutoModelForCausalLM.from_pretrained(text_models / "llama").eval()
    with torch.no_grad():
        expected = torch.stack([model(each).logits for each in made["tokens"]])
    torch.testing.assert_close(made["logits"], expected, rtol=1e-5, atol=1e-5)


def test_accelerate_map(example: Example, text_models: Path) -> None:
    printed = example("accelerate_map.py", text_models / "llama", "--cluster", "h200:2").splitlines()
    assert printed[0].startswith("device 0: model.embed_tokens, model.layers.0")
    assert "lm_head" in printed[1]
    model = AutoModelForCausalLM.from_pretrained(text_models / "llama").eval()
    with torch.no_grad():
        token = int(model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1].argmax())
    assert printed[2] == f"next token: {token}"


def test_native_pp(start: Start, text_models: Path) -> None:
    printed = start(
        *(BIN / "torchrun", "--standalone", "--nproc-per-node=2", EXAMPLES / "native_pp.py"),
        *(text_models / "llama", "--cluster", "h200:2"),
    )
    (counts,) = re.findall(r"blocks per stage: \((\d), (\d)\)", printed)
    assert sum(map(int, counts)) == 3
    model = AutoModelForCausalLM.from_pretrained(text_models / "llama").eval()
    tokens = model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert f"tokens: {tokens[0, 4:].tolist()}" in printed
