"""Hugging Face decoders cut into stages and run by DeepSpeed over Gloo: the same logits bit for bit.

The file is also the script that runs on every rank: ``torchrun ... test_transformers.py MODELS RESULTS`` sends
batches through DeepSpeed's ``eval_batch`` for every family and cut, and writes what the last rank compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    CUTS,
    FAMILIES,
    MICRO_BATCHES,
    PADDINGS,
    ROWS,
    TOKENS,
    make_batch,
    make_config,
    make_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

HALF_CUTS = {2: ((0, 4, 13), (0, 7, 13)), 4: ((0, 2, 5, 10, 13), (0, 1, 4, 11, 13))}
"""The same with attention and MLP apart, 13 layers: stages that begin or end with half a block."""
WHOLE = ("falcon", "gpt_neox")
"""Families whose blocks can't be cut: attention and MLP read the same input."""


def cuts_of(family: str, world: int) -> tuple[tuple[int, ...], ...]:
    """Boundaries for a family: of whole blocks, and of halves; each cut is met by several families."""
    number = list(FAMILIES).index(family)
    whole, half = CUTS[world][number % len(CUTS[world])], HALF_CUTS[world][number % len(HALF_CUTS[world])]
    if family in WHOLE:
        return (whole,)
    return (
        (whole,) if (number + world // 4) % 2 else (half,)
    )  # families take turns, others with 4 processes than with 2


# --- every rank --------------------------------------------------------------------------------------------------


def rank_main(models: Path, results: Path) -> None:
    """All families, some cuts of each; the last rank writes one entry per family, cut and padding."""
    import lp_plugin.integrations.deepspeed  # noqa: F401
    from lp_plugin import Cluster, ModelProfile, Workload
    from lp_plugin.integrations.deepspeed.engine import build_engine, init_distributed, quiet
    from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
    from lp_plugin.solver.solve import evaluate

    init_distributed()
    world = torch.distributed.get_world_size()
    workload = Workload(batch=ROWS * MICRO_BATCHES, sequence=TOKENS, micro_batch=ROWS)
    entries = []
    for family in FAMILIES:
        whole = AutoModelForCausalLM.from_pretrained(models / family).eval()
        for cut in cuts_of(family, world):
            granularity = "layer" if cut[-1] == CUTS[world][0][-1] else "sublayer"
            profile = ModelProfile.from_config(models / family, granularity=granularity)
            plan = evaluate(profile, Cluster.homogeneous("cpu", world), workload, cut)
            with quiet():
                module = HFPipelineModule(
                    models / family, num_stages=world, workload=workload, plan=plan, loss_fn=lambda logits, _: logits
                )
            engine = build_engine(module, micro_batch=ROWS, num_micro_batches=MICRO_BATCHES, dtype="float32")
            engine.module.eval()
            for padding in PADDINGS:
                batches = [make_batch(padding, number) for number in range(MICRO_BATCHES)]
                outputs = pipelined(engine, batches)
                if engine.is_last_stage():
                    entries.append(
                        {"family": family, "cut": cut, "padding": padding} | compared(whole, batches, outputs)
                    )
    if torch.distributed.get_rank() == world - 1:
        results.write_text(json.dumps(entries), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def pipelined(engine: Any, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> list[torch.Tensor]:
    engine.reset_activation_shape()
    samples = iter([((ids if mask is None else (ids, mask)), torch.zeros(1)) for ids, mask in batches])
    return engine.eval_batch(
        samples, compute_loss=True, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
    )


def compared(
    whole: PreTrainedModel, batches: list[tuple[torch.Tensor, torch.Tensor | None]], outputs: list[torch.Tensor]
) -> dict[str, Any]:
    with torch.no_grad():
        expected = [whole(ids, attention_mask=mask, use_cache=False).logits for ids, mask in batches]
    equal = len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
    difference = max(float((left - right).abs().max()) for left, right in zip(outputs, expected, strict=True))
    return {"equal": equal, "difference": difference, "distinct": not torch.equal(outputs[0], outputs[1])}


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_model(make_config(family, 5)).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module", params=sorted(CUTS), ids=lambda world: f"{world} processes")
def launched(
    request: pytest.FixtureRequest, saved_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    """World size, and what its last rank compared."""
    results = tmp_path_factory.mktemp("results") / "results.json"
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}")
    finished = subprocess.run(
        [sys.executable, *launcher, __file__, str(saved_models), str(results)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return request.param, json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelined_logits_are_the_whole_models(launched: tuple[int, list[dict[str, Any]]], family: str) -> None:
    world, entries = launched
    mine = [entry for entry in entries if entry["family"] == family]
    assert len(mine) == len(cuts_of(family, world)) * len(PADDINGS)
    assert [entry for entry in mine if not entry["equal"]] == []
    assert all(entry["distinct"] for entry in mine)  # else equal logits would prove little


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
