"""One process of a job that loads models in many ways, and writes what they gave.

    torchrun --nproc-per-node 4 api_cases.py MODELS RESULTS

Every rank writes ``RESULTS/RANK.json``: a result per case; an exception is a result too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lp_plugin import Cluster, ModelProfile, Plan, Workload
from lp_plugin.integrations.transformers import load
from lp_plugin.solver.solve import evaluate

TEXTS = ["", "x", "The rabbit-hole went straight on like a tunnel for some way.", "Alice", "down, down, down"]
PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [60, 61], [7, 7, 7, 7]]
NEW_TOKENS = 6
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
SEED = 11
Result = dict[str, Any]


def plan_of(model: Path, boundaries: tuple[int, ...], *, sublayer: bool = False, tensor_parallel: int = 1) -> Plan:
    """These boundaries, for rows of 64 tokens."""
    profile = ModelProfile.from_config(model, granularity="sublayer" if sublayer else "layer")
    cluster = Cluster.homogeneous("cpu", (len(boundaries) - 1) * tensor_parallel).grouped(tensor_parallel)
    workload = Workload(batch=8, sequence=64, micro_batch=2)
    return evaluate(profile.sharded(tensor_parallel), cluster, workload, boundaries)


def decoder(model: Path, saved: Path | None = None, **options: Any) -> Result:
    """All that a decoder can do."""
    heard: dict[int, list[int]] = {}
    with load(model, **options) as loaded:
        result = {
            "boundaries": loaded.plan.boundaries,
            "scores": loaded.score(TEXTS),
            "embeddings": loaded.embed(TEXTS).tolist(),
            "scores again": loaded.score(TEXTS[:2]),  # rows of the last shape, without the mask that embeddings need
            "greedy": loaded.generate(
                PROMPTS,
                max_new_tokens=NEW_TOKENS,
                on_tokens=lambda index, tokens: heard.setdefault(index, []).extend(tokens),
            ),
            "sampled": loaded.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=SEED, **SAMPLING),
        }
        if saved is not None:
            loaded.save(saved)
    return result | {"heard": sorted(heard.items())}


def encoder(model: Path, **options: Any) -> Result:
    with load(model, **options) as loaded:
        return {"boundaries": loaded.plan.boundaries, "embeddings": loaded.embed(TEXTS).tolist()}


def cases(models: Path, results: Path) -> dict[str, Callable[[], Result]]:
    llama, bert = models / "llama", models / "bert"
    halves = plan_of(llama, (0, 2, 4, 5, 9), sublayer=True)
    shared = plan_of(llama, (0, 3, 6), tensor_parallel=2)
    timed = {"train_micro_batch_size_per_gpu": 2, "lp_plugin": {"method": "profile", "sequence": 32}}
    return {
        "stages": lambda: decoder(llama, plan=plan_of(llama, (0, 1, 3, 5, 6))),
        "halves": lambda: decoder(llama, plan=halves),
        "tensor-parallel": lambda: decoder(llama, results / "saved", plan=shared),
        "timed, tensor-parallel": lambda: decoder(llama, config=timed, tensor_parallel=2),
        "replicas": lambda: decoder(llama, data_parallel=2),
        "encoder": lambda: encoder(bert),
        "other number of stages": lambda: decoder(llama, num_stages=3),
        "not a divisor": lambda: decoder(llama, tensor_parallel=3),
        "heads that can't be shared": lambda: decoder(llama, tensor_parallel=4),
        "an option, no prompt for most": lambda: one_prompt(llama, temperature=-1.0),
        "no plan of transformers": lambda: encoder(bert, tensor_parallel=2),
    }


def one_prompt(model: Path, **options: Any) -> Result:
    """Less than a prompt for each replica, and an option that transformers refuses."""
    with load(model, data_parallel=4) as loaded:
        return {"made": loaded.generate([[1]], max_new_tokens=1, do_sample=True, **options)}


def attempt(case: Callable[[], Result]) -> Result:
    try:
        return case()
    except Exception as error:  # noqa: BLE001 - which one it is, the test says
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    models, results = Path(sys.argv[1]), Path(sys.argv[2])
    found = {name: attempt(case) for name, case in cases(models, results).items()}
    (results / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
