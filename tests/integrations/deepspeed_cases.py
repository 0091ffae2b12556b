"""One process of a job: makes many PipelineModules, trains some, and writes what it saw as JSON.

    torchrun --nproc-per-node 2 deepspeed_cases.py FOLDER

``FOLDER/0.json`` and ``FOLDER/1.json`` hold a result per case and rank; an exception is a result too.
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
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

import lp_plugin.integrations.deepspeed as ours
from lp_plugin import Cluster, ModelProfile, Workload, make_plan, save_plan
from lp_plugin.integrations.deepspeed.engine import init_distributed

EXAMPLE = Path(__file__).parents[2] / "examples" / "train"
sys.path.insert(0, str(EXAMPLE))
from train import Dense, loss_fn, make_batches, make_layers  # noqa: E402 - the example is no package

CONFIG = json.loads((EXAMPLE / "ds.json").read_text(encoding="utf-8"))
STOCK = {key: value for key, value in CONFIG.items() if key != "lp_plugin"}
STEPS = 5
RANK = int(os.environ["RANK"])
Result = dict[str, Any]


class ByHand(PipelineModule):
    """Fixed boundaries, without lp_plugin."""

    fixed: tuple[int, ...]

    def _partition_layers(self, method: str = "uniform") -> None:
        del method
        self.parts = list(self.fixed)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class Stock(PipelineModule):
    """DeepSpeed's own partitioning, as it was before our import."""

    _partition_layers = PipelineModule._partition_layers.__wrapped__


class Frozen(torch.nn.Linear):
    """A layer whose parameters are not trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)


class OnlyWithoutGradients(torch.nn.Linear):
    """Fails when timed in training, and only there: on one rank alone."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return super().forward(value)


# models: their layers, and their micro-batches


def logits(embedding: torch.nn.Embedding, value: torch.Tensor) -> torch.Tensor:
    """The head of a tied embedding."""
    return value @ embedding.weight.T


def tied_layers() -> list[Any]:
    shape = (4096, 32)
    hidden = [LayerSpec(Dense, inputs, outputs) for inputs, outputs in itertools.pairwise((32, 256, 256, 32))]
    return [
        TiedLayerSpec("table", torch.nn.Embedding, *shape),
        *hidden,
        TiedLayerSpec("table", torch.nn.Embedding, *shape, forward_fn=logits),
    ]


def mixed_layers() -> list[Any]:
    """Modules that exist already, a lambda, a function, LayerSpecs; takes (batch, 12), gives (batch, 1, classes)."""
    return [
        torch.nn.Linear(12, 64),
        lambda value: value * 2,
        torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(64, 64)),
        torch.relu,
        LayerSpec(Dense, 64, 128),
        lambda value: value.unsqueeze(1),
        torch.nn.Linear(128, 10),
    ]


def frozen_layers() -> list[Any]:
    return [
        LayerSpec(Frozen, 12, 300),
        LayerSpec(Frozen, 300, 300),
        LayerSpec(Dense, 300, 12),
        LayerSpec(Frozen, 12, 10),
        lambda value: value.unsqueeze(1),
    ]


