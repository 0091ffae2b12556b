"""A model that runs as a pipeline: scores, generates, embeds, saves."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from deepspeed import comm as dist
from transformers import GenerationConfig

from lp_plugin.errors import DocumentError, RuntimeEnvironmentError, UnsupportedModelError, WorkloadError
from lp_plugin.generate.growing_text import GrowingText
from lp_plugin.generate.planning import plan_generation
from lp_plugin.generate.settings import check_seed
from lp_plugin.hardware.device import is_whole
from lp_plugin.integrations.deepspeed.generation.generate import check_prompts, release
from lp_plugin.integrations.deepspeed.generation.sampling import complete_config, make_sampling
from lp_plugin.integrations.transformers.embed import mean_of_tokens, without_head
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.integrations.transformers.runnable import ENCODERS
from lp_plugin.integrations.transformers.save import save_model
from lp_plugin.job.documents import Document, TokenizedDocuments, load_tokenizer, tokenize
from lp_plugin.job.ranks import gather
from lp_plugin.measure.layers import give_back_memory
from lp_plugin.plan import Plan
from lp_plugin.score.batches import make_steps
from lp_plugin.score.likelihood import log_likelihoods
from lp_plugin.score.steps import StepRunner

__all__ = ["PipelinedModel"]

Tokens: TypeAlias = Sequence[int]
OnTokens: TypeAlias = Callable[[int, list[int]], None]
OnText: TypeAlias = Callable[[int, str], None]


class PipelinedModel:
    """A loaded model; made by `lp_plugin.integrations.transformers.load`.

    Every process of the job calls each method with the same arguments, and gets the same result. As a context manager
    it closes itself.

    Args:
        engine: DeepSpeed's pipeline engine over an `HFPipelineModule`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._module: HFPipelineModule = engine.module
        self._runner = StepRunner(engine)
        self._closed = False
        self._tokenizer: Any = None
        atexit.unregister(_part)

    @property
    def plan(self) -> Plan:
        """Which layers are on which stage."""
        self._check_open()
        return self._module.lp_plan

    def score(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text: the sum over all its tokens but the first, natural logarithm.

        Raises:
            UnsupportedModelError: If the model encodes, or was saved without its head.
            DocumentError: If a text is longer than the model allows; names its number.
            RuntimeEnvironmentError: If the model overflows in this precision.
        """
        self._check_decodes("score")
        documents = self._tokenized(texts)
        values: list[float] = self._rows(documents, log_likelihoods).tolist()
        for index, value in enumerate(values):
            if not np.isfinite(value):
                raise RuntimeEnvironmentError(
                    f"text {index} got log-likelihood {value}: the model overflows in {self._module.lp_profile.dtype}, "
                    "or its weights hold values that are not finite; try dtype='float32' or 'bfloat16'."
                )
        return [value + 0.0 for value in values]  # 0.0 instead of -0.0

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Mean of the final hidden state over each text's tokens, special ones included.

        Returns:
            float32 [texts, hidden] on the CPU.

        Raises:
            DocumentError: If a text is longer than the model allows, or has no token; names its number.
        """
        documents = self._tokenized(texts)
        for index, length in enumerate(documents.lengths):
            if not length:
                raise DocumentError(f"text {index} has no token, so it has no embedding; leave it out.")
        with without_head(self._module.stage):
            return self._rows(documents, mean_of_tokens, width=int(self._module.hf_config.hidden_size)).float()

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Tokens],
        *,
        max_new_tokens: int,
        seed: int = 0,
        on_text: OnText | None = None,
        on_tokens: OnTokens | None = None,
        **options: Any,
    ) -> list[str] | list[list[int]]:
        """Continues prompts: token for token what transformers' ``generate`` makes of each prompt alone.

        Args:
            prompts: Texts, or token ids of each prompt.
            max_new_tokens: Most new tokens for each prompt.
            seed: With ``do_sample``, prompt ``i`` draws as after ``torch.manual_seed(seed + i)``.
            on_text: Called with a prompt's number and a piece of its new text as soon as it is known, in the first
                process of its pipeline alone.
            on_tokens: The same for token ids.
            options: Those of transformers' GenerationConfig; what is left out is as in the model's own.

        Returns:
            The new text of each prompt, without special tokens, if texts were given; else the new token ids.

        Raises:
            UnsupportedModelError: If the model encodes, or was saved without its head.
            WorkloadError: If a prompt is empty or too long, there is none, or an option is unknown or can't be done.
            InfeasibleError: If not even one prompt fits the memory.
        """
        self._check_decodes("generate")
        config = _generation_config(max_new_tokens, options)
        texts = _are_texts(prompts)
        tokens = self._prompt_tokens(prompts, texts=texts)
        self._check_generation(tokens, config, seed)
        streams = [on_tokens] if on_tokens else []
        pieces = _Pieces(self._text, on_text) if on_text else None
        made = self._generated(tokens, config, seed, [*streams, *([pieces.tokens] if pieces else [])], pieces)
        return [self._text(each) for each in made] if texts else made

    def save(self, directory: str | Path) -> None:
        """Writes the model as a plain Hugging Face directory, with identical tensors.

        Args:
            directory: Where to, on a file system that all processes share; must not exist yet, or be empty.

        Raises:
            InvalidInputError: If the directory has contents.
            RuntimeEnvironmentError: If a process can't write.
        """
        self._check_open()
        grid = self._engine.grid
        save_model(
            self._module.stage,
            directory,
            source=self._module.directory,
            part=grid.get_stage_id(),
            num_parts=grid.pipe_parallel_size,
            tensor_rank=grid.get_slice_parallel_rank(),
            replica=grid.data_parallel_id,
        )

    def close(self) -> None:
        """Frees the model's memory, once every process has come here; closing twice is once."""
        if self._closed:
            return
        self._forget()
        dist.barrier()  # Gloo may abort a process that ends while its last message is under way
        atexit.register(_part)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._forget()  # and waits for no one: other processes need not have the same error

    def _forget(self) -> None:
        self._closed = True
        self._engine = self._module = self._runner = None  # type: ignore[assignment]
        give_back_memory()  # DeepSpeed's engine refers to itself

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeEnvironmentError("the model is closed; load it again.")

    def _check_decodes(self, what: str) -> None:
        self._check_open()
        family = self._module.hf_config.model_type
        if family in ENCODERS:
            raise UnsupportedModelError(f"a {family} model encodes; it can't {what}, but embed.")
        if not self._module.stage.with_head:
            raise UnsupportedModelError(
                f"{self._module.directory} was saved without its head; it can't {what}, but embed."
            )

    def _tokenized(self, texts: Sequence[str]) -> TokenizedDocuments:
        self._check_open()
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise WorkloadError("texts must be a list of strings with at least one of them.")
        architecture = self._module.lp_profile.architecture
        if architecture is None:
            raise UnsupportedModelError(f"{self._module.directory} has no architecture.")
        documents = [Document(id=index, text=text) for index, text in enumerate(texts)]
        return tokenize(documents, self._module.directory, architecture.max_positions, architecture.vocab_size)

    def _rows(
        self,
        documents: TokenizedDocuments,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        width: int | None = None,
    ) -> torch.Tensor:
        """What ``loss_fn`` makes of the last stage's output for each document, float64; see `StepRunner.run`."""
        release(self._engine)
        grid, workload = self._engine.grid, self._module.lp_workload
        self._module.loss_fn = loss_fn
        steps = make_steps(
            documents.lengths,
            range(len(documents)),
            tokens_per_micro_batch=workload.chosen_micro_batch * workload.sequence,
            num_stages=grid.pipe_parallel_size,
            max_positions=self._module.lp_profile.max_positions or sys.maxsize,
            num_replicas=grid.data_parallel_size,
        )
        results: dict[int, torch.Tensor] = {}
        for step in steps:
            values = self._runner.run(step, documents, width=width).cpu()
            for micro_batch, rows in zip(step.micro_batches, values, strict=True):
                results.update(zip(micro_batch, rows, strict=False))  # rows beyond the documents are padding
        return torch.stack([results[index] for index in range(len(documents))])

    def _prompt_tokens(self, prompts: Sequence[Any], *, texts: bool) -> list[list[int]]:
        if not texts:
            return [list(map(int, prompt)) for prompt in prompts]
        documents = self._tokenized(prompts)
        return [documents[index].tolist() for index in range(len(documents))]

    def _check_generation(self, prompts: list[list[int]], config: GenerationConfig, seed: int) -> None:
        """Refuses, in every process, what any replica's engine would; a replica may have other prompts, or none."""
        module = self._module
        check_seed(seed)
        check_prompts(prompts, range(len(prompts)), config.max_new_tokens, module.hf_config)
        make_sampling(complete_config(config, module.directory, module.hf_config), module.stage.model, module.device)
        module.stage.new_cache(1, max(map(len, prompts)) + config.max_new_tokens)

    def _generated(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        seed: int,
        listeners: list[OnTokens],
        pieces: _Pieces | None,
    ) -> list[list[int]]:
        """New tokens of each prompt; each replica makes those of every ``data_parallel``-th."""
        module, grid = self._module, self._engine.grid
        replicas = grid.data_parallel_size
        planned = plan_generation(
            module.lp_profile,
            module.lp_cluster,
            prompts=-(-len(prompts) // replicas),
            prompt_tokens=max(map(len, prompts)),
            new_tokens=config.max_new_tokens,
            num_stages=grid.pipe_parallel_size,
            plan=self.plan,
        )
        mine = list(range(grid.data_parallel_id, len(prompts), replicas))

        def on_tokens(position: int, token_ids: list[int]) -> None:
            for listener in listeners:
                listener(mine[position], token_ids)

        def on_finished(position: int, token_ids: list[int]) -> None:
            if pieces:
                pieces.finished(mine[position], token_ids)

        made = []
        if mine:
            made = self._engine.generate(
                [prompts[index] for index in mine],
                generation_config=config,
                micro_batch=planned.micro_batch,
                num_slots=planned.num_slots,
                seed=seed,
                indices=mine,
                on_tokens=on_tokens if listeners else None,
                on_finished=on_finished if pieces else None,
            )
        if replicas == 1:
            return made
        found: dict[int, list[int]] = {}
        for part in gather(dict(zip(mine, made, strict=True))):
            found.update(part)
        return [found[index] for index in range(len(prompts))]

    def _text(self, token_ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._module.directory)
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _part() -> None:
    """At the end of a process whose models are closed: ends its communication, which torch warns of otherwise."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Pieces:
    """Turns new tokens into new text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], on_text: OnText) -> None:
        self._decode, self._on_text = decode, on_text
        self._texts: dict[int, GrowingText] = {}

    def tokens(self, index: int, token_ids: list[int]) -> None:
        """Takes new tokens of a prompt."""
        text = self._texts.setdefault(index, GrowingText(self._decode))
        text.add(token_ids)
        self._show(index, text)

    def finished(self, index: int, token_ids: list[int]) -> None:
        """Shows the rest of a prompt that has ended."""
        text = self._texts.pop(index)
        text.end(token_ids)
        self._show(index, text)

    def _show(self, index: int, text: GrowingText) -> None:
        if piece := text.piece():
            self._on_text(index, piece)


def _generation_config(max_new_tokens: int, options: dict[str, Any]) -> GenerationConfig:
    """Transformers' options, what is left out still open."""
    known = GenerationConfig().to_dict()
    unknown = sorted(options.keys() - known.keys() - vars(GenerationConfig()).keys())
    if unknown:
        raise WorkloadError(f"{', '.join(unknown)}: no such option of transformers' GenerationConfig; check its name.")
    if not is_whole(max_new_tokens, sys.maxsize):
        raise WorkloadError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1.")
    try:
        return GenerationConfig(max_new_tokens=max_new_tokens, **options)
    except (ValueError, TypeError) as error:
        raise WorkloadError(f"transformers refuses these options: {error}") from None


def _are_texts(prompts: Sequence[Any]) -> bool:
    """Whether these are texts; else they are token ids."""
    if isinstance(prompts, Sized) and not isinstance(prompts, (str, bytes)) and len(prompts):
        if all(isinstance(prompt, str) for prompt in prompts):
            return True
        if all(isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes)) for prompt in prompts):
            return False
    raise WorkloadError("prompts must be a list of strings, or of lists of token ids, with at least one of them.")
