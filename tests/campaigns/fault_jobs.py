"""The jobs that faults are injected into: commands as a user gives them, on a tiny model with random weights."""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import run_ranks

# everything that ranks import, so that forked ones need not; nothing here starts a thread or a GPU's context
import lp_plugin.generate.worker
import lp_plugin.integrations.transformers.training
import lp_plugin.score.worker  # noqa: F401
from lp_plugin import Cluster, ModelProfile, Workload, cli, make_plan, save_plan

__all__ = ["JOBS", "Job"]

ROOT = Path(__file__).parents[2]
_TEXT = (ROOT / "examples" / "text" / "alice.txt").read_text(encoding="utf-8")


@functools.cache
def shared() -> Path:
    """A folder with the model, the texts and the plans; gone when the script ends."""
    folder = Path(tempfile.mkdtemp(prefix="fault-jobs-"))
    atexit.register(shutil.rmtree, folder)
    sys.path.insert(0, str(ROOT / "examples" / "dense16"))
    small = json.loads((ROOT / "examples" / "dense16" / "small" / "config.json").read_text(encoding="utf-8"))
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    (folder / "config").mkdir()
    config = small | sizes | {"num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "config" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    importlib.import_module("make_model").main([str(folder / "config"), str(folder / "model")])
    for name, count, length in (("documents", 40, 120), ("prompts", 12, 40)):
        records = ({"id": f"{name} {at}", "text": _TEXT[at * 50 : at * 50 + length + at % 7]} for at in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return folder


def plan(phase: Any, ranks: int) -> Path:
    """A plan for the model, so that jobs need not time its layers."""
    file = shared() / f"{phase}-{ranks}.json"
    if not file.exists():
        workload = Workload(phase=phase, batch=8, sequence=128, micro_batch=2)
        profile = ModelProfile.from_config(shared() / "model")
        save_plan(make_plan(profile, Cluster.homogeneous("h200", ranks), workload), file)
    return file


class Job:
    """A command that can be started again.

    Args:
        arguments: Of ``lp-plugin``, for a folder, a number of ranks and a timeout in seconds.
        output: Name of its output in the folder.
        same: Whether two results of the same document are the same.
        without: Places that the first and the last rank never come to.
    """

    def __init__(
        self,
        arguments: Callable[[Path, int, float], list[Any]],
        output: str,
        same: Callable[[dict[str, Any], dict[str, Any]], bool],
        without: tuple[str | None, str | None],
    ) -> None:
        self._arguments, self._output, self._same, self._without = arguments, output, same, without

    def run(self, folder: Path, timeout: float) -> None:
        """One rank, in a launcher's environment; ends by SystemExit."""
        ranks = int(os.environ["WORLD_SIZE"])
        sys.argv = ["lp-plugin", *map(str, self._arguments(folder, ranks, timeout))]
        cli.main()

    def reference(self, ranks: int, timeout: float) -> list[dict[str, Any]]:
        """The output of a run without a fault."""
        plan("prefill", ranks)  # made once, not by every rank
        plan("decode", ranks)
        self._arguments(shared(), ranks, timeout)
        with tempfile.TemporaryDirectory() as folder:
            ended = run_ranks(ranks, lambda _: self.run(Path(folder), timeout))
            if any(each.code for each in ended):
                raise RuntimeError(f"the job itself fails: {[each.said for each in ended]}")
            return self._read(Path(folder))

    def differences(self, folder: Path, reference: list[dict[str, Any]]) -> list[str]:
        """What the output has twice, lacks, or has otherwise than the reference."""
        found = self._read(folder)
        names = [each["id"] for each in reference]
        if [each["id"] for each in found] != names:
            return [f"{len(found)} results of {len(names)}, or in another order"]
        unequal = [each["id"] for each, other in zip(found, reference, strict=True) if not self._same(each, other)]
        return [f"other results: {unequal[:3]}"] if unequal else []

    def impossible(self, ranks: int) -> set[tuple[str, int]]:
        """Places that a rank never comes to."""
        first, last = self._without
        return {(place, rank) for place, rank in ((first, 0), (last, ranks - 1)) if place is not None}

    def _read(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / self._output).read_text(encoding="utf-8").splitlines()]


def _score(folder: Path, ranks: int, timeout: float) -> list[Any]:
    files = ("--input", shared() / "documents.jsonl", "--output", folder / "scores.jsonl")
    return [
        "run",
        shared() / "model",
        *files,
        "--plan",
        plan("prefill", ranks),
        "--micro-batch",
        2,
        "--timeout",
        timeout,
    ]


def _generate(folder: Path, ranks: int, timeout: float) -> list[Any]:
    files = ("--prompts", shared() / "prompts.jsonl", "--output", folder / "texts.jsonl")
    new = ("--max-new-tokens", 6, "--micro-batch", 2, "--timeout", timeout)
    return ["generate", shared() / "model", *files, "--plan", plan("decode", ranks), *new]


def _train(folder: Path, ranks: int, timeout: float) -> list[Any]:
    del ranks
    config = shared() / "ds.json"
    content = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_print": 10**6,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},
        "checkpoint": {"load_universal": True},
        "lp_plugin": {"method": "cache-aware", "timeout": timeout},
    }
    if not config.exists():
        config.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).with_name("fault_training.py")
    return ["launch", script, shared() / "model", folder, "--deepspeed_config", config]


JOBS = {
    "score": Job(
        _score,
        "scores.jsonl",
        lambda one, other: math.isclose(one["log_likelihood"], other["log_likelihood"], rel_tol=1e-5),
        ("receive", "send"),
    ),
    "generate": Job(_generate, "texts.jsonl", lambda one, other: one == other, (None, None)),
    "train": Job(
        _train,
        "losses.jsonl",
        lambda one, other: math.isclose(one["loss"], other["loss"], rel_tol=1e-5),
        (None, None),
    ),
}