def vectors(micro_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield (
            torch.randn(micro_batch, 12, generator=generator),
            torch.randint(10, (micro_batch, 1), generator=generator),
        )


BATCHES = {make_layers: make_batches, tied_layers: make_batches, mixed_layers: vectors, frozen_layers: vectors}


# what is seen


def make(
    layers: Callable[[], list[Any]],
    kind: type[PipelineModule] = PipelineModule,
    *,
    configured: dict[str, Any] | None = None,
    **keywords: Any,
) -> PipelineModule:
    """A module from a fixed seed, under a configuration given to `configure`."""
    ours.configure(configured or {})
    torch.manual_seed(0)
    keywords.setdefault("num_stages", 2)
    try:
        return kind(layers=layers(), loss_fn=loss_fn, **keywords)
    finally:
        ours.configure({})


def by_hand(layers: Callable[[], list[Any]], parts: list[int]) -> PipelineModule:
    kind = type("ByHand", (ByHand,), {"fixed": tuple(parts)})
    return make(layers, kind, num_stages=len(parts) - 1)


def seen(module: PipelineModule) -> Result:
    """Boundaries, this rank's initial weights, and where construction left the random state."""
    weights = hashlib.sha256()
    for name, value in module.state_dict().items():
        weights.update(name.encode() + value.numpy().tobytes())
    return {
        "parts": module.parts,
        "plain": all(type(bound) is int for bound in module.parts),
        "planned": hasattr(module, "lp_plan"),
        "weights": weights.hexdigest(),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "local": [module._local_start, module._local_stop],
    }


def trained(module: PipelineModule, layers: Callable[[], list[Any]], *, optimizer: bool = True) -> Result:
    """`seen`, and the losses of some steps and of one evaluation."""
    result = seen(module)
    config = STOCK if optimizer else {key: value for key, value in STOCK.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
    batches = BATCHES[layers](engine.train_micro_batch_size_per_gpu())
    if optimizer:
        result["losses"] = [float(engine.train_batch(batches)) for _ in range(STEPS)]
    result["evaluated"] = float(engine.eval_batch(batches))
    return result


def both(layers: Callable[[], list[Any]], *, optimizer: bool = True, **keywords: Any) -> Result:
    """Ours, and the same boundaries by hand."""
    module = make(layers, **keywords)
    parts = list(module.parts)
    result = {"ours": trained(module, layers, optimizer=optimizer)}
    result["by hand"] = trained(by_hand(layers, parts), layers, optimizer=optimizer)
    return result


def stored_plan(folder: Path, num_layers: int, num_stages: int) -> str:
    """A plan file whose path has upper-case letters; every rank writes its own."""
    profile = ModelProfile.from_costs([5.0, *([1.0] * (num_layers - 1))])
    plan = make_plan(profile, Cluster.homogeneous("cpu", num_stages), Workload(batch=1, sequence=1))
    path = folder / f"Plan-OF-rank{RANK}-{num_layers}-{num_stages}.JSON"
    save_plan(plan, path)
    return str(path)


def section(**keys: Any) -> dict[str, Any]:
    return {**STOCK, "lp_plugin": keys}


def weight_bytes() -> Result:
    module = make(frozen_layers, partition_method="cache-aware")
    return {"parts": module.parts, "bytes": [layer.weight_bytes for layer in module.lp_plan.layers]}


def another_plan_on_one_host(folder: Path) -> Result:
    """Rank 1's file has the cut one layer further on."""
    costs = [1.0] * len(make_layers())
    costs[-1 if RANK else 0] = 5.0
    plan = make_plan(ModelProfile.from_costs(costs), Cluster.homogeneous("cpu", 2), Workload(batch=1, sequence=1))
    save_plan(plan, folder / f"mine-{RANK}.json")
    return seen(make(make_layers, partition_method=f"plan:{folder}/mine-{RANK}.json"))


def not_finite(stage: int) -> Result:
    """A stage whose weights are not finite from the third micro-batch on, evaluated with the check on."""
    module = make(make_layers, ours.PipelineModule, config=section(method="cache-aware", check_finite=True))
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=STOCK)
    passes = itertools.count()

    def poison(layer: torch.nn.Module, inputs: Any) -> None:
        if stage == RANK and next(passes) == 2:
            next(layer.parameters()).data.fill_(torch.inf)

    module.forward_funcs[0].register_forward_pre_hook(poison)
    batches = make_batches(engine.train_micro_batch_size_per_gpu())
    engine.eval_batch(batches, reduce_output=None, bcast_loss=False)
    return {"evaluated": True}


def cases(folder: Path) -> dict[str, Callable[[], Result]]:
    plan = stored_plan(folder, len(make_layers()), 2)
    profiled = {"partition_method": "profile"}
    found: dict[str, Callable[[], Result]] = {
        "cache-aware": lambda: both(make_layers, partition_method="cache-aware"),
        "cache-aware, in capitals": lambda: seen(make(make_layers, partition_method="Cache-Aware")),
        "one stage": lambda: both(make_layers, partition_method="cache-aware", num_stages=1),
        "profile": lambda: both(make_layers, configured=section(sequence=16), **profiled),
        "profile, inference": lambda: both(make_layers, configured=section(sequence=16, phase="prefill"), **profiled),
        "profile, tied": lambda: both(tied_layers, configured=section(sequence=16), **profiled),
        "profile, mixed": lambda: both(mixed_layers, configured=section(), **profiled),
        "profile, frozen": lambda: both(frozen_layers, configured=section(), optimizer=False, **profiled),
        "tied": lambda: both(tied_layers, partition_method="cache-aware"),
        "mixed": lambda: both(mixed_layers, partition_method="cache-aware"),
        "frozen": lambda: both(frozen_layers, partition_method="cache-aware", optimizer=False),
        "frozen, counted": weight_bytes,
        "plan": lambda: both(make_layers, partition_method=f"plan:{plan}"),
        "plan, prefix in capitals": lambda: seen(make(make_layers, partition_method=f"PLAN:{plan}")),
        "plan, by section": lambda: seen(make(make_layers, configured=section(plan=plan))),
        "plan, other layers": lambda: seen(make(tied_layers, partition_method=f"plan:{plan}")),
        "plan, other stages": lambda: seen(make(make_layers, partition_method=f"plan:{plan}", num_stages=1)),
        "plan, missing": lambda: seen(make(make_layers, partition_method=f"plan:{folder}/Missing.json")),
        "plan, another on one host": lambda: another_plan_on_one_host(folder),
        "not finite, stage 0": lambda: not_finite(0),
        "not finite, stage 1": lambda: not_finite(1),
        "finite": lambda: not_finite(2),
        "stages outnumber layers": lambda: seen(make(lambda: [torch.nn.Linear(2, 2)], partition_method="cache-aware")),
        "profile, nothing to infer": lambda: seen(make(lambda: [torch.relu, torch.tanh], **profiled)),
        "profile, wrong input": lambda: seen(
            make(mixed_layers, configured=section(input={"shape": [4, 13]}), **profiled)
        ),
        "profile, fails on one rank": lambda: seen(
            make(lambda: [torch.nn.Linear(2, 2), OnlyWithoutGradients(2, 2)], configured=section(), **profiled)
        ),
        "section overrides": lambda: seen(
            make(make_layers, configured=section(method="uniform"), partition_method="cache-aware")
        ),
        "subclass": lambda: seen(make(make_layers, ours.PipelineModule)),
        "subclass, own section": lambda: seen(
            make(
                make_layers,
                ours.PipelineModule,
                configured=section(method="parameters"),
                config=section(method="uniform"),
            )
        ),
        "subclass of a user": lambda: seen(
            make(make_layers, type("Users", (PipelineModule,), {}), partition_method="cache-aware")
        ),
    }
    for method in ("uniform", "parameters", "Parameters", "type:dense", "type:Linear$", "type:nothing", "cache_aware"):
        found[f"{method}, imported"] = lambda method=method: seen(make(make_layers, partition_method=method))
        found[f"{method}, stock"] = lambda method=method: seen(make(make_layers, Stock, partition_method=method))
    for cut in range(1, len(make_layers())):
        parts = [0, cut, len(make_layers())]
        found[f"by hand {parts}"] = lambda parts=parts: trained(by_hand(make_layers, parts), make_layers)
    return found


def attempt(case: Callable[[], Result]) -> Result:
    try:
        return case()
    except Exception as error:  # noqa: BLE001 - which one it is, the test says
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    folder = Path(sys.argv[1])
    init_distributed()
    results = {name: attempt(case) for name, case in cases(folder).items()}
    (folder / f"{RANK}.json").write_text(json.dumps(results, default=int), encoding="utf-8")
    torch.distributed.barrier()  # as in train.py
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
