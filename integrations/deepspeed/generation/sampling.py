"""How the next token is chosen: transformers' own options and logits processors, for all or for each row.

A prompt's tokens are those that transformers' ``generate`` gives for that prompt alone after
``torch.manual_seed(seed + index)``: it sees only its own history, and draws from a generator of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig
from transformers.generation import logits_process

from lp_plugin.errors import WorkloadError

__all__ = ["Sampling", "complete_config", "make_sampling"]

_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "num_return_sequences": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1.0),
    "stop_strings": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
}
"""Options that change the tokens in a way that this engine can't follow -> values with which they don't."""
_LENGTH_PROCESSORS = (logits_process.MinLengthLogitsProcessor, logits_process.MinNewTokensLengthLogitsProcessor)
"""What ``min_new_tokens`` makes; they look at the number of new tokens, which all rows of a group share."""
_SHARED_PROCESSORS = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
"""Those that look at nothing but a row's scores, so that one call does for all rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The choice of tokens for one call, settled."""

    model: Any
    """A model of transformers' generation mixin, which makes the processors; its weights don't matter."""
    config: GenerationConfig
    """Every option filled in."""
    device: torch.device
    """Where logits are."""
    new_tokens: int
    """At most so many per prompt."""
    min_new_tokens: int
    """No end before so many; 0 if there is no end-of-sequence token."""
    ends: tuple[int, ...]
    """End-of-sequence tokens; may be empty."""
    padding: int
    """What rows that have ended are filled with: a token that the model knows; no result shows it."""
    shared: LogitsProcessorList
    """Applied to all rows at once, last."""
    by_row: bool
    """Whether further processors look at a row's history; applied first, row by row."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return bool(self.config.do_sample)

    @property
    def plain(self) -> bool:
        """Whether the token is the most likely one, with nothing but ``min_new_tokens`` to mind."""
        return not (self.samples or self.by_row) and all(isinstance(each, _LENGTH_PROCESSORS) for each in self.shared)

    def row_processors(self, prompt: torch.Tensor) -> LogitsProcessorList:
        """The processors that look at the history of one row, for a prompt [1, tokens]."""
        every = _processors(self.model, self.config, prompt)
        return LogitsProcessorList(every[: len(every) - len(self.shared)])


def complete_config(config: GenerationConfig, directory: Path, model_config: PretrainedConfig) -> GenerationConfig:
    """A copy in which every option that was left out is filled in as transformers' ``generate`` does.

    From the directory's ``generation_config.json``, else from the model's configuration; then from transformers'
    defaults.

    Raises:
        WorkloadError: If ``max_new_tokens`` is missing, or an option is wrong or can't be done here.
    """
    try:
        stored = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:
        stored = GenerationConfig.from_model_config(model_config)
    _refuse(config)
    full = copy.deepcopy(config)
    try:
        full.update(**stored.to_dict(), defaults_only=True, allow_custom_entries=True)
        full.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    except ValueError as error:
        raise WorkloadError(f"the generation options are wrong: {error}") from None
    _refuse(full)
    if full.max_new_tokens is None:
        raise WorkloadError("max_new_tokens is None; give the generation config at least 1.")
    return full


def _refuse(config: GenerationConfig) -> None:
    for name, harmless in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in harmless:
            raise WorkloadError(
                f"the generation option {name}={value!r} is not supported: a pipeline decodes greedily or by sampling, "
                f"one sequence per prompt; leave {name} out."
            )


def make_sampling(config: GenerationConfig, model: Any, device: torch.device) -> Sampling:
    """Settles how tokens are chosen.

    Args:
        config: Of `complete_config`.
        model: A model of transformers, with its whole vocabulary's configuration.
        device: Where logits are.

    Raises:
        WorkloadError: If transformers refuses an option's value.
    """
    config = copy.deepcopy(config)
    try:
        model._prepare_special_tokens(config, True, device=device, batch_size=1)
    except (ValueError, TypeError) as error:
        raise WorkloadError(f"the special tokens of the generation options are wrong: {error}") from None
    known = range(model.config.vocab_size)  # an unknown token, such as -1, is a way to say that there is no end
    ends = (
        () if config._eos_token_tensor is None else tuple(filter(known.__contains__, config._eos_token_tensor.tolist()))
    )
    padding = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    try:
        every = _processors(model, config, torch.zeros(1, 1, dtype=torch.long, device=device))
    except (ValueError, TypeError) as error:
        raise WorkloadError(f"the generation options are wrong: {error}") from None
    lengths = _LENGTH_PROCESSORS if config.min_new_tokens is not None else ()
    first = max(
        (number + 1 for number, each in enumerate(every) if not isinstance(each, (*_SHARED_PROCESSORS, *lengths))),
        default=0,
    )
    return Sampling(
        model=model,
        config=config,
        device=device,
        new_tokens=int(config.max_new_tokens),
        min_new_tokens=int(config.min_new_tokens or 0) if ends else 0,
        ends=ends,
        padding=padding if padding in known else 0,  # rows that have ended go on being embedded
        shared=LogitsProcessorList(every[first:]),
        by_row=first > 0,
    )


def _processors(model: Any, config: GenerationConfig, prompt: torch.Tensor) -> LogitsProcessorList:
    """The processors for a prompt [1, tokens], lengths settled as its ``generate`` settles them."""
    own = copy.copy(config)
    tokens = prompt.shape[1]
    own.max_length = tokens + own.max_new_tokens
    if own.min_new_tokens is not None:
        own.min_length = tokens + own.min_new_tokens
    processors: LogitsProcessorList = model._get_logits_processor(
        generation_config=own, input_ids_seq_length=tokens, encoder_input_ids=prompt, device=prompt.device
    )
    return processors
