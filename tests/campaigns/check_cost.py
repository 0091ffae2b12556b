"""What checking every boundary for values that are not finite costs, with and without in turns in one job.

    python tests/campaigns/check_cost.py --output docs/results/check-cost      # as many stages as GPUs; 2 on a CPU

Batches of `eval_batch` and `train_batch`, the same ones with the check and without, in pairs; ``results.json`` has
every time, ``README.md`` the ratios with a 95% bootstrap interval over the pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lp_plugin.bench.experiment.statistics import ratio_of_rates
from lp_plugin.files import write_atomically
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet, ready_for_batch
from lp_plugin.integrations.deepspeed.finite import FiniteCheck
from lp_plugin.integrations.transformers.training import HFTrainingModule
from lp_plugin.job.launch import launch_local
from lp_plugin.job.watch.verdict import own_versions
from lp_plugin.measure.layers import synchronize

CUDA = torch.cuda.is_available()
PAIRS, WARM_UP = 12, 3
SHAPE = (4, 2048) if CUDA else (2, 128)
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "float32"} | (
    {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 16}
    | {"vocab_size": 32000, "max_position_embeddings": 8192}
    if CUDA
    else {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 8}
    | {"vocab_size": 1000, "max_position_embeddings": 2048}
)
CONFIG = {
    "train_micro_batch_size_per_gpu": SHAPE[0],
    "gradient_accumulation_steps": 16,
    "steps_per_print": 10**9,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "torch_adam": True, "fused": True}},
    "bf16": {"enabled": CUDA},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**7},
}


def rank(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind of batch and whether it is checked; the slowest rank's, on all."""
    init_distributed()
    with quiet():
        stages = torch.distributed.get_world_size()
        module = HFTrainingModule(folder, num_stages=stages, config=CONFIG, sequence=SHAPE[1], seed=0)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=CONFIG)
    tokens = torch.randint(MODEL["vocab_size"], SHAPE, generator=torch.Generator().manual_seed(0))
    plain = dict(engine._INSTRUCTION_MAP)
    check = FiniteCheck(engine)
    checked = engine._INSTRUCTION_MAP

    def evaluate() -> None:
        ready_for_batch(engine)
        engine.eval_batch(itertools.repeat((tokens, tokens)), reduce_output=None, bcast_loss=False)

    def train() -> None:
        engine.train_batch(itertools.repeat((tokens, tokens)))

    found: dict[str, dict[str, list[float]]] = {}
    for name, run in (("eval_batch", evaluate), ("train_batch", train)):
        seconds = found.setdefault(name, {"plain": [], "checked": []})
        for pair in range(WARM_UP + PAIRS):
            for kind, table in (
                (("plain", plain), ("checked", checked)) if pair % 2 else (("checked", checked), ("plain", plain))
            ):
                engine._INSTRUCTION_MAP = table
                engine.lp_finite = check if kind == "checked" else None
                taken = _timed(run)
                if pair >= WARM_UP:
                    seconds[kind].append(taken)
    return found


def _timed(run: Any) -> float:
    torch.distributed.barrier()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    most = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device="cuda" if CUDA else "cpu")
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return float(most)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    stages = max(torch.cuda.device_count(), 2)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        found = launch_local(stages, rank, Path(folder))
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    command = "python tests/campaigns/check_cost.py --output docs/results/check-cost"
    content = {"command": command, "device": device, "stages": stages, "versions": own_versions(), "seconds": found}
    lines = [
        f"# Cost of checking boundaries, {stages} x {device}",
        "",
        f"`{command}`; hidden size {MODEL['hidden_size']}, {MODEL['num_hidden_layers']} blocks, 16 micro-batches of "
        f"{SHAPE[0]} x {SHAPE[1]} tokens, {PAIRS} pairs after {WARM_UP}; "
        + ", ".join(f"{name} {value}" for name, value in own_versions().items())
        + ".",
        "",
        "| batch | rate with the check over the rate without |",
        "|---|---|",
    ]
    for name, seconds in found.items():
        ratio = ratio_of_rates(seconds["checked"], seconds["plain"])
        lines.append(f"| {name} | {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] |")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "results.json", json.dumps(content, indent=1) + "\n")
    write_atomically(output / "README.md", "\n".join(lines) + "\n")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main()
