"""Long jobs over Gloo, and whether their memory stays flat.

    python tests/campaigns/soak.py --output docs/results/soak                     # 100,000 micro-batches of each job
    python tests/campaigns/soak.py --jobs score --micro-batches 2000 --output soak

Every rank of a job counts its micro-batches and writes down, twice a second, what it holds: anonymous memory, open
files, threads. A job is flat if from 20-40% of its micro-batches to 80-100% each rank gains less than 32 bytes per
micro-batch, no open file and no thread, and its results are complete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from fault_jobs import shared
from fault_training import rows
from forked import run_ranks
from rich.console import Console
from soak_page import write_page
from whereabouts import follow

from lp_plugin import cli
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet
from lp_plugin.integrations.transformers.training import HFTrainingModule

RANKS = 2
PASSES = {"score": {"forward"}, "generate": {"prefill", "decode"}, "train": {"forward"}}
"""What `lp_plugin.job.place` calls a micro-batch's pass through a stage."""
NEW_TOKENS = 20
MICRO_BATCH = 2
ACCUMULATION = 8
BYTES_PER_MICRO_BATCH = 32
EVERY_SECONDS = 0.5


class Observer:
    """Writes down what a process holds, from now on.

    Args:
        passes: What counts as a micro-batch's pass.
        file: Gets a line per look: micro-batches, bytes, open files, threads.
    """

    def __init__(self, passes: set[str], file: Path) -> None:
        self._passes, self._count = passes, 0
        self._stream = file.open("w", encoding="utf-8")
        follow(self._count_one)
        threading.Thread(target=self._run, daemon=True).start()

    def look(self) -> None:
        """Once."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        anonymous, shared_memory, threads = (
            int(found)
            for name in ("RssAnon", "RssShmem", "Threads")
            for found in re.findall(rf"{name}:\s+(\d+)", status)
        )
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - makes no object per file
        self._stream.write(f"{self._count} {(anonymous + shared_memory) * 1024} {files} {threads}\n")
        self._stream.flush()

    def _count_one(self, doing: str) -> None:
        self._count += doing in self._passes

    def _run(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY_SECONDS)


def documents(folder: Path, count: int) -> Path:
    """So many texts, of 4 to 60 characters."""
    file = folder / "documents.jsonl"
    text = (Path(__file__).parents[2] / "examples" / "text" / "alice.txt").read_text(encoding="utf-8")
    with file.open("w", encoding="utf-8") as stream:
        for at in range(count):
            begin = at * 7 % (len(text) - 60)
            stream.write(json.dumps({"id": at, "text": text[begin : begin + 4 + at % 57]}) + "\n")
    return file


def score(folder: Path, micro_batches: int) -> None:
    """``lp-plugin run``."""
    _command("run", folder, "--input", folder / "documents.jsonl", "--micro-batch", MICRO_BATCH)
    del micro_batches


def generate(folder: Path, micro_batches: int) -> None:
    """``lp-plugin generate``."""
    files = ("--prompts", folder / "documents.jsonl", "--max-new-tokens", NEW_TOKENS)
    _command("generate", folder, *files, "--micro-batch", MICRO_BATCH)
    del micro_batches


def _command(name: str, folder: Path, *arguments: Any) -> None:
    more = ("--output", folder / "results0.jsonl", "--stages", RANKS)
    sys.argv = ["lp-plugin", name, *map(str, (shared() / "model", *arguments, *more))]
    cli.main()


def train(folder: Path, micro_batches: int) -> None:
    """A script of one's own: 1F1B with ZeRO-1, the optimizer's step every eight micro-batches."""
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "steps_per_print": 100,  # what DeepSpeed's timers have kept goes when it prints
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},
    }
    init_distributed()
    with quiet():
        module = HFTrainingModule(shared() / "model", num_stages=RANKS, config=config, sequence=32)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    with (folder / f"results{engine.global_rank}.jsonl").open("w", encoding="utf-8") as stream:
        for step in range(micro_batches // ACCUMULATION):
            stream.write(f"{float(engine.train_batch(rows(step % 100)))}\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


JOBS: dict[str, tuple[Callable[[Path, int], None], Callable[[int], int]]] = {
    "score": (score, lambda micro_batches: micro_batches * 33 // 10),  # short ones share a row of a micro-batch
    "generate": (
        generate,
        lambda micro_batches: micro_batches // NEW_TOKENS * MICRO_BATCH * 51 // 50,
    ),  # some end early
    "train": (train, lambda micro_batches: micro_batches // ACCUMULATION),
}
"""What a rank does, and the results that it makes of so many micro-batches."""


def soak(name: str, micro_batches: int) -> dict[str, Any]:
    """Runs a job; what its ranks held, and what is wrong with it (``problems``)."""
    entry, results = JOBS[name]
    expected = results(micro_batches)
    with tempfile.TemporaryDirectory(prefix="soak-") as place_of_job:
        folder = Path(place_of_job)
        if name != "train":
            documents(folder, expected)

        def rank(number: int) -> None:
            observer = Observer(PASSES[name], folder / f"rank{number}")
            try:
                entry(folder, micro_batches)
            finally:
                observer.look()

        started = time.monotonic()
        ended = run_ranks(RANKS, rank, seconds=3600)
        seconds = time.monotonic() - started
        if any(each.code for each in ended):
            return {"job": name, "problems": [f"failed: {[each.said[-500:] for each in ended]}"]}
        with (folder / "results0.jsonl").open(encoding="utf-8") as stream:
            found = sum(1 for _ in stream)
        samples = [
            [tuple(map(float, line.split())) for line in (folder / f"rank{number}").read_text().splitlines()]
            for number in range(RANKS)
        ]
    ranks = [judged(number, each, micro_batches) for number, each in enumerate(samples)]
    problems = [problem for each in ranks for problem in each.pop("problems")]
    if found != expected:
        problems.append(f"{found} results of {expected}")
    return {"job": name, "seconds": round(seconds, 1), "results": found, "ranks": ranks, "problems": problems}


def judged(rank: int, samples: list[tuple[float, ...]], micro_batches: int) -> dict[str, Any]:
    """A rank's growth over its job, and a thinned record of it."""
    problems = []
    last = int(samples[-1][0])
    if last < micro_batches:
        problems.append(f"rank {rank} made {last} micro-batches of {micro_batches}")
    working = [each for each in samples if 0 < each[0] < last]
    early = [each for each in working if 0.2 <= each[0] / last <= 0.4]
    late = [each for each in working if each[0] / last >= 0.8]
    counts, held, files, threads = (
        [statistics.median(each[column] for each in part) for part in (early, late)] for column in range(4)
    )
    growth = (held[1] - held[0]) / (counts[1] - counts[0])
    if growth > BYTES_PER_MICRO_BATCH:
        problems.append(f"rank {rank} gains {growth:.1f} bytes per micro-batch")
    if files[1] > files[0] or threads[1] > threads[0]:
        problems.append(f"rank {rank} has {files} open files, {threads} threads")
    thinned = working[:: max(1, len(working) // 200)]
    return {
        "rank": rank,
        "micro_batches": last,
        "early_bytes": int(held[0]),
        "late_bytes": int(held[1]),
        "growth_bytes_per_micro_batch": round(growth, 2),
        "open_files": files,
        "threads": threads,
        "samples": [[int(count), int(size)] for count, size, *_ in thinned],
        "problems": problems,
    }


def main() -> None:
    """Runs the jobs and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--micro-batches", type=int, default=100_000)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json, README.md and memory.png")
    given = parser.parse_args()
    console = Console(stderr=True)
    shared()
    results = []
    for name in given.jobs:
        with console.status(f"{name}: {given.micro_batches:,} micro-batches"):
            results.append(soak(name, given.micro_batches))
        console.print({key: value for key, value in results[-1].items() if key != "ranks"})
    write_page(given.output, results, ranks=RANKS, command=sys.argv)
    sys.exit(any(result["problems"] for result in results))


if __name__ == "__main__":
    main()
