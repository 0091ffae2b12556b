"""`engine.generate(...)`: a call from prompts to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from lp_plugin.errors import WorkloadError
from lp_plugin.generate.settings import check_seed
from lp_plugin.integrations.deepspeed.generation.passes import Passes, Work
from lp_plugin.integrations.deepspeed.generation.results import Listener, Results
from lp_plugin.integrations.deepspeed.generation.sampling import complete_config, make_sampling
from lp_plugin.integrations.deepspeed.generation.schedule import GenerationSchedule
from lp_plugin.integrations.deepspeed.generation.slots import make_groups, take_turns
from lp_plugin.integrations.deepspeed.generation.station import Station
from lp_plugin.integrations.deepspeed.instructions import instructions
from lp_plugin.integrations.transformers.runnable import check_runnable

__all__ = ["check_prompts", "generate", "release"]


def generate(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    *,
    generation_config: GenerationConfig,
    micro_batch: int,
    num_slots: int,
    seed: int = 0,
    compiled: bool = False,
    indices: Sequence[int] | None = None,
    on_tokens: Listener | None = None,
    on_finished: Listener | None = None,
) -> list[list[int]]:
    """Continues prompts: token for token what transformers' ``generate`` makes of each prompt alone.

    Collective over the ranks of a pipeline, which all give the same arguments; pipelines that work side by side on
    other prompts (data parallelism) don't wait for each other. Slots, caches and CUDA graphs stay for the next call
    with the same options, rows and longest prompt plus ``max_new_tokens``.

    Args:
        engine: DeepSpeed's ``PipelineEngine`` over an ``HFPipelineModule``.
        prompts: Token ids of each prompt.
        generation_config: transformers' options; what is left out comes from the model's directory, then from
            transformers' defaults. Needs ``max_new_tokens``.
        micro_batch: Rows of a slot.
        num_slots: Micro-batches on their way at the same time.
        seed: With sampling, a prompt's tokens are those after ``torch.manual_seed(seed + index)``.
        compiled: On GPUs, run decode passes through ``torch.compile`` before they are captured as CUDA graphs: fewer
            kernels, but a compiler is needed, and the first call takes some 20 seconds more.
        indices: Index of each prompt, for its seed and in errors; its position if left out.
        on_tokens: Called with a prompt's position and its new tokens as soon as they are known, on the first stage's
            first tensor-parallel rank only.
        on_finished: Called there with a prompt's position and all its new tokens as soon as it has ended.

    Returns:
        New tokens per prompt, an end-of-sequence token included; on every rank of the pipeline.

    Raises:
        UnsupportedModelError: If the model only encodes.
        WorkloadError: If a prompt is empty, too long for the model or has unknown tokens, if there are none, or if an
            option or the seed can't be used; on every rank, before anything runs.
        RuntimeEnvironmentError: If logits are not numbers, as soon as that is known; on the stage whose output is the
            first not to be finite a NotFiniteError, which says so. Load the model again then.
    """
    module = engine.module
    check_runnable({"model_type": module.hf_config.model_type})
    config = complete_config(generation_config, module.directory, module.hf_config)
    indices = range(len(prompts)) if indices is None else indices
    _check(prompts, indices, micro_batch, num_slots)
    check_seed(seed)
    check_prompts(prompts, indices, int(config.max_new_tokens), module.hf_config)
    seeds = [seed + index for index in indices]
    sampling = make_sampling(config, module.stage.model, torch.device(engine.device))
    groups = make_groups([len(prompt) for prompt in prompts], micro_batch)
    module.eval()
    with torch.no_grad():
        station = _station(engine)
        used = min(num_slots, len(groups))
        station.prepare(
            sampling, rows=micro_batch, length=groups[0].tokens + sampling.new_tokens, num_slots=used, compiled=compiled
        )
        listens = station.ring.is_first and engine.grid.get_slice_parallel_rank() == 0
        results = Results(
            len(prompts),
            sampling.new_tokens,
            sampling.ends,
            on_tokens if listens else None,
            on_finished if listens else None,
        )
        passes = Passes(
            station, Work(prompts=prompts, seeds=seeds, indices=indices, groups=groups, rows=micro_batch), results
        )
        turns = take_turns(len(groups), used, sampling.new_tokens, passes.arrived)
        with instructions(engine, passes.instructions()):
            engine._exec_schedule(GenerationSchedule(turns, used, engine.num_stages, engine.stage_id))
        passes.finish()
        tensor = results.as_tensor(station.device)
        station.ring.share(tensor)
    return Results.as_lists(tensor)


def release(engine: Any) -> None:
    """Gives back the memory of the slots, KV caches and CUDA graphs, which `generate` keeps for its next call."""
    station: Station | None = engine.__dict__.get("lp_station")
    if station is not None:
        station.release()


def _station(engine: Any) -> Station:
    """What the engine kept from the call before, or new."""
    station: Station | None = engine.__dict__.get("lp_station")
    if station is None:
        station = engine.lp_station = Station(engine)
    return station


def _check(prompts: Sequence[Sequence[int]], indices: Sequence[int], micro_batch: int, num_slots: int) -> None:
    if not prompts:
        raise WorkloadError("there are no prompts; give at least one.")
    if len(indices) != len(prompts):
        raise WorkloadError(f"there are {len(prompts)} prompts, but {len(indices)} indices; give one for each.")
    for name, value in (("micro_batch", micro_batch), ("num_slots", num_slots)):
        if value < 1:
            raise WorkloadError(f"{name} is {value}; it must be at least 1.")


def check_prompts(prompts: Sequence[Sequence[int]], indices: Sequence[int], new_tokens: int, model_config: Any) -> None:
    """Refuses prompts that can't be continued.

    Args:
        prompts: Token ids of each prompt.
        indices: What errors call each prompt.
        new_tokens: Most new tokens for each.
        model_config: The whole model's configuration.

    Raises:
        WorkloadError: If a prompt is empty, too long for the model, or has tokens that the model does not know.
    """
    bound = getattr(model_config, "max_position_embeddings", None)
    for index, prompt in zip(indices, prompts, strict=True):
        if not prompt:
            raise WorkloadError(f"prompt {index} is empty; a model needs at least one token, such as its first one.")
        if bound is not None and len(prompt) + new_tokens > bound:
            raise WorkloadError(
                f"prompt {index} has {len(prompt)} tokens, with {new_tokens} new ones {len(prompt) + new_tokens}; "
                f"the model has {bound} positions. Shorten the prompt, or lower max_new_tokens."
            )
        if min(prompt) < 0 or max(prompt) >= model_config.vocab_size:
            raise WorkloadError(
                f"prompt {index} has tokens from {min(prompt)} to {max(prompt)}; the model's are 0 to "
                f"{model_config.vocab_size - 1}. Use the model's own tokenizer."
            )
