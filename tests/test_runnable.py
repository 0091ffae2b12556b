"""Families that can be planned, but not run here, are refused before anything starts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk import small_config, their_config

from lp_plugin import UnsupportedModelError
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.runnable import RUNNABLE, check_runnable
from lp_plugin.model.families import FAMILIES
from lp_plugin.score.job import prepare

OTHERS = ["gemma", "t5", "roberta", "deepseek_v3", "gptj"]


def test_all_that_run_can_be_planned() -> None:
    assert set(FAMILIES) > RUNNABLE
    assert len(RUNNABLE) == 18
    for family in RUNNABLE:
        check_runnable({"model_type": family}, encodes=True)


def test_an_encoder_neither_scores_nor_generates() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'bert' can be planned, but not run for scores.*embed\(\)"):
        check_runnable({"model_type": "bert"})


@pytest.mark.parametrize("family", OTHERS)
def test_a_job_of_another_family_is_refused_first(family: str, tmp_path: Path) -> None:
    """Before the input, which is not there, is looked for."""
    (tmp_path / "config.json").write_text(json.dumps(small_config(family)))
    given: dict[str, Any] = {"directory": tmp_path, "input_path": tmp_path / "nothing", "output": tmp_path / "scores"}
    with pytest.raises(UnsupportedModelError, match=rf"{family}.* can be planned, but not run.*bert.*starcoder2"):
        prepare(**dict.fromkeys(inspect.signature(prepare).parameters) | given | {"num_stages": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_language_model_of_a_larger_one_is_not_run_either(tmp_path: Path) -> None:
    nested = {"model_type": "llava", "text_config": small_config("llama")}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    given: dict[str, Any] = {"directory": tmp_path, "input_path": tmp_path / "nothing", "output": tmp_path / "scores"}
    with pytest.raises(UnsupportedModelError, match="'llava' can be planned, but not run"):
        prepare(**dict.fromkeys(inspect.signature(prepare).parameters) | given | {"num_stages": 2})


@pytest.mark.parametrize("family", ["gemma", "gptj"])
def test_a_stage_of_another_family_is_refused(family: str) -> None:
    with torch.device("meta"), pytest.raises(UnsupportedModelError, match=rf"{family}.* can be planned, but not run"):
        DecoderStage(their_config(small_config(family)), 0, 2)
