"""Every rank's part of `test_timing_turns.py`: counts how often each rank calls a layer that only rank 0 may time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from lp_plugin import ModelProfile
from lp_plugin.hardware.catalogue import load_device
from lp_plugin.integrations.deepspeed.engine import init_distributed
from lp_plugin.integrations.deepspeed.methods import timed_profile


def main() -> None:
    """Two distinct layers; rank 0 is the only one whose device is of the first stage's kind."""
    init_distributed()
    rank = dist.get_rank()
    calls = [0, 0]

    def build(index: int) -> Any:
        def layer(value: torch.Tensor) -> torch.Tensor:
            calls[index] += 1
            return value + 1

        return layer

    profile = timed_profile(
        ModelProfile.from_costs([0, 0]),
        [0, 1],
        build,
        torch.ones(2, 2),
        training=False,
        measured_on=load_device("cpu"),
        share=(0, 1) if rank == 0 else (1, 1),
    )
    seconds = [layer.seconds for layer in profile.layers]
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps({"calls": calls, "seconds": seconds}), encoding="utf-8")
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
