"""One of four processes of a job: trains small models in pipelines of four, two and one stages, and writes JSON.

    torchrun --nproc-per-node 4 training_cases.py MODELS FOLDER

``MODELS`` holds ``untied`` and ``tied``; ``FOLDER/0.json`` ... ``FOLDER/3.json`` get a result per case and rank; an
exception is a result too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from families import MICRO_BATCH_ROWS, training_micro_batches
from transformers import AutoConfig

import lp_plugin.integrations.deepspeed as plain
from lp_plugin import Cluster, ModelProfile, Workload, save_plan
from lp_plugin.integrations.deepspeed.checkpoints import resume
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet, ready_for_batch
from lp_plugin.integrations.transformers.training import HFTrainingModule
from lp_plugin.measure.peak import PeakMemory
from lp_plugin.solver.solve import evaluate

RANK = int(os.environ["RANK"])
SEQUENCE = 16
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": MICRO_BATCH_ROWS,
    "steps_per_print": 10**9,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    "lp_plugin": {"device": "cpu"},
}
ZERO = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6}, "checkpoint": {"load_universal": True}}
CHECKPOINTED = {"pipeline": {"activation_checkpoint_interval": 1}}
Result = dict[str, Any]


def configuration(stages: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Four micro-batches a step, whatever the number of replicas."""
    return CONFIG | {"gradient_accumulation_steps": stages} | changes


def make(model: Path, stages: int, **changes: Any) -> HFTrainingModule:
    options = {key: changes.pop(key) for key in ("plan", "partition_method", "seed") if key in changes}
    config = configuration(stages, changes)
    return HFTrainingModule(model, num_stages=stages, config=config, sequence=SEQUENCE, **options)


def start(module: HFTrainingModule, **changes: Any) -> Any:
    config = configuration(module.num_stages, {key: value for key, value in changes.items() if key in CONFIG_KEYS})
    with quiet():
        engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
    return engine


CONFIG_KEYS = {*CONFIG, *ZERO, *CHECKPOINTED}


def batches(module: HFTrainingModule, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This replica's share of every step's micro-batches."""
    replica, replicas = module._topo.get_coord(RANK).data, module._topo.get_dim("data")
    for number, tokens in enumerate(training_micro_batches()):
        if number // 4 >= first_step and number % replicas == replica:
            yield tokens, tokens


def trained(engine: Any, steps: int, first_step: int = 0) -> list[float]:
    ready_for_batch(engine)
    data = batches(engine.module, first_step)
    return [float(engine.train_batch(data)) for _ in range(steps)]


def parts_of(module: HFTrainingModule) -> Result:
    return {"parts": module.parts, "plain": all(type(bound) is int for bound in module.parts)}


def losses(model: Path, stages: int, steps: int, **changes: Any) -> Result:
    module = make(model, stages, **changes)
    return parts_of(module) | {"losses": trained(start(module, **changes), steps)}


def by_hand(model: Path, parts: list[int]) -> Any:
    stages = len(parts) - 1
    workload = Workload(phase="train", batch=MICRO_BATCH_ROWS * 4, sequence=SEQUENCE, micro_batch=MICRO_BATCH_ROWS)
    return evaluate(ModelProfile.from_config(model), Cluster.homogeneous("cpu", stages), workload, parts)


def interrupted(model: Path, folder: Path, then: int, **changes: Any) -> Result:
    """Four stages for 3 steps, saved; then others go on for 3. Both with ZeRO-1."""
    first = start(make(model, 4, **ZERO), **ZERO)
    found = {"losses": trained(first, 3)}
    first.save_checkpoint(str(folder / "checkpoint"))
    found["uninterrupted"] = trained(first, 3, 3)
    module = make(model, then, seed=1, **ZERO, **changes)  # weights that have to be replaced
    engine = start(module, **ZERO, **changes)
    found |= {"nothing": resume(engine, folder / "none"), "steps": resume(engine, folder / "checkpoint")}
    found["left over"] = (folder / "checkpoint" / "universal").exists()
    found["resumed"] = trained(engine, 3, 3)
    module.save(folder / "exported")
    return found | hashes(module) | {"grew": engine.global_steps}


def hashes(module: HFTrainingModule) -> Result:
    """Of every parameter that this rank trains, by its name in the whole model."""
    state = module.stage.model.state_dict()
    return {
        "weights": {
            module.stage.checkpoint_name(name): hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for name, value in state.items()
        },
        "names": [name for name, _ in module.named_parameters()],
    }


def layer_files(model: Path, folder: Path) -> Result:
    """Weights alone, saved by four stages without ZeRO, loaded by two and by one."""
    first = start(make(model, 4))
    trained(first, 2)
    first.save_checkpoint(str(folder / "layers"))
    found = {"losses": trained(first, 1, 2)}
    for stages in (2, 1):
        engine = start(make(model, stages, seed=1))
        engine.load_checkpoint(str(folder / "layers"), load_module_only=True)
        found[str(stages)] = trained(engine, 1, 2)
    return found


def modes(model: Path) -> Result:
    """Whether every part of the stage is told in which mode it is."""
    module = make(model, 4)
    module.train()
    training = {part.training for part in module.stage.modules()}
    module.eval()
    return {"train": sorted(training), "eval": sorted({part.training for part in module.stage.modules()})}


def initialised(model: Path, folder: Path) -> Result:
    for stages in (4, 2, 1):
        make(model, stages, seed=7).save(folder / f"seed-7-{stages}")
    make(model, 4, seed=8).save(folder / "seed-8-4")
    return {}


def plan_file(model: Path, folder: Path) -> Result:
    path = folder / f"Plan-{RANK}.json"
    save_plan(by_hand(model, [0, 1, 7]), path)
    return parts_of(make(model, 2, partition_method=f"plan:{path}"))


def plain_module(zero_stage: int) -> Result:
    plain.configure(configuration(2, {"zero_optimization": {"stage": zero_stage}}))
    try:
        layers = [torch.nn.Linear(8, 8) for _ in range(4)]
        module = PipelineModule(layers, num_stages=2, loss_fn=lambda a, b: a, partition_method="cache-aware")
        workload = module.lp_plan.workload
        return {"zero": workload.zero_stage, "replicas": workload.data_parallel, "phase": workload.phase}
    finally:
        plain.configure({})


def memory(folder: Path, **changes: Any) -> Result:
    """Of the third step, on this rank, as the plan predicts and as it is."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_hidden_layers": 6}
    model = folder / f"sizes-{RANK}"
    model.mkdir(exist_ok=True)
    AutoConfig.for_model("llama", **sizes, vocab_size=600).save_pretrained(model)
    fused = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}}
    config = configuration(4, changes) | {"optimizer": fused, "gradient_accumulation_steps": 6}
    tokens = torch.randint(600, (MICRO_BATCH_ROWS, 128), generator=torch.Generator().manual_seed(0))
    data = itertools.repeat((tokens, tokens))
    with PeakMemory() as peak:
        with quiet():
            module = HFTrainingModule(model, num_stages=4, config=config, sequence=128, seed=0)
            engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
        ready_for_batch(engine)
        engine.train_batch(data)
        peak.start()
        engine.train_batch(data)
    return {"predicted": module.lp_plan.stages[module.stage_id].memory_bytes, "measured": peak.num_bytes}


