"""How tokens are chosen: what the model's files say, and what the user says instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lp_plugin.generate.settings import checked_settings, settings_key

UNSAID: dict[str, Any] = dict.fromkeys(("sample", "temperature", "top_k", "top_p"))


def settings(directory: Path, **said: Any) -> Any:
    return checked_settings(directory, **({"max_new_tokens": 8} | UNSAID | said))


def folder(tmp_path: Path, tiny: Path, **stored: Any) -> Path:
    """A model directory, with a generation_config.json of these values."""
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tiny / "model.safetensors")
    if stored:
        (tmp_path / "generation_config.json").write_text(json.dumps(stored), encoding="utf-8")
    return tmp_path


def test_the_models_file_counts_where_the_user_says_nothing(tiny: Path, tmp_path: Path) -> None:
    stored = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 5], "repetition_penalty": 1.1}
    made = settings(folder(tmp_path, tiny, **stored, max_length=99))
    assert {name: getattr(made, name) for name in stored} == stored
    assert (made.max_new_tokens, made.max_length) == (8, None)


def test_without_a_file_the_special_tokens_are_those_that_transformers_takes(tiny: Path, tmp_path: Path) -> None:
    directory = folder(tmp_path, tiny)
    made, theirs = settings(directory), AutoModelForCausalLM.from_pretrained(directory).generation_config
    assert (made.eos_token_id, made.bos_token_id, made.pad_token_id) == (
        theirs.eos_token_id,
        theirs.bos_token_id,
        theirs.pad_token_id,
    )
    assert not made.do_sample


@pytest.mark.parametrize("said", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"sample": True}])
def test_what_shapes_the_draw_asks_for_one(tiny: Path, said: dict[str, Any]) -> None:
    made = settings(tiny, **said)
    assert made.do_sample is True
    assert all(getattr(made, name) == value for name, value in said.items() if name != "sample")


def test_greedy_overrules_the_file(tiny: Path, tmp_path: Path) -> None:
    directory = folder(tmp_path, tiny, do_sample=True, temperature=0.6)
    assert settings(directory, sample=False).do_sample is False


def test_the_key_names_all_that_the_tokens_depend_on(tiny: Path) -> None:
    greedy = settings_key(settings(tiny), 0)
    assert greedy == settings_key(settings(tiny), 1)  # nothing is drawn
    drawn = [settings_key(settings(tiny, sample=True), seed) for seed in range(2)]
    others = [settings_key(settings(tiny, **said), 0) for said in ({"max_new_tokens": 9}, {"top_k": 3}, {"top_p": 0.5})]
    assert len({greedy, *drawn, *others}) == 6
