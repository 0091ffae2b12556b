"""One process of a pipeline that generates: all families and cuts of a world size, one after the other.

    torchrun --nproc-per-node N generation_cases.py MODELS RESULTS

The last rank writes what was generated to ``RESULTS/generated.json``, every rank what else it saw to
``RESULTS/RANK.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from families import FAMILIES, VOCABULARY
from transformers import GenerationConfig

import lp_plugin.integrations.deepspeed.generation  # noqa: F401 - gives the engine its generate()
from lp_plugin import Cluster, ModelProfile, Workload
from lp_plugin.errors import LpPluginError, UnsupportedModelError
from lp_plugin.integrations.deepspeed.engine import build_engine, init_distributed, quiet
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.solver.solve import evaluate

MODELS = (*FAMILIES, "opt-350m")  # the last for activations of two widths
ROWS, SLOTS, NEW_TOKENS, SEED = 3, 2, 9, 7
LENGTHS = (5, 1, 17, 9, 1, 12, 2)
"""Of the prompts: more than two slots of three rows hold, two of one token."""
END_TOKENS = [2, 5, 9, 33, 40, 71]
"""Many, so that rows end at different steps."""
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95}
WAYS = {"greedy": GREEDY, "sampled": SAMPLED}
OPTIONS: dict[str, dict[str, Any]] = {
    "min_new_tokens": {"min_new_tokens": 6},
    "min_length": {"min_length": 14},
    "min_new_tokens, sampled": {"min_new_tokens": 6, "do_sample": True},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5, "do_sample": True, "top_k": 10},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "do_sample": True, "top_k": 3},
    "bad_words": {"bad_words_ids": [[3], [17, 18]], "min_new_tokens": 3, "do_sample": True, "typical_p": 0.9},
    "sequence_bias": {"sequence_bias": [[[11], 2.0]], "do_sample": True, "min_p": 0.05},
    "forced": {"forced_eos_token_id": 2, "suppress_tokens": [5, 9, 33, 40, 71], "begin_suppress_tokens": [8, 10]},
    "decay": {"exponential_decay_length_penalty": (3, 1.4), "do_sample": True, "epsilon_cutoff": 0.005},
    "remaining warpers": {"do_sample": True, "top_k": 0, "eta_cutoff": 0.01, "top_h": 0.6, "renormalize_logits": True},
    "another end": {"eos_token_id": 17, "pad_token_id": 3},
}
"""Further ways to choose, for llama on two ranks alone."""
SHAPES = [(1, 1, 9), (8, 3, 9), (2, 5, 9), (3, 2, 1), (3, 2, 2), (3, 2, 9)]
"""Rows, slots and new tokens of further calls, for llama alone."""
REFUSED: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "no prompts": ([], {}),
    "empty prompt": ([[1], []], {}),
    "too long": ([[1], [1] * 60], {}),
    "unknown token": ([[1, VOCABULARY]], {}),
    "beams": ([[1]], {"num_beams": 4}),
    "temperature": ([[1]], {"do_sample": True, "temperature": -1.0}),
    "no new tokens": ([[1]], {"max_new_tokens": None}),
}


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def make_options(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "eos_token_id": END_TOKENS, "pad_token_id": 0} | options)


def cuts(num_layers: int, world: int) -> list[tuple[int, ...]]:
    """Uneven ones: embedding alone, head alone, head and norm alone."""
    if world == 2:
        return [(0, 3, num_layers), (0, num_layers - 1, num_layers)]
    return [(0, 2, 3, num_layers - 1, num_layers), (0, 1, num_layers - 3, num_layers - 2, num_layers)]


def halved(num_layers: int, world: int) -> tuple[int, ...]:
    """Inside of blocks; one stage has no attention at all."""
    return (0, 4, num_layers) if world == 2 else (0, 2, 3, 6, num_layers)


def make_engine(folder: Path, profile: ModelProfile, cut: Sequence[int], data_parallel: int = 1) -> Any:
    stages = len(cut) - 1
    workload = Workload(batch=ROWS * SLOTS, sequence=64, micro_batch=ROWS, phase="decode")
    plan = evaluate(profile, Cluster.homogeneous("cpu", stages), workload, cut)
    with quiet():
        module = HFPipelineModule(folder, num_stages=stages, workload=workload, plan=plan, data_parallel=data_parallel)
    return build_engine(module, micro_batch=ROWS, num_micro_batches=SLOTS, dtype="float32")


def generated(engine: Any, options: dict[str, Any], rows: int = ROWS, slots: int = SLOTS) -> list[list[int]]:
    return engine.generate(
        make_prompts(), generation_config=make_options(**options), micro_batch=rows, num_slots=slots, seed=SEED
    )


def family_cases(models: Path, family: str, world: int) -> list[dict[str, Any]]:
    """Greedy and sampled, at uneven cuts between layers and, where they can be, inside of blocks."""
    profile = ModelProfile.from_config(models / family)
    first, second = cuts(profile.num_layers, world)
    cases = [("greedy", profile, first), ("sampled", profile, second)]
    try:
        fine = ModelProfile.from_config(models / family, granularity="sublayer")
        cases.insert(1, ("sampled" if world == 4 else "greedy", fine, halved(fine.num_layers, world)))
    except UnsupportedModelError:
        pass
    entries = []
    for way, each, cut in cases[: 2 if world == 4 else 3]:
        made = generated(make_engine(models / family, each, cut), WAYS[way])
        entries.append({"family": family, "way": way, "cut": cut, "made": made})
    return entries


def llama_cases(models: Path, world: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Entries like those of the families, and what every rank says of callbacks and errors."""
    folder = models / "llama"
    profile = ModelProfile.from_config(folder)
    engine = make_engine(folder, profile, cuts(profile.num_layers, world)[0])
    entries = []
    for way, options in OPTIONS.items() if world == 2 else ():
        entries.append({"family": "llama", "way": way, "made": generated(engine, options)})
    for rows, slots, new_tokens in SHAPES:
        made = generated(engine, {"max_new_tokens": new_tokens}, rows, slots)
        entries.append(
            {"family": "llama", "way": f"new tokens {new_tokens}", "rows": rows, "slots": slots, "made": made}
        )
    seen = heard(engine)
    seen["errors"] = {name: error(engine, *case) for name, case in REFUSED.items()}
    seen["restored"] = engine._INSTRUCTION_MAP is PipelineEngine._INSTRUCTION_MAP
    alone = make_engine(folder, profile, (0, profile.num_layers), data_parallel=world)
    entries.append({"family": "llama", "way": "sampled", "made": generated(alone, SAMPLED)})
    return entries, seen


