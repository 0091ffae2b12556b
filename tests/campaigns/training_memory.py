"""Memory of every stage in training, predicted and measured; and a split by parameters that fails where ours fits.

    python tests/campaigns/training_memory.py --stages 2 --output docs/results/training

On GPUs the caching allocator counts, on CPUs the profiler; models are larger on GPUs. Every case has processes of its
own. ``memory.json`` gets a row per configuration and stage, ``memory.md`` the same as a table. The last cases train one
model on devices of less memory: what DeepSpeed's ``parameters`` needs is more, what ``cache-aware`` needs is less.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # else pieces too small to use count

import deepspeed
import torch

from lp_plugin import Cluster
from lp_plugin.files import write_atomically
from lp_plugin.hardware import Device
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet
from lp_plugin.integrations.transformers.training import HFTrainingModule
from lp_plugin.job.launch import launch_local
from lp_plugin.job.ranks import gather
from lp_plugin.job.watch.verdict import own_versions
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
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA | SIZES | {"tie_word_embeddings": tied}), encoding="utf-8")
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
    return list(gather(row))


def needed(plan: Any) -> int:
    """Of the fullest stage."""
    return max(stage.memory_bytes for stage in plan.stages)


def limited(device: Device, num_bytes: int) -> Device:
    last = dataclasses.replace(device.memory, capacity_bytes=num_bytes, usable_fraction=1.0)
    return dataclasses.replace(device, tiers=(*device.tiers[:-1], last))


def crowded(model: Path, method: str) -> list[Row]:
    """A model by parameters or by us, on devices with memory for one of them."""
    changes = BFLOAT16 | ZERO | FLOAT32_GRADIENTS
    section = {"lp_plugin": {"objective": "memory"}}
    common = {"num_stages": torch.distributed.get_world_size(), "sequence": CROWDED[1], "seed": 0}
    with quiet():
        theirs = HFTrainingModule(
            model, partition_method="parameters", config=configuration(CROWDED[0], changes), **common
        )
        ours = HFTrainingModule(model, config=configuration(CROWDED[0], changes | section), **common)
    limit = (needed(theirs.lp_plan) + needed(ours.lp_plan)) // 2
    devices = tuple(limited(device, limit) for device in ours.lp_cluster.devices)
    cluster = Cluster(devices=devices, links=ours.lp_cluster.links)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"limit_bytes": limit, "boundaries": theirs.parts if method == "parameters" else ours.parts}))
    del theirs, ours
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties().total_memory)
    if method == "parameters":
        return measured(f"crowded, {method}", model, changes, CROWDED, partition_method=method, cluster=cluster)
    return measured(f"crowded, {method}", model, changes | section, CROWDED, cluster=cluster)


def rank_of(name: str, folder: Path) -> list[Row]:
    """One case's part of one rank; rank 0 gives the rows."""
    init_distributed()
    if name.startswith("crowded"):
        return crowded(folder / "untied", name.partition(", ")[2])
    changes, tied = CASES[name]
    return measured(name, folder / ("tied" if tied else "untied"), changes, (ROWS, TOKENS))


def run_case(name: str, stages: int, folder: Path) -> list[Row]:
    """The case's rows, from processes of its own; of one that ends with an error, what it said."""
    command = [sys.executable, __file__, "--stages", str(stages), "--output", str(folder), "--case", name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    printed = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith(('{"limit', "[{"))]
    limit = next((each for each in printed if isinstance(each, dict)), {})
    rows = next((each for each in printed if isinstance(each, list)), None)
    if rows is None:
        said = [line for line in ended.stderr.splitlines() if line.startswith("error")]
        rows = [{"case": name, "exit_code": ended.returncode, "error": (said or [ended.stderr[-500:]])[0]}]
    return [limit | row for row in rows]


def save(folder: Path, rows: list[Row], stages: int) -> None:
    """Writes ``memory.json`` and the table."""
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    content = {
        "command": f"python tests/campaigns/training_memory.py --stages {stages} --output docs/results/training",
        "device": device,
        "stages": stages,
        "versions": own_versions(),
        "rows": rows,
    }
    write_atomically(folder / "memory.json", json.dumps(content, indent=1) + "\n")
    versions = ", ".join(f"{name} {value}" for name, value in own_versions().items())
    lines = [
        f"# Memory in training, {stages} x {device}",
        "",
        f"`{content['command']}`; {versions}; {MICRO_BATCHES} micro-batches of {ROWS} x {TOKENS} tokens (crowded:",
        f"{CROWDED[0]} x {CROWDED[1]}); the most that the allocator held in the second step.",
        "",
        "| case | stage | layers | predicted | measured | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | | {row.get('boundaries', '')} | | {row['error']} | |")
            continue
        sizes = (f"{row[key] / 1e9:.3f} GB" for key in ("predicted_bytes", "measured_bytes"))
        columns = (row["case"], row["stage"], row["layers"], *sizes, row["predicted_of_measured"])
        lines.append(f"| {' | '.join(map(str, columns))} |")
    limits = {row["limit_bytes"] for row in rows if "limit_bytes" in row}
    lines += ["", *(f"Crowded devices have {limit / 1e9:.3f} GB each." for limit in limits)]
    write_atomically(folder / "memory.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    names = (*CASES, "crowded, cache-aware", "crowded, parameters")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="others stay as the file has them")
    parser.add_argument("--case", help="run one alone, for this script itself")
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(launch_local(given.stages, rank_of, given.case, given.output)), flush=True)
        return
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "memory.json"
    known = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    found: list[Row] = [row for row in known if row["case"] not in given.cases]
    with tempfile.TemporaryDirectory() as folder:
        for tied in (False, True):
            write_model(Path(folder), tied=tied)
        for name in given.cases:
            rows = run_case(name, given.stages, Path(folder))
            found += rows
            for row in rows:
                print(*row.values(), flush=True)
            save(given.output, sorted(found, key=lambda row: names.index(row["case"])), given.stages)


if __name__ == "__main__":
    main()
