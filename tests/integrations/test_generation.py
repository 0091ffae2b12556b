"""Generation on DeepSpeed's engine: token for token what transformers makes of each prompt alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BIN, Start
from families import make_config, make_model
from generation_cases import (
    LENGTHS,
    MODELS,
    NEW_TOKENS,
    OPTIONS,
    REFUSED,
    SEED,
    SHAPES,
    WAYS,
    make_options,
    make_prompts,
)
from transformers import PreTrainedModel

WORLDS = (2, 4)
EVERY_WAY = {
    **WAYS,
    **OPTIONS,
    **{f"new tokens {new_tokens}": {"max_new_tokens": new_tokens} for _, _, new_tokens in SHAPES},
}


def expected(model: PreTrainedModel, options: dict[str, Any]) -> list[list[int]]:
    """transformers' ``generate`` of each prompt alone, each with a seed of its own."""
    made = []
    for index, prompt in enumerate(make_prompts()):
        torch.manual_seed(SEED + index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # prompts whose last token is the padding
            ids = torch.tensor([prompt])
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=make_options(**options))
        made.append(tokens[0, len(prompt) :].tolist())
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in MODELS:
        make_model(make_config(family, 5)).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def references(models: Path) -> dict[tuple[str, str], list[list[int]]]:
    """Family and way to choose -> what is right."""
    found = {}
    for family in MODELS:
        model = make_model(make_config(family, 5))
        for way in EVERY_WAY if family == "llama" else WAYS:
            found[family, way] = expected(model, EVERY_WAY[way])
    return found


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} processes")
def ran(
    request: pytest.FixtureRequest, models: Path, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was generated, and what each rank saw besides."""
    results = tmp_path_factory.mktemp("results")
    script = Path(__file__).with_name("generation_cases.py")
    start(BIN / "torchrun", "--standalone", f"--nproc-per-node={request.param}", script, models, results)
    seen = [json.loads((results / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(request.param)]
    return json.loads((results / "generated.json").read_text(encoding="utf-8")), seen


Ran = tuple[list[dict[str, Any]], list[dict[str, Any]]]
References = dict[tuple[str, str], list[list[int]]]


@pytest.mark.parametrize("family", MODELS)
def test_families_at_every_cut(ran: Ran, references: References, family: str) -> None:
    mine = [entry for entry in ran[0] if entry["family"] == family and "cut" in entry]
    assert {entry["way"] for entry in mine} == {"greedy", "sampled"}
    for entry in mine:
        assert entry["made"] == references[family, entry["way"]], entry["cut"]


def test_prompts_end_at_different_steps(references: References) -> None:
    lengths = {len(tokens) for made in references.values() for tokens in made}
    assert lengths >= {1, 2, 5, NEW_TOKENS}
    assert len(LENGTHS) == len(make_prompts())


def test_ways_to_choose_and_shapes(ran: Ran, references: References) -> None:
    mine = [entry for entry in ran[0] if "cut" not in entry]
    assert len(mine) == len(SHAPES) + 1 + (len(OPTIONS) if len(ran[1]) == 2 else 0)  # 1: one stage alone
    for entry in mine:
        assert entry["made"] == references["llama", entry["way"]], entry


def test_callbacks_hear_everything_on_the_first_rank_alone(ran: Ran, references: References) -> None:
    first, *others = ran[1]
    told = [[position, tokens] for position, tokens in enumerate(references["llama", "sampled"])]
    assert first["finished"] == first["streamed"] == told
    for rank in (first, *others):
        assert rank["made"] == references["llama", "sampled"]
    for rank in others:
        assert rank["finished"] == rank["streamed"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no prompts", "there are no prompts"),
        ("empty prompt", "prompt 1 is empty"),
        ("too long", "prompt 1 has 60 tokens, with 9 new ones 69; the model has 64 positions."),
        ("unknown token", "prompt 0 has tokens from 1 to 97; the model's are 0 to 96."),
        ("beams", "num_beams=4 is not supported"),
        ("temperature", "`temperature` (=-1.0) has to be a strictly positive float"),
        ("no new tokens", "max_new_tokens is None"),
    ],
)
def test_bad_calls_are_refused_on_every_rank(ran: Ran, name: str, message: str) -> None:
    for rank in ran[1]:
        assert rank["errors"][name].startswith("WorkloadError")
        assert message in rank["errors"][name]
    assert len(ran[1][0]["errors"]) == len(REFUSED)


def test_the_stage_whose_output_is_not_finite_is_named(ran: Ran) -> None:
    guilty = len(ran[1]) // 2
    for number, rank in enumerate(ran[1]):
        if number == guilty:
            said = f"NotFiniteError: the output of stage {guilty} is not finite for prompts "
        else:
            said = "RuntimeEnvironmentError: the model's logits are not numbers (nan) for prompts "
        assert rank["broken"].startswith(said)


def test_the_engine_has_its_own_instructions_back(ran: Ran) -> None:
    assert all(rank["restored"] for rank in ran[1])