def heard(engine: Any) -> dict[str, Any]:
    """What callbacks were told, and that other indices give other seeds."""
    prompts = make_prompts()
    streamed: dict[int, list[int]] = {}
    finished: dict[int, list[int]] = {}
    made = engine.generate(
        prompts,
        generation_config=make_options(**SAMPLED),
        micro_batch=ROWS,
        num_slots=SLOTS,
        seed=SEED - 2,
        indices=[position + 2 for position in range(len(prompts))],
        on_tokens=lambda position, tokens: streamed.setdefault(position, []).extend(tokens),
        on_finished=finished.__setitem__,
    )
    return {"made": made, "streamed": sorted(streamed.items()), "finished": sorted(finished.items())}


def broken(models: Path, world: int) -> str:
    """What a model says of whose middle stage the weights are not numbers."""
    profile = ModelProfile.from_config(models / "llama")
    engine = make_engine(models / "llama", profile, cuts(profile.num_layers, world)[0])
    if engine.stage_id == world // 2:
        next(engine.module.stage.model.parameters()).data.fill_(float("nan"))
    return error(engine, make_prompts(), {"eos_token_id": []})


def error(engine: Any, prompts: list[list[int]], options: dict[str, Any]) -> str:
    try:
        engine.generate(prompts, generation_config=make_options(**options), micro_batch=ROWS, num_slots=SLOTS)
    except LpPluginError as caught:
        return f"{type(caught).__name__}: {caught}"
    return "none"


def main(models: Path, results: Path) -> None:
    torch.set_num_threads(1)
    init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    entries, seen = llama_cases(models, world)
    for family in MODELS:
        entries += family_cases(models, family, world)
    seen["broken"] = broken(models, world)
    (results / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    if rank == world - 1:
        (results / "generated.json").write_text(json.dumps(entries), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
