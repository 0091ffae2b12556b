"""How tokens are chosen: the model's generation_config.json, and what the user says instead."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lp_plugin.errors import ModelConfigError, WorkloadError

__all__ = ["check_seed", "checked_settings", "settings_key"]

_LARGEST_SEED = 2**63  # seeds are 64 bits wide, and each prompt's number is added


def check_seed(seed: object, name: str = "seed") -> None:
    """Refuses what the last stage alone would find out, in the middle of its first pass.

    Args:
        seed: Of the first prompt.
        name: What the user calls it.

    Raises:
        WorkloadError: If it is no whole number, or leaves no room for the prompts' own.
    """
    if not isinstance(seed, int) or not 0 <= seed < _LARGEST_SEED:
        raise WorkloadError(f"{name} is {seed!r}; it must be a whole number of 0 to 2^63 - 1.")


def checked_settings(
    directory: str | Path,
    *,
    max_new_tokens: int,
    sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
) -> Any:
    """Transformers' GenerationConfig for a job.

    Args:
        directory: The model directory; without a generation_config.json, its config.json says which tokens are special.
        max_new_tokens: Most tokens for each prompt.
        sample: Whether to draw tokens; None: if one of the following is given, else as the model's file says.
        temperature: Divides the logits.
        top_k: Keeps that many tokens; 0 keeps all.
        top_p: Keeps the fewest tokens with at least this probability together.

    Raises:
        WorkloadError: If a value is out of bounds, or contradicts ``sample``.
        ModelConfigError: If the model's file is broken.
    """
    if max_new_tokens < 1:
        raise WorkloadError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1.")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    _check_bounds(temperature, top_k, top_p)
    if sample is False and given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise WorkloadError(
            f"--greedy takes the likeliest token each time, but {options} is for drawing one; leave --greedy out, "
            "or the other."
        )
    settings = _load(directory)
    if sample is None and given:
        sample = True
    if sample is not None:
        settings.do_sample = sample
    for name, value in given.items():
        setattr(settings, name, value)
    settings.max_new_tokens, settings.max_length = max_new_tokens, None
    return settings


def settings_key(settings: Any, seed: int) -> str:
    """All that the chosen tokens depend on, as text; the seed only if tokens are drawn."""
    values = settings.to_dict()
    values.pop("transformers_version", None)
    if settings.do_sample:
        values["seed"] = seed
    return json.dumps(values, sort_keys=True, default=str)


def _check_bounds(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise WorkloadError(
            f"--temperature is {temperature}; it must be above 0. For the likeliest token each time, use --greedy."
        )
    if top_k is not None and top_k < 0:
        raise WorkloadError(f"--top-k is {top_k}; it must be at least 1, or 0 for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise WorkloadError(f"--top-p is {top_p}; it must be above 0 and at most 1.")


def _load(directory: str | Path) -> Any:
    from transformers import AutoConfig, GenerationConfig  # noqa: PLC0415 - seconds to import

    file = Path(directory) / "generation_config.json"
    if not file.is_file():
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # noqa: BLE001 - a broken file raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelConfigError(f"{file} is broken: {reason} Correct or delete it.") from None
