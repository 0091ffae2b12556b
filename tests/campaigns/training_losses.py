"""200 steps of training under several partitions, beside transformers' own model in a plain loop.

    torchrun --nproc-per-node 4 tests/campaigns/training_losses.py --output docs/results/training

The cases are those of ``tests/integrations/test_training.py``, longer: small llama models, tied and not, four
micro-batches a step. ``losses.json`` gets every curve, ``losses.md`` how far each is from the plain loop's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from families import make_config, make_model, training_micro_batches
from plain_training import plain_losses
from training_cases import CHECKPOINTED, RANK, ZERO, by_hand, losses, make, start, trained

from lp_plugin.integrations.deepspeed.checkpoints import resume
from lp_plugin.integrations.deepspeed.engine import init_distributed

STEPS = 200


def interrupted(model: Path, folder: Path) -> list[float]:
    """Four stages for the first half, saved; two stages for the second."""
    first = start(make(model, 4, **ZERO), **ZERO)
    found = trained(first, STEPS // 2)
    first.save_checkpoint(str(folder))
    engine = start(make(model, 2, **ZERO), **ZERO)
    assert resume(engine, folder) == STEPS // 2
    return found + trained(engine, STEPS // 2, STEPS // 2)


def curves(model: Path, scratch: Path) -> dict[str, list[float]]:
    zero = {"zero_optimization": ZERO["zero_optimization"]}
    runs: dict[str, dict[str, Any]] = {
        "4 stages, cache-aware": losses(model, 4, STEPS),
        "4 stages, by hand": losses(model, 4, STEPS, plan=by_hand(model, [0, 1, 2, 6, 7])),
        "2 stages, cache-aware": losses(model, 2, STEPS),
        "2 stages, by hand": losses(model, 2, STEPS, plan=by_hand(model, [0, 5, 7])),
        "2 stages, cache-aware, ZeRO-1, checkpointed": losses(model, 2, STEPS, **zero, **CHECKPOINTED),
    }
    found = {f"{name} {run['parts']}": run["losses"] for name, run in runs.items()}
    return found | {"4 stages, then 2 from step 101 on": interrupted(model, scratch)}


def table(found: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| model | run | first loss | last loss | furthest from the plain loop |", "|---|---|---|---|---|"]
    for model, runs in found.items():
        expected = runs["plain loop"]
        for name, run in runs.items():
            most = max(abs(one - other) for one, other in zip(run, expected, strict=True))
            lines.append(f"| {model} | {name} | {run[0]:.6f} | {run[-1]:.6f} | {most:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    init_distributed()
    scratch = folder / "models"
    if RANK == 0:
        for name, tied in (("untied", False), ("tied", True)):
            make_model(make_config("llama", 4, tie_word_embeddings=tied)).save_pretrained(scratch / name)
    torch.distributed.barrier()
    found = {name: curves(scratch / name, scratch / f"{name}-checkpoint") for name in ("untied", "tied")}
    if RANK == 0:
        found = {
            name: {"plain loop": plain_losses(scratch / name, training_micro_batches(), steps=STEPS, accumulation=4)}
            | runs
            for name, runs in found.items()
        }
        (folder / "losses.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / "losses.md").write_text(table(found), encoding="utf-8")
        shutil.rmtree(scratch)
        print(table(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
