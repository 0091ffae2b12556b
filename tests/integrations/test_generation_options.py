"""Which generation options count, and which can't be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config, make_model
from transformers import GenerationConfig

from lp_plugin.errors import WorkloadError
from lp_plugin.integrations.deepspeed.generation.sampling import Sampling, complete_config, make_sampling

CONFIG = make_config("llama", 1)


def settled(folder: Path, **options: Any) -> Sampling:
    full = complete_config(GenerationConfig(max_new_tokens=4, **options), folder, CONFIG)
    return make_sampling(full, make_model(CONFIG), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("num_return_sequences", 3),
        ("penalty_alpha", 0.6),
        ("prompt_lookup_num_tokens", 2),
        ("assistant_early_exit", 1),
        ("guidance_scale", 1.5),
        ("stop_strings", ["end"]),
        ("max_time", 5.0),
        ("token_healing", True),
        ("dola_layers", "high"),
    ],
)
def test_what_can_not_be_done_is_named(tmp_path: Path, name: str, value: Any) -> None:
    config = GenerationConfig(max_new_tokens=4)
    setattr(config, name, value)  # some are checked against others at construction
    with pytest.raises(WorkloadError, match=f"{name}={value!r} is not supported".replace("[", r"\[")):
        complete_config(config, tmp_path, CONFIG)


def test_options_come_from_the_call_then_the_directory_then_the_model(tmp_path: Path) -> None:
    assert settled(tmp_path).ends == (2,)
    assert settled(tmp_path).padding == 2
    GenerationConfig(eos_token_id=[5, 6], pad_token_id=9, do_sample=True, top_k=3).save_pretrained(tmp_path)
    stored = settled(tmp_path)
    assert (stored.ends, stored.padding, stored.samples, stored.config.top_k) == ((5, 6), 9, True, 3)
    called = settled(tmp_path, eos_token_id=7, do_sample=False)
    assert (called.ends, called.padding, called.samples, called.plain) == ((7,), 9, False, True)


def test_an_unknown_end_token_means_no_end(tmp_path: Path) -> None:
    assert settled(tmp_path, eos_token_id=[-1, 97], min_new_tokens=3).ends == ()
    assert settled(tmp_path, eos_token_id=[-1, 97], min_new_tokens=3).min_new_tokens == 0


def test_a_token_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="special tokens of the generation options are wrong"):
        settled(tmp_path, eos_token_id=["end"])


@pytest.mark.parametrize(("given", "used"), [(9, 9), (0, 0), (-1, 0), (97, 0)])
def test_padding_is_a_token_that_can_be_embedded(tmp_path: Path, given: int, used: int) -> None:
    """Some checkpoints say -1; a prompt alone never gets to see it."""
    assert settled(tmp_path, pad_token_id=given).padding == used


@pytest.mark.parametrize(
    ("options", "plain", "by_row"),
    [
        ({}, True, False),
        ({"min_new_tokens": 4}, True, False),
        ({"min_length": 4}, False, True),
        ({"suppress_tokens": [3]}, False, False),
        ({"repetition_penalty": 1.2}, False, True),
        ({"do_sample": True}, False, False),
        ({"do_sample": True, "no_repeat_ngram_size": 2}, False, True),
    ],
)
def test_processors_run_for_each_row_only_where_they_must(
    tmp_path: Path, options: dict[str, Any], *, plain: bool, by_row: bool
) -> None:
    sampling = settled(tmp_path, **options)
    assert (sampling.plain, sampling.by_row) == (plain, by_row)


def test_a_value_that_transformers_refuses(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="the generation options are wrong: `top_p`"):
        settled(tmp_path, do_sample=True, top_p=-0.5)
