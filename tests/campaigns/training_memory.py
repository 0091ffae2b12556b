"""Memory of every stage in training, predicted and measured; and a split by parameters that fails where ours fits.

    torchrun --nproc-per-node 2 tests/campaigns/training_memory.py --output docs/results/training

On GPUs the caching allocator counts, on CPUs the profiler; models are larger on GPUs. ``memory.json`` gets a row per
configuration and stage, ``memory.md`` the same as a table. The last rows train one model on devices of less memory:
what DeepSpeed's ``parameters`` needs is more, what ``cache-aware`` needs is less.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # else pieces too small to use count

import deepspeed
import torch

from lp_plugin import Cluster
from lp_plugin.hardware import Device
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet
from lp_plugin.integrations.transformers.training import HFTrainingModule
from lp_plugin.measure.peak import PeakMemory

CUDA = torch.cuda.is_available()
MICRO_BATCHES = 8
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "float32"}
SIZES = (
    {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 22}
    | {"vocab_size": 32000, "max_position_embeddings": 8192}
    if CUDA
    else {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 8}
    | {"vocab_size": 1000, "max_position_embeddings": 2048}
)
ROWS, TOKENS = (2, 2048) if CUDA else (2, 256)
CROWDED = (8, 4096) if CUDA else (4, 512)
"""Rows and tokens where the split by parameters doesn't fit: activations are as large as all that stays."""
ZERO = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**7 if CUDA else 10**5}}
BFLOAT16 = {"bf16": {"enabled": True}}
FLOAT32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
CHECKPOINTED = {"pipeline": {"activation_checkpoint_interval": 1}}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "float32": ({}, False),
    "float32, checkpointed": (CHECKPOINTED, False),
    "float32, ZeRO-1": (ZERO, False),
    "float32, tied": ({}, True),
    "bfloat16": (BFLOAT16, False),
    "bfloat16, ZeRO-1": (BFLOAT16 | ZERO, False),
    "bfloat16, ZeRO-1, float32 gradients": (BFLOAT16 | ZERO | FLOAT32_GRADIENTS, False),
    "bfloat16, ZeRO-1, float32 gradients, checkpointed": (BFLOAT16 | ZERO | FLOAT32_GRADIENTS | CHECKPOINTED, False),
    "bfloat16, ZeRO-1, float32 gradients, tied": (BFLOAT16 | ZERO | FLOAT32_GRADIENTS, True),
}
"""Name -> what the configuration says beside the optimizer, and whether embeddings are tied."""
Row = dict[str, Any]


def configuration(rows: int, changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
    } | changes


def write_model(folder: Path, *, tied: bool) -> Path:
    """A configuration without weights."""
    model = folder / ("tied" if tied else "untied")
    if torch.distributed.get_rank() == 0:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(LLAMA | SIZES | {"tie_word_embeddings": tied}), encoding="utf-8")
    torch.distributed.barrier()
    return model


def batches(rows: int, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(0))
    while True:
        yield ids, ids


def measured(name: str, model: Path, changes: dict[str, Any], shape: tuple[int, int], **options: Any) -> list[Row]:
    """A row per stage, of the second step: moments are there by then."""
    rows, tokens = shape
    config = configuration(rows, changes)
    stages = torch.distributed.get_world_size()
    with PeakMemory() as peak:
        with quiet():
            module = HFTrainingModule(model, num_stages=stages, config=config, sequence=tokens, seed=0, **options)
            engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        engine.train_batch(batches(*shape))
        peak.start()
        engine.train_batch(batches(*shape))
    stage = module.lp_plan.stages[module.stage_id]
    row = {
        "case": name,
        "stage": module.stage_id,
        "layers": [stage.start, stage.stop],
        "predicted_bytes": stage.memory_bytes,
        "measured_bytes": peak.num_bytes,
        "predicted_of_measured": round(stage.memory_bytes / peak.num_bytes, 4),
    }
    found: list[Row] = [row] * stages
    torch.distributed.all_gather_object(found, row)
    engine.destroy()
    del engine, module
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return found


