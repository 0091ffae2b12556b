"""``lp-plugin generate`` in this process: what is refused before a rank starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lp_plugin import Cluster, ModelProfile, Workload, make_plan, save_plan

Main = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("abc\nde\n", encoding="utf-8")
    return path


@pytest.fixture
def refused(main: Main, model: Path, prompts: Path, tmp_path: Path) -> Refused:
    """Runs a job that must fail: one message, exit code 2, no file. Returns the message."""

    def run(*options: object, stages: object = 2, **changes: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        files = {"--prompts": prompts, "--output": tmp_path / "out.jsonl", "--max-new-tokens": 8} | changes
        arguments = [part for option in files.items() for part in option]
        if stages is not None:
            arguments += ["--stages", stages]
        code, out, err = main("generate", model, *arguments, *options)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


def test_help(main: Main) -> None:
    code, out, err = main("generate", "--help")
    assert (code, err) == (0, "")
    for option in ("--prompts", "--max-new-tokens", "--greedy", "--seed", "--tensor-parallel", "--stream"):
        assert option in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens is 0"),
        (("--micro-batch", 0), "--micro-batch is 0"),
        (("--tensor-parallel", 0), "--tensor-parallel is 0"),
        (("--tensor-parallel", 3), "num_attention_heads is 4"),
        (("--data-parallel", -1), "--data-parallel is -1"),
        (("--data-parallel", 1000), "--data-parallel is 1000, but there are "),
        (("--compile",), "--compile needs a GPU"),
        (("--temperature", 0), "use --greedy"),
        (("--temperature", "nan"), "--temperature is nan"),
        (("--top-k", -1), "--top-k is -1"),
        (("--top-p", 0), "--top-p is 0.0"),
        (("--top-p", 1.5), "--top-p is 1.5"),
        (("--greedy", "--top-k", 5, "--top-p", 0.5), "but --top-k and --top-p is for drawing"),
        (("--seed", -1), "--seed is -1"),
        (("--stream", "--data-parallel", 2), "--stream follows one pipeline, but --data-parallel is 2"),
        (("--dtype", "float16"), "float16 needs a GPU"),
        (("--dtype", "int4"), "'int4'"),
        (("--cluster", "cpu:1"), "cpu:1 names 1 of the 2 devices that one pipeline takes"),
    ],
)
def test_wrong_options(refused: Refused, options: tuple[object, ...], said: str) -> None:
    assert said in refused(*options)


@pytest.mark.parametrize("stages", [7, 0])
def test_more_stages_than_layers_or_none(refused: Refused, stages: int) -> None:
    assert f"--stages is {stages}" in refused(stages=stages)


def test_neither_stages_nor_plan(refused: Refused) -> None:
    assert "neither --stages nor --plan" in refused(stages=None)


def test_prompt_and_new_tokens_beyond_the_models_positions(refused: Refused, prompts: Path) -> None:
    prompts.write_text("ab\n" + "x" * 499 + "\nabc\n", encoding="utf-8")  # and a token before each text
    said = refused(**{"--max-new-tokens": 13})
    assert "prompt 2 has 500 tokens, and 13 new ones make 513, but the model allows 512" in said
    assert "lower --max-new-tokens to 12" in said
    prompts.write_text("x" * 511 + "\n", encoding="utf-8")
    assert "shorten it" in refused(**{"--max-new-tokens": 1})


def test_no_prompts(refused: Refused, prompts: Path) -> None:
    prompts.write_text("\n \n", encoding="utf-8")
    assert "holds no document" in refused()
    assert "nowhere.txt does not exist" in refused(**{"--prompts": prompts.with_name("nowhere.txt")})


def test_a_prompt_without_tokens(refused: Refused, model: Path, prompts: Path) -> None:
    """A tokenizer that puts nothing before a text makes nothing of an empty one."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tokenizer | {"post_processor": None}), encoding="utf-8")
    path = prompts.with_suffix(".jsonl")
    path.write_text('{"id": "good", "text": "a"}\n{"id": "bad", "text": ""}\n', encoding="utf-8")
    assert "prompt 'bad' has no token" in refused(**{"--prompts": path})


def test_weights_that_are_missing_or_truncated(refused: Refused, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors can't be read" in refused()
    file.unlink()
    assert "holds no weights" in refused()


def test_weights_that_do_not_fill_the_model(refused: Refused, model: Path) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 64)}, file, metadata={"format": "pt"})
    assert "lm_head.weight" in refused()
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.norm.weight" in refused()


def test_a_family_that_does_not_run(refused: Refused, model: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "phimoe"}), encoding="utf-8")
    assert "'phimoe'" in refused()


def test_a_broken_generation_config(refused: Refused, model: Path) -> None:
    (model / "generation_config.json").write_text("{", encoding="utf-8")
    assert "generation_config.json is broken" in refused()


def test_files_that_could_not_be_written_at_the_end(refused: Refused, tmp_path: Path, prompts: Path) -> None:
    for option in ("--output", "--report"):
        assert "can't be written" in refused(**{option: tmp_path / "nowhere" / "file.jsonl"})
    assert "would replace the input" in refused(**{"--output": prompts})
    assert "it is a special file" in refused(**{"--output": "/dev/null"})
    assert "would replace the input" in refused(**{"--report": prompts})
    assert "out.jsonl would replace another file" in refused(**{"--report": tmp_path / "out.jsonl"})


def test_layers_that_so_many_processes_can_not_share(refused: Refused, model: Path) -> None:
    """Before any of them starts."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}), encoding="utf-8")
    assert "2 key and value heads can't be shared evenly by 4" in refused("--tensor-parallel", 4)
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}), encoding="utf-8")
    assert "no tensor-parallel plan for model_type 'gpt2'" in refused("--tensor-parallel", 2)


def test_a_plan_for_something_else(refused: Refused, model: Path, tmp_path: Path) -> None:
    def planned(phase: Any, shards: int = 1, **changes: Any) -> Path:
        profile = ModelProfile.from_config(model, **changes).sharded(shards)
        cluster = Cluster.homogeneous("cpu", 2 * shards).grouped(shards)
        path = tmp_path / "plan.json"
        save_plan(make_plan(profile, cluster, Workload(phase=phase, batch=4, sequence=64)), path)
        return path

    def said(path: Path, *options: object, stages: object = None) -> str:
        return refused("--plan", path, *options, stages=stages)

    assert "was made for prefill, but the job is decode" in said(planned("prefill"))
    assert "was made for float16, but the job runs in float32" in said(planned("decode", dtype="float16"))
    assert "was made with --weights" in said(planned("decode", weight_dtype="int8"))
    assert "has 2 stages, but --stages is 3" in said(planned("decode"), stages=3)
    assert "made for --tensor-parallel 2, but it is 1 here" in said(planned("decode", 2), "--tensor-parallel", 1)
