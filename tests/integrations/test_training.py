"""Training Hugging Face models in real pipelines: each cut gives the losses of transformers' own model in a loop."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Start
from families import make_config, make_model, training_micro_batches
from plain_training import plain_losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lp_plugin import ModelProfile

Ranks = tuple[dict[str, Any], ...]
STEPS = 20
NOISE = 5e-6
"""Of float32, in losses of about 4.6."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, tied in (("untied", False), ("tied", True)):
        make_model(make_config("llama", 4, tie_word_embeddings=tied)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(models: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Training")
    cases = Path(__file__).with_name("training_cases.py")
    start("torchrun", "--standalone", "--nproc-per-node", "4", cases, models, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return tuple(json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(4))


@pytest.fixture(scope="module")
def expected(models: Path) -> Callable[[str], list[float]]:
    """Losses of the whole model, by torch and transformers alone."""
    data = training_micro_batches
    return functools.cache(lambda name: plain_losses(models / name, data(), steps=STEPS, accumulation=4))


@pytest.mark.parametrize(
    "case",
    [
        "untied, 4 stages",
        "untied, 2 stages",
        "untied, 2 stages by hand",
        "untied, parameters",
        "untied, uniform, checkpointed",
        "tied, 4 stages",
        "tied, 4 stages by hand",
        "tied, 2 stages, zero",
        "tied, 1 stage, zero, checkpointed",
        "tied, profile",
    ],
)
def test_losses_are_those_of_the_whole_model(case: str, ranks: Ranks, expected: Callable[[str], list[float]]) -> None:
    losses = expected(case.split(",", maxsplit=1)[0])
    for rank in ranks:
        assert "losses" in rank[case], rank[case]
        assert rank[case]["losses"] == pytest.approx(losses[: len(rank[case]["losses"])], abs=NOISE)
        assert rank[case]["plain"]
    assert losses[-1] < losses[0] - 0.5, "nothing was learned, so nothing was compared"


def test_cuts_are_the_methods(ranks: Ranks, models: Path) -> None:
    cases = ranks[0]
    assert cases["untied, 2 stages by hand"]["parts"] == [0, 5, 7]
    assert cases["tied, 4 stages by hand"]["parts"] == [0, 2, 3, 6, 7]
    assert cases["plan file"]["parts"] == [0, 1, 7]
    assert cases["untied, uniform, checkpointed"]["parts"] == [0, 2, 4, 6, 7]
    weights = [layer.parameters for layer in ModelProfile.from_config(models / "untied").layers]
    parts = cases["untied, parameters"]["parts"]
    fullest = max(sum(weights[low:high]) for low, high in itertools.pairwise(parts))
    others = itertools.combinations(range(1, 7), 3)
    assert fullest == min(
        max(sum(weights[low:high]) for low, high in itertools.pairwise((0, *cut, 7))) for cut in others
    )


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_another_partition_goes_on_with_the_same_losses(
    name: str, ranks: Ranks, expected: Callable[[str], list[float]]
) -> None:
    for rank in ranks:
        case = rank[f"{name}, interrupted"]
        assert "resumed" in case, case
        assert (case["nothing"], case["steps"], case["grew"], case["left over"]) == (0, 3, 6, False)
        assert case["losses"] + case["uninterrupted"] == pytest.approx(expected(name)[:6], abs=NOISE)
        assert case["resumed"] == pytest.approx(case["uninterrupted"], abs=NOISE)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_exported_directory_is_what_was_trained(name: str, ranks: Ranks, folder: Path) -> None:
    exported = folder / name / "exported"
    trained = {key: value for rank in ranks for key, value in rank[f"{name}, interrupted"]["weights"].items()}
    whole = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in whole.items()} == trained
    stored = {key for file in exported.glob("*.safetensors") for key in load_file(file)}
    assert ("lm_head.weight" in stored) == (name == "untied")


def test_names_say_nothing_of_the_cut(ranks: Ranks) -> None:
    names = [set(rank["tied, interrupted"]["names"]) for rank in ranks]
    assert names[0] & names[3] == {"tied_modules.embedding.weight"}
    assert {name.split(".")[0] for each in names for name in each} == {"tied_modules", "1", "2", "3", "4", "5"}


def test_weights_alone_are_loaded_under_any_number_of_stages(ranks: Ranks) -> None:
    for rank in ranks:
        case = rank["layer files"]
        assert case["2"] == pytest.approx(case["losses"], abs=NOISE)
        assert case["1"] == pytest.approx(case["losses"], abs=NOISE)


def test_initial_weights_are_transformers_own_and_depend_on_the_seed_alone(ranks: Ranks, folder: Path) -> None:
    assert all(rank["initialised"] == {} for rank in ranks)

    def stored(name: str) -> dict[str, torch.Tensor]:
        return {key: value for file in (folder / name).glob("*.safetensors") for key, value in load_file(file).items()}

    four, two, one, other = (stored(f"seed-{name}") for name in ("7-4", "7-2", "7-1", "8-4"))
    for name, value in one.items():
        assert torch.equal(value, two[name])
        assert torch.equal(value, four[name])
        assert value.dim() < 2 or not torch.equal(value, other[name])
        if value.dim() < 2:
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.05)
    assert len({value.flatten()[0].item() for value in one.values() if value.dim() > 1}) == 1 + 4 * 7


@pytest.mark.parametrize("case", ["memory, float32", "memory, float32, checkpointed", "memory, bfloat16"])
def test_memory_of_every_stage_is_as_predicted(case: str, ranks: Ranks) -> None:
    for rank in ranks:
        assert "measured" in rank[case], rank[case]
        assert rank[case]["predicted"] == pytest.approx(rank[case]["measured"], rel=0.1)
    assert ranks[0]["memory, float32"]["measured"] > 1.3 * ranks[0]["memory, float32, checkpointed"]["measured"]


def test_the_example_trains_and_exports(start: Start, text_models: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "train" / "text.py"
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", script, text_models / "llama", tmp_path)
    output = start(*command, "--steps", "2")
    first, second = (float(line.split()[3].strip(",")) for line in output.splitlines() if line.startswith("step"))
    assert second != first
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert exported.config.num_hidden_layers == 3
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_the_whole_stage_changes_its_mode(ranks: Ranks) -> None:
    assert all(rank["modes"] == {"train": [True], "eval": [False]} for rank in ranks)


def test_a_plain_module_is_planned_for_its_configuration(ranks: Ranks) -> None:
    assert all(rank["plain, zero 1"] == {"zero": 1, "replicas": 2, "phase": "train"} for rank in ranks)


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("plain, zero 2", "DeepSpeedConfigError", ["zero_optimization.stage is 2", "set it to 1"]),
        ("zero 3", "DeepSpeedConfigError", ["zero_optimization.stage is 3", "set it to 1"]),
        ("plan, other stages", "PlanFileError", ["2 stages", "in 4"]),
        ("plan, halves", "PlanFileError", ["halves"]),
        ("prefill", "DeepSpeedConfigError", ['"prefill"']),
        ("resume, no zero", "DeepSpeedConfigError", ['"stage": 1', '"load_universal": true']),
    ],
)
def test_every_rank_refuses_with_the_same_error(case: str, error: str, says: list[str], ranks: Ranks) -> None:
    for rank in ranks:
        assert rank[case].get("error") == error, rank[case]
        assert all(part in rank[case]["message"] for part in says)