def sublayers(model: Path) -> Any:
    profile = ModelProfile.from_config(model, granularity="sublayer")
    workload = Workload(phase="train", batch=4, sequence=SEQUENCE, micro_batch=1)
    return evaluate(profile, Cluster.homogeneous("cpu", 2), workload, [0, 2, profile.num_layers])


def cases(models: Path, folder: Path) -> dict[str, Callable[[], Result]]:
    untied, tied = models / "untied", models / "tied"
    zero = {key: ZERO[key] for key in ("zero_optimization",)}
    return {
        "untied, 4 stages": lambda: losses(untied, 4, 20),
        "untied, 2 stages": lambda: losses(untied, 2, 10),
        "untied, 2 stages by hand": lambda: losses(untied, 2, 10, plan=by_hand(untied, [0, 5, 7])),
        "untied, parameters": lambda: losses(untied, 4, 3, partition_method="parameters"),
        "untied, uniform, checkpointed": lambda: losses(untied, 4, 3, partition_method="uniform", **CHECKPOINTED),
        "tied, 4 stages": lambda: losses(tied, 4, 20),
        "tied, 4 stages by hand": lambda: losses(tied, 4, 10, plan=by_hand(tied, [0, 2, 3, 6, 7])),
        "tied, 2 stages, zero": lambda: losses(tied, 2, 20, **zero),
        "tied, 1 stage, zero, checkpointed": lambda: losses(tied, 1, 3, **zero, **CHECKPOINTED),
        "tied, profile": lambda: losses(tied, 2, 3, partition_method="profile"),
        "untied, interrupted": lambda: interrupted(untied, folder / "untied", 2),
        "tied, interrupted": lambda: interrupted(tied, folder / "tied", 2, **CHECKPOINTED),
        "layer files": lambda: layer_files(tied, folder),
        "modes": lambda: modes(untied),
        "initialised": lambda: initialised(tied, folder),
        "memory, float32": lambda: memory(folder),
        "memory, float32, checkpointed": lambda: memory(folder, **CHECKPOINTED),
        "memory, bfloat16": lambda: memory(
            folder, **zero, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}
        ),
        "plan file": lambda: plan_file(untied, folder),
        "plain, zero 1": lambda: plain_module(1),
        "plain, zero 2": lambda: plain_module(2),
        "zero 3": lambda: parts_of(make(untied, 2, zero_optimization={"stage": 3})),
        "plan, other stages": lambda: parts_of(make(untied, 4, plan=by_hand(untied, [0, 5, 7]))),
        "plan, halves": lambda: parts_of(make(untied, 2, plan=sublayers(untied))),
        "prefill": lambda: parts_of(make(untied, 2, lp_plugin={"phase": "prefill"})),
        "resume, no zero": lambda: {"steps": resume(start(make(untied, 2)), folder)},
    }


def attempt(case: Callable[[], Result]) -> Result:
    try:
        return case()
    except Exception as error:  # noqa: BLE001 - which one it is, the test says
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    models, folder = Path(sys.argv[1]), Path(sys.argv[2])
    init_distributed()
    results = {name: attempt(case) for name, case in cases(models, folder).items()}
    (folder / f"{RANK}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()  # else a thread of Gloo's may still hold a tensor when Python ends, and abort
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
