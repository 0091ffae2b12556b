"""A training that keeps its losses, one line per step, and goes on from the newest checkpoint when started again.

Started by `fault_jobs`, and on two hosts by `tests/job/test_hosts.py`, through ``lp-plugin launch``.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch

from lp_plugin.files import write_atomically
from lp_plugin.integrations.deepspeed.checkpoints import resume
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet
from lp_plugin.integrations.transformers.training import HFTrainingModule
from lp_plugin.job.place import at

TOKENS = 32


def rows(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A step's micro-batches, the same whenever they are taken."""
    generator = torch.Generator().manual_seed(step)
    while True:
        tokens = torch.randint(256, (2, TOKENS), generator=generator)
        yield tokens, tokens


def main() -> None:
    """Trains; rank 0 keeps the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--deepspeed_config", type=Path)
    given = parser.parse_args()
    init_distributed()
    with quiet():
        stages = torch.distributed.get_world_size()
        module = HFTrainingModule(given.model, num_stages=stages, config=given.deepspeed_config, sequence=TOKENS)
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=module.parameters(), config=str(given.deepspeed_config)
        )
    first = resume(engine, given.output / "checkpoints")
    losses = given.output / "losses.jsonl"
    known = losses.read_text(encoding="utf-8").splitlines()[:first] if losses.exists() else []
    for step in range(first, given.steps):
        known.append(json.dumps({"id": step, "loss": float(engine.train_batch(rows(step)))}))
        if engine.global_rank == 0:
            write_atomically(losses, "".join(f"{line}\n" for line in known))
        if step % 2:
            with quiet():
                engine.save_checkpoint(str(given.output / "checkpoints"))
    at("drain")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