def needed(plan: Any) -> int:
    """Of the fullest stage."""
    return max(stage.memory_bytes for stage in plan.stages)


def limited(device: Device, num_bytes: int) -> Device:
    last = dataclasses.replace(device.memory, capacity_bytes=num_bytes, usable_fraction=1.0)
    return dataclasses.replace(device, tiers=(*device.tiers[:-1], last))


def crowded(model: Path, folder: Path) -> list[Row]:
    """The same model by parameters and by us, on devices with memory for one of them."""
    changes = BFLOAT16 | ZERO | FLOAT32_GRADIENTS
    common = {"num_stages": torch.distributed.get_world_size(), "config": configuration(CROWDED[0], changes)}
    common |= {"sequence": CROWDED[1], "seed": 0}
    section = {"lp_plugin": {"objective": "memory"}}
    with quiet():
        theirs = HFTrainingModule(model, partition_method="parameters", **common)
        ours = HFTrainingModule(model, **common | {"config": common["config"] | section})
    parts, limit = theirs.parts, (needed(theirs.lp_plan) + needed(ours.lp_plan)) // 2
    devices = tuple(limited(device, limit) for device in ours.lp_cluster.devices)
    cluster = Cluster(devices=devices, links=ours.lp_cluster.links)
    if torch.distributed.get_rank() == 0:
        print(f"devices of {limit:,} bytes: parameters {parts} predicted {needed(theirs.lp_plan):,}", flush=True)
    del theirs, ours
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties().total_memory)
    rows = measured("crowded, cache-aware", model, changes | section, CROWDED, cluster=cluster)
    save(folder, [row | {"limit_bytes": limit} for row in rows])
    try:
        rows = measured("crowded, parameters", model, changes, CROWDED, partition_method="parameters", cluster=cluster)
    except torch.OutOfMemoryError as error:
        row = {"case": "crowded, parameters", "stage": torch.distributed.get_rank(), "error": str(error)[:300]}
        save(folder, [row | {"limit_bytes": limit, "boundaries": parts}], here=True)
        (folder / "out-of-memory").touch()
        time.sleep(60)  # `watch` ends the process
    return [row | {"limit_bytes": limit} for row in rows]


def save(folder: Path, rows: list[Row], *, here: bool = False) -> None:
    """Adds rows to ``memory.json``, and makes the table again."""
    if torch.distributed.get_rank() and not here:
        return
    file = folder / "memory.json"
    known: list[Row] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    known += rows
    if not here:
        for row in rows:
            print(*row.values(), flush=True)
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    lines = ["| case | stage | layers | predicted | measured | ratio |", "|---|---|---|---|---|---|"]
    for row in known:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['stage']} | {row['boundaries']} | | out of memory | |")
            continue
        sizes = (f"{row[key] / 1e9:.3f} GB" for key in ("predicted_bytes", "measured_bytes"))
        columns = (row["case"], row["stage"], row["layers"], *sizes, row["predicted_of_measured"])
        lines.append(f"| {' | '.join(map(str, columns))} |")
    (folder / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def watch(folder: Path) -> None:
    """Ends this process when another one has run out of memory: it would wait for its messages forever."""
    while not (folder / "out-of-memory").exists():
        time.sleep(0.5)
    time.sleep(2)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    init_distributed()
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("memory.json", "memory.md", "out-of-memory"):
            (folder / name).unlink(missing_ok=True)
    torch.distributed.barrier()
    threading.Thread(target=watch, args=(folder,), daemon=True).start()
    for name, (changes, tied) in CASES.items():
        save(folder, measured(name, write_model(folder / "models", tied=tied), changes, (ROWS, TOKENS)))
    save(folder, crowded(write_model(folder / "models", tied=False), folder))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
