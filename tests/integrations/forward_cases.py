"""One of four processes that run forward passes: families, cuts and strategies, one after the other.

    torchrun --nproc-per-node 4 forward_cases.py MODELS RESULTS

Every rank writes what it saw to ``RESULTS/RANK.json``, last stages what they made to ``RESULTS/NAME-REPLICA.pt``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.engine import PipelineEngine
from families import VOCABULARY

from lp_plugin import Cluster, ModelProfile, Workload
from lp_plugin.errors import LpPluginError
from lp_plugin.integrations.deepspeed.engine import build_engine, init_distributed, quiet
from lp_plugin.integrations.deepspeed.forward import ForwardPipeline
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.score.likelihood import log_likelihoods
from lp_plugin.solver.solve import evaluate

MICRO_BATCHES, ROWS, TOKENS = 5, 3, 20
"""More tokens than the sliding windows are wide."""
FAMILIES = ("llama", "starcoder2", "gemma2", "bloom", "opt-350m")
"""The last one for activations of two widths."""
HALVED = (0, 2, 3, 6, 13)
"""Layers of llama's halves; the third stage ends inside of a block, the second has no attention."""
LAYOUTS = {"tp=2 pp=2": ((0, 3, 8), 2, 1), "dp=2 pp=2": ((0, 6, 8), 1, 2), "dp=4": ((0, 8), 1, 4)}
"""Of llama: boundaries, tensor-parallel ranks and replicas."""


def make_tokens(seed: int, micro_batches: int = MICRO_BATCHES, rows: int = ROWS, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (micro_batches, rows, tokens), generator=generator)


def make_engine(
    folder: Path,
    cut: Sequence[int] | None,
    *,
    granularity: Any = "layer",
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    loss_fn: Any = None,
) -> Any:
    profile = ModelProfile.from_config(folder, granularity=granularity)
    cut = cut or (0, 2, 3, profile.num_layers - 1, profile.num_layers)
    stages = len(cut) - 1
    sharded = profile.sharded(tensor_parallel) if tensor_parallel > 1 else profile
    workload = Workload(batch=ROWS * MICRO_BATCHES, sequence=TOKENS, micro_batch=ROWS)
    with quiet():
        module = HFPipelineModule(
            folder,
            num_stages=stages,
            workload=workload,
            plan=evaluate(sharded, Cluster.homogeneous("cpu", stages), workload, cut),
            tensor_parallel=tensor_parallel,
            data_parallel=data_parallel,
            loss_fn=loss_fn,
        )
    return build_engine(module, micro_batch=ROWS, num_micro_batches=MICRO_BATCHES, dtype="float32")


def make_pipeline(engine: Any, micro_batches: int = MICRO_BATCHES, rows: int = ROWS) -> ForwardPipeline:
    return ForwardPipeline(engine, num_micro_batches=micro_batches, rows=rows, tokens=TOKENS)


def evaluated(engine: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """What DeepSpeed's own ``eval_batch`` gives."""
    engine.total_loss = None
    if engine.grid.pipe_parallel_size > 1:
        p2p.init_process_groups(engine.grid)
    engine.reset_activation_shape()
    fed = iter([(each, each) for each in tokens])
    outputs = engine.eval_batch(
        fed, compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=len(tokens)
    )
    return torch.stack(outputs) if engine.is_last_stage() else None


def same(made: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if made is None or expected is None:
        return made is expected
    return torch.equal(made, expected)


def family_case(models: Path, results: Path, family: str) -> bool:
    """Two runs with other inputs, each against ``eval_batch``."""
    engine = make_engine(models / family, None)
    pipeline = make_pipeline(engine)
    equal = []
    for seed in (1, 0):
        tokens = make_tokens(seed)
        made = pipeline.run(tokens if engine.is_first_stage() else None)
        equal.append(same(made, evaluated(engine, tokens)))
    keep(results, family, engine, made)
    return all(equal)


def layout_case(models: Path, results: Path, name: str) -> bool:
    """Every replica with inputs of its own; the first one once more alone."""
    cut, tensor_parallel, data_parallel = LAYOUTS[name]
    engine = make_engine(models / "llama", cut, tensor_parallel=tensor_parallel, data_parallel=data_parallel)
    replica = engine.grid.get_data_parallel_id()
    pipeline = make_pipeline(engine)
    tokens = make_tokens(replica)
    equal = same(pipeline.run(tokens), evaluated(engine, tokens))
    if replica == 0:
        alone = make_pipeline(engine, 2)
        alone.run(make_tokens(5)[:2])
        equal = equal and pipeline.alone_seconds() > 0
        alone.release()
    keep(results, name, engine, pipeline.run(tokens))
    return equal


def halved_case(models: Path, results: Path) -> None:
    engine = make_engine(models / "llama", HALVED, granularity="sublayer")
    keep(results, "halves", engine, make_pipeline(engine).run(make_tokens(0)))


def turns_case(models: Path, results: Path) -> dict[str, Any]:
    """Two engines in turns, two pipelines of other shapes on one of them, with and without labels."""
    scores = make_engine(models / "llama", None, loss_fn=log_likelihoods)
    plain = make_engine(models / "llama", (0, 1, 4, 5, 8))
    pipeline, other = make_pipeline(scores), make_pipeline(plain)
    small = make_pipeline(scores, 1, 2)
    tokens, few = make_tokens(0), make_tokens(3, 1, 2)
    seen: dict[str, Any] = {}
    scored = pipeline.run(tokens, tokens.roll(-1, dims=-1))
    keep(results, "scores", scores, scored)
    logits = other.run(tokens)
    keep(results, "small", scores, small.run(few))
    seen["unlabelled"] = same(pipeline.run(tokens), logits)
    seen["repeated"] = same(pipeline.run(tokens, tokens.roll(-1, dims=-1)), scored)
    seen["restored"] = scores._INSTRUCTION_MAP is PipelineEngine._INSTRUCTION_MAP
    seen["execution"] = pipeline.execution
    seen["errors"] = {
        "graphs": error(lambda: ForwardPipeline(plain, num_micro_batches=1, rows=1, tokens=1, execution="graphs")),
        "rows": error(lambda: ForwardPipeline(plain, num_micro_batches=1, rows=0, tokens=1)),
    }
    if plain.is_first_stage():
        seen["errors"]["shape"] = error(lambda: other.run(few))
        seen["errors"]["missing"] = error(lambda: other.run(None))
    return seen


def keep(results: Path, name: str, engine: Any, made: torch.Tensor | None) -> None:
    if made is not None:
        torch.save(made, results / f"{name}-{engine.grid.get_data_parallel_id()}.pt")


def error(attempt: Any) -> str:
    try:
        attempt()
    except LpPluginError as caught:
        return f"{type(caught).__name__}: {caught}"
    return "none"


def main(models: Path, results: Path) -> None:
    torch.set_num_threads(1)
    init_distributed()
    equal = {family: family_case(models, results, family) for family in FAMILIES}
    equal |= {name: layout_case(models, results, name) for name in LAYOUTS}
    halved_case(models, results)
    seen = {"equal": equal, **turns_case(models, results)}
    (results / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
