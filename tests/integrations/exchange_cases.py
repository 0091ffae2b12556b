"""One process of a job of two: other engines run our partitions; their logits are compared with the whole model's.

    torchrun --nproc-per-node 2 exchange_cases.py FOLDER

``FOLDER/0.json`` and ``FOLDER/1.json`` hold what each rank saw.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from families import make_batch, make_config, make_model
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import lp_plugin.integrations.deepspeed
from lp_plugin import Cluster, LpPluginError, ModelProfile, Plan, Workload, save_plan
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet
from lp_plugin.integrations.formats import export_partition, import_partition
from lp_plugin.integrations.torch_pipelining import stage_module
from lp_plugin.integrations.transformers.native_pp import native_split
from lp_plugin.solver.solve import evaluate

RANK = int(os.environ["RANK"])
BLOCKS = 5
MICRO_BATCHES = 3
Result = dict[str, Any]


def planned(model: PreTrainedModel, boundaries: tuple[int, ...]) -> Plan:
    profile = ModelProfile.from_config(model.config.to_dict(), dtype="float32")
    cluster = Cluster.homogeneous("cpu", len(boundaries) - 1)
    return evaluate(profile, cluster, Workload(batch=1, sequence=4, micro_batch=1), boundaries)


def reference(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def gpipe(family: str, boundaries: tuple[int, ...]) -> Result:
    """`ScheduleGPipe` over two uneven stages."""
    model = make_model(make_config(family, BLOCKS))
    plan = planned(model, boundaries)
    text = export_partition(plan, "torch")
    again = import_partition(text, plan.layers, "torch", num_stages=2, model_type=model.config.model_type)
    ids, _ = make_batch("none", 1)
    part = stage_module(model, again, RANK)
    schedule = ScheduleGPipe(PipelineStage(part, RANK, 2, torch.device("cpu")), MICRO_BATCHES)
    with torch.no_grad():
        output = schedule.step(*([ids] if RANK == 0 else []))
    mine = tuple(f"{name}." for name in json.loads(text)[RANK])
    named = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(mine)]
    held = [part.checkpoint_name(name) for name, _ in part.model.named_parameters(remove_duplicate=False)]
    return {
        "boundaries": list(again),
        "own tensors": sorted(held) == sorted(named),
        "difference": float((output - reference(model, ids)).abs().max()) if RANK == 1 else 0.0,
    }


def native(folder: Path, boundaries: tuple[int, ...]) -> Result:
    """transformers' own pipeline parallelism with our split."""
    model = make_model(make_config("llama", BLOCKS))
    if RANK == 0:
        model.save_pretrained(folder / "model")
    torch.distributed.barrier()
    with native_split(planned(model, boundaries)):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder / "model", distributed_config=DistributedConfig(pp_size=2), dtype=torch.float32
        ).eval()
    ids, _ = make_batch("none", 1)
    with torch.no_grad():
        output = loaded(ids, use_cache=False).logits
    generated = loaded.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    layers = loaded.model.layers
    return {
        "blocks": [index for index in range(BLOCKS) if any(True for _ in layers[index].parameters())],
        "difference": float((output - reference(model, ids)).abs().max()),
        "generated": torch.equal(generated, expected),
    }


def native_refusals(folder: Path) -> Result:
    """A plan of another number of stages, and of another model."""
    three, other = make_model(make_config("llama", BLOCKS)), make_model(make_config("llama", BLOCKS + 1))
    messages = {}
    for name, plan in (("stages", planned(three, (0, 2, 3, 8))), ("blocks", planned(other, (0, 2, 9)))):
        try:
            with native_split(plan):
                AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(pp_size=2))
        except LpPluginError as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def deepspeed_parts(folder: Path, parts: list[int]) -> Result:
    """A PipelineModule built with parts that were written, read and saved as a plan."""
    profile = ModelProfile.from_costs([1.0] * parts[-1])
    cluster, workload = Cluster.homogeneous("cpu", 2), Workload(batch=1, sequence=1, micro_batch=1)
    boundaries = import_partition(json.dumps(parts), profile.layers, "deepspeed", num_stages=2)
    plan = evaluate(profile, cluster, workload, boundaries)
    path = folder / f"plan{RANK}.json"
    save_plan(plan, path)
    specs = [LayerSpec(torch.nn.Linear, 4, 4) for _ in range(parts[-1])]
    with quiet():
        module = PipelineModule(specs, num_stages=2, partition_method=f"plan:{path}")
    return {
        "exported": export_partition(plan, "deepspeed"),
        "parts": list(module.parts),
        "local": [module._local_start, module._local_stop],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    init_distributed()
    assert lp_plugin.integrations.deepspeed.PipelineModule  # its import added the partition methods
    results = {
        "gpipe llama": gpipe("llama", (0, 2, 8)),
        "gpipe llama-tied": gpipe("llama-tied", (0, 6, 8)),
        "gpipe gpt2": gpipe("gpt2", (0, 7, 8)),
        "native": native(folder, (0, 2, 8)),
        "native refusals": native_refusals(folder),
        "deepspeed": deepspeed_parts(folder, [0, 5, 7]),
    }
    (folder / f"{RANK}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
