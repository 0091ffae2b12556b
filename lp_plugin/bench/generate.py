"""Generation beside what else runs a Hugging Face model on a few GPUs, all in one run and in turns.

Every contender has processes of its own, all alive at once: they build, load, compile and warm up together, then idle.
So all their models and caches lie on the GPUs at the same time.
Turns go round the contenders, every second time backwards (A B C, C B A, ...), so that a clock that falls meets all.
A contender that fails gives a row that says why; the others go on.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from lp_plugin.bench.generate_contenders import REFERENCE, Contender, Request, chosen_contenders
from lp_plugin.bench.generate_rows import Row, prediction_lines, rows_table
from lp_plugin.bench.generate_turns import ContenderFailedError, Running, ready_deadline, started
from lp_plugin.errors import InvalidInputError, RuntimeEnvironmentError, WorkloadError
from lp_plugin.files import write_atomically
from lp_plugin.integrations.transformers.runnable import check_runnable
from lp_plugin.integrations.transformers.weights import check_checkpoint
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import read_config

__all__ = ["compare_generation"]


class _Bench:
    """One run.

    Args:
        console: For progress lines and the table.
        request: What each contender does.
        repeats: Turns of each.
    """

    def __init__(self, console: Console, request: Request, repeats: int) -> None:
        self._console, self._request, self._repeats = console, request, repeats
        self._start = time.monotonic()
        self._environment: dict[str, Any] = {}
        self._turns: list[str] = []

    def run(self, contenders: Sequence[Contender], folder: Path) -> dict[str, Any]:
        """All figures."""
        rows = {each.name: Row(contender=each, request=self._request) for each in contenders}
        gpus = torch.cuda.device_count()
        for row in rows.values():
            row.reason = _unable(row.contender, self._request.stages, gpus)
        able = [row.contender for row in rows.values() if not row.reason]
        with started(able, self._request, folder) as running:
            self._say(f"{len(able)} contenders started: {', '.join(each.name for each in able)}")
            ready = self._get_ready(running, rows)
            for number in range(self._repeats):
                for each in ready if number % 2 == 0 else ready[::-1]:
                    self._take_turn(each, rows[each.contender.name], number)
            for each in ready:
                each.ask_to_stop()
            for each in ready:
                rows[each.contender.name].memory = each.stopped()
            self._say("all have ended")
        reference = rows.get(REFERENCE)
        return {
            "environment": self._environment,
            "turns": self._turns,
            "rows": [row.as_json(rows["ours"], reference) for row in rows.values()],
        }

    def _get_ready(self, running: Sequence[Running], rows: dict[str, Row]) -> list[Running]:
        """Those that are warm; the others' rows say why they are not."""
        ready, deadline = [], ready_deadline()
        for each in running:
            try:
                said = each.wait_ready(deadline)
            except ContenderFailedError as error:
                self._fail(rows[each.contender.name], each, str(error))
                continue
            rows[each.contender.name].facts = said["facts"]
            self._environment = said["environment"] if each.contender.name == "ours" else self._environment
            self._say(f"{each.contender.name} is warm")
            ready.append(each)
        return ready

    def _take_turn(self, running: Running, row: Row, number: int) -> None:
        if row.reason:
            return
        try:
            seconds, row.tokens = running.turn()
        except ContenderFailedError as error:
            self._fail(row, running, str(error))
            return
        if wrong := row.check():
            self._fail(row, running, wrong)
            return
        row.seconds.append(seconds)
        self._turns.append(row.contender.name)
        rate = row.tokens_per_second[-1]
        self._say(f"turn {number + 1} of {self._repeats}: {row.contender.name}, {rate:,.0f} tokens/s")

    def _fail(self, row: Row, running: Running, reason: str) -> None:
        row.reason = reason
        running.kill()
        self._say(f"{row.contender.name} failed: {reason}")

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._start:6.1f} s  {text}", highlight=False, markup=False)


def compare_generation(
    console: Console,
    model: Path,
    *,
    stages: int,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    baselines: str,
    output: Path | None,
) -> None:
    """Times ours and the baselines on the same prompts (random tokens, greedy, all rows to their last token).

    Args:
        console: For progress lines and the table.
        model: Model directory with weights.
        stages: Devices of those that use several.
        requests: Prompts, all given at once.
        prompt_tokens: Tokens of each.
        new_tokens: Tokens to make for each.
        repeats: Turns of each contender.
        baselines: ``all``, or names with commas between.
        output: Where the figures go as JSON.

    Raises:
        InvalidInputError: If the output can't be written, or the request makes no sense for this model.
        RuntimeEnvironmentError: If ours did not run; the others' figures are written first.
    """
    contenders = chosen_contenders(baselines)
    if output is not None and not output.resolve().parent.is_dir():
        raise InvalidInputError(f"{output} can't be written: folder {output.parent} does not exist.")
    _check(model, stages=stages, requests=requests, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    with tempfile.TemporaryDirectory(prefix="lp-plugin-bench-") as name:
        folder = Path(name)
        request = Request(
            directory=str(_endless(model.resolve(), folder / "model")),
            stages=stages,
            requests=requests,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )
        found = _Bench(console, request, repeats).run(contenders, folder)
    figures: dict[str, Any] = {
        "command": shlex.join(["lp-plugin", *sys.argv[1:]]),
        "model": read_config(model),
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "stages": stages,
        "cores": os.cpu_count(),
    } | found
    if output is not None:
        write_atomically(output, json.dumps(figures, indent=2) + "\n")
        console.print(f"figures written to {output}")
    console.print(rows_table(figures["rows"]))
    console.print("\n".join(prediction_lines(figures["rows"])), highlight=False, markup=False)
    ours = next(row for row in figures["rows"] if row["name"] == "ours")
    if ours["reason"] is not None:
        raise RuntimeEnvironmentError(f"lp_plugin itself did not run to the end: {ours['reason']}")


def _check(model: Path, *, stages: int, **counts: int) -> None:
    """What would otherwise fail in every process."""
    for name, count in counts.items():
        if count < 1:
            raise WorkloadError(f"--{name.replace('_', '-')} is {count}; it must be at least 1.")
    check_runnable(read_config(model))
    check_checkpoint(AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False), model)
    profile = ModelProfile.from_config(model)
    if not 1 <= stages <= profile.num_layers:
        raise WorkloadError(
            f"--stages is {stages}, but {profile.name} has {profile.num_layers} layers (embedding, norm and head "
            f"included) and each stage needs at least one; give 1 to {profile.num_layers}."
        )
    length = counts["prompt_tokens"] + counts["new_tokens"]
    if profile.max_positions is not None and length > profile.max_positions:
        raise WorkloadError(
            f"{counts['prompt_tokens']} prompt and {counts['new_tokens']} new tokens are {length}, but {profile.name} "
            f"allows {profile.max_positions} (max_position_embeddings); ask for fewer."
        )


def _endless(model: Path, copy: Path) -> Path:
    """A folder with the same weights, and a configuration in which no token ends a row."""
    copy.mkdir()
    for file in model.iterdir():
        if file.name not in {"config.json", "generation_config.json"}:
            (copy / file.name).symlink_to(file)
    config = dict(read_config(model)) | {"eos_token_id": None}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def _unable(contender: Contender, stages: int, gpus: int) -> str:
    """Why a contender can't run here; empty if it can."""
    if contender.needs_gpu and not gpus:
        return f"needs a GPU: {contender.needs_gpu}"
    if gpus and contender.devices(stages) > gpus:
        return f"needs {contender.devices(stages)} GPUs; this host shows {gpus}"
    return ""
