"""``lp-plugin bench generate``: a tiny run in real processes, and what becomes of its figures."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lp_plugin import Cluster, ModelProfile
from lp_plugin.bench.generate_contenders import CONTENDERS, Request, chosen_contenders
from lp_plugin.bench.generate_rows import Row, equal_shares, prediction_lines, rows_table
from lp_plugin.errors import WorkloadError
from lp_plugin.generate.planning import plan_generation

Make = Callable[..., Path]
Command = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., tuple[int, str, str]]
REQUEST = Request(directory="model", stages=2, requests=2, prompt_tokens=4, new_tokens=3)


@pytest.fixture(scope="module")
def figures(make_model: Make, command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ours and one whole model beside two contenders that can't run: 3 heads don't go on 2 ranks, and no GPU."""
    model = make_model(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    settings = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = list(range(200))  # would end nearly every row at its first token
    (model / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    output = tmp_path_factory.mktemp("bench") / "figures.json"
    counts = ("--stages", 2, "--requests", 5, "--prompt-tokens", 7, "--new-tokens", 9, "--repeats", 2)
    process = command(
        *("bench", "generate", model, *counts, "--baselines", "tp,accelerate,one-gpu,ours-replicas", "-o", output),
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8")) | {"stdout": process.stdout, "directory": model}


def row(figures: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in figures["rows"] if each["name"] == name)
    return found


def test_turns_go_round_and_back_among_those_that_run(figures: dict[str, Any]) -> None:
    assert figures["turns"] == ["ours", "one-gpu", "ours-replicas", "ours-replicas", "one-gpu", "ours"]
    for name in ("ours", "one-gpu"):
        ran = row(figures, name)
        assert ran["reason"] is None
        assert len(ran["seconds"]) == 2
        rates = [5 * 9 / seconds for seconds in ran["seconds"]]
        assert ran["lowest_tokens_per_second"] == pytest.approx(min(rates))
        assert ran["highest_tokens_per_second"] == pytest.approx(max(rates))
        assert ran["peak_bytes"] is None  # counted on GPUs alone
        assert f"turn 2 of 2: {name}" in figures["stdout"]


def test_ours_makes_the_whole_models_tokens_to_the_last(figures: dict[str, Any]) -> None:
    for name in ("ours", "ours-replicas"):
        assert [row(figures, name)[share] for share in ("equal_tokens", "equal_first_tokens", "equal_rows")] == [
            1,
            1,
            1,
        ]


def test_a_contender_that_fails_says_why(figures: dict[str, Any]) -> None:
    failed, lacking = row(figures, "tp"), row(figures, "accelerate")
    assert failed["reason"].startswith("RuntimeError: ")
    assert "seconds" not in failed
    assert "tp failed: RuntimeError: " in figures["stdout"]
    assert lacking["reason"] == "needs a GPU: accelerate balances over GPUs alone"


def test_the_prediction_stands_beside_the_figures(figures: dict[str, Any]) -> None:
    profile = ModelProfile.from_config(figures["directory"])
    ours = row(figures, "ours")
    planned = plan_generation(
        profile, Cluster.homogeneous("cpu", 2), prompts=5, prompt_tokens=7, new_tokens=9, num_stages=2
    )
    assert ours["boundaries"] == list(planned.plan.boundaries)
    assert ours["predicted_peak_bytes"] == list(planned.stage_memory_bytes)
    assert ours["predicted_load_bytes"] == list(planned.weight_bytes)
    assert ours["predicted_seconds"] == planned.predicted_seconds
    assert "rows in flight, predicted" in figures["stdout"]


def test_what_it_ran_on_is_recorded(figures: dict[str, Any]) -> None:
    assert figures["command"].startswith("lp-plugin bench generate ")
    assert set(figures["environment"]["packages"]) == {"torch", "transformers", "deepspeed", "accelerate"}
    assert figures["environment"]["gpus"] == []
    assert figures["model"]["num_attention_heads"] == 3
    assert {key: figures[key] for key in ("requests", "prompt_tokens", "new_tokens", "stages")} == {
        "requests": 5,
        "prompt_tokens": 7,
        "new_tokens": 9,
        "stages": 2,
    }


def made(name: str, seconds: list[float], tokens: list[list[int]], **fields: Any) -> Row:
    return Row(contender=CONTENDERS[name], request=REQUEST, seconds=seconds, tokens=tokens, **fields)


def test_rows_compare_rates_and_tokens() -> None:
    ours = made(
        "ours",
        [1.0, 2.0, 4.0],
        [[1, 2, 3], [4, 5, 6]],
        memory=[{"load_bytes": [7], "peak_bytes": [9], "reserved_bytes": [10]}] * 2,
    )
    other = made("one-gpu", [8.0], [[1, 2, 9], [4, 5, 6]])
    figures = ours.as_json(ours, other)
    assert figures["tokens_per_second"] == 3.0
    assert figures["spread"] == pytest.approx((6 - 1.5) / 3)
    assert figures["equal_tokens"] == pytest.approx(5 / 6)
    assert (figures["equal_first_tokens"], figures["equal_rows"]) == (1, 0.5)
    assert (figures["load_bytes"], figures["peak_bytes"], figures["reserved_bytes"]) == ([7, 7], [9, 9], [10, 10])
    assert other.as_json(ours, other)["ours_is_faster_by"] == 4.0
    assert equal_shares([[1]], [[2]]) == {"equal_tokens": 0, "equal_first_tokens": 0, "equal_rows": 0}


def test_rows_with_too_few_tokens_are_wrong() -> None:
    assert made("ours", [], [[1, 2, 3], [1, 2, 3]]).check() == ""
    assert "made [2, 3] tokens for 2 prompts instead of 3 for 2" in made("ours", [], [[1, 2], [1, 2, 3]]).check()
    assert "for 1 prompts" in made("ours", [], [[1, 2, 3]]).check()


def test_the_table_shows_the_fastest_first_and_reasons_last() -> None:
    ours, failed = made("ours", [2.0], [[1, 2, 3], [4, 5, 6]]), made("tp", [], [], reason="no [plan] for it")
    ours.facts = {
        "num_slots": 2,
        "micro_batch": 1,
        "predicted_seconds": 1.0,
        "predicted_load_bytes": [1000, 2000],
        "predicted_peak_bytes": [4000, 8000],
    }
    ours.memory = [
        {"load_bytes": [1000], "peak_bytes": [5000], "reserved_bytes": [5000]},
        {"load_bytes": [2500], "peak_bytes": [8000], "reserved_bytes": [9000]},
    ]
    faster = made("one-gpu", [1.0], [[1, 2, 3], [4, 5, 6]])
    rows = [each.as_json(ours, faster) for each in (failed, ours, faster)]
    page = io.StringIO()
    Console(width=160, file=page).print(rows_table(rows))
    shown = page.getvalue()
    order = [shown.index(part) for part in ("on one device, eager", "lp_plugin, 2 stages", "parallelism, 2 ranks")]
    assert order == sorted(order)
    assert "no [plan] for it" in shown
    assert prediction_lines(rows) == [
        "lp_plugin, 2 stages: 2 x 1 rows in flight, predicted 1.00 s against 2.00 s (-50.0%)",
        "  memory after loading: predicted 1.00 kB against 1.00 kB (+0.0%); 2.00 kB against 2.50 kB (-20.0%)",
        "  memory at the peak: predicted 4.00 kB against 5.00 kB (-20.0%); 8.00 kB against 8.00 kB (+0.0%)",
    ]


def test_contenders_are_chosen_by_name(tmp_path: Path) -> None:
    assert [each.name for each in chosen_contenders("all")] == list(CONTENDERS)
    assert [each.name for each in chosen_contenders("tp, native-pp")] == ["ours", "native-pp", "tp"]
    with pytest.raises(WorkloadError, match="'vllm' is unknown; write all, or some of ours, ours-compiled, native-pp"):
        chosen_contenders("tp,vllm")
    assert [each.devices(4) for each in CONTENDERS.values()] == [4, 4, 4, 4, 4, 1, 1, 1, 1, 4]
    REQUEST.save(tmp_path / "request.json")
    assert Request.load(tmp_path / "request.json") == REQUEST
    assert dataclasses.replace(REQUEST, stages=3) != REQUEST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", 0), "--stages is 0, but tiny has 6 layers"),
        (("--stages", 7), "give 1 to 6"),
        (("--stages", 2, "--new-tokens", 0), "--new-tokens is 0; it must be at least 1"),
        (("--stages", 2, "--prompt-tokens", 500), "500 prompt and 64 new tokens are 564, but tiny allows 512"),
        (("--stages", 2, "--baselines", "x"), "--baselines 'x' is unknown"),
        (("--stages", 2, "-o", "/nowhere/f.json"), "folder /nowhere does not exist"),
    ],
)
def test_wrong_requests_end_before_anything_starts(
    tiny: Path, main: Main, options: tuple[object, ...], message: str
) -> None:
    code, _, error = main("bench", "generate", tiny, *options)
    assert code == 2
    assert message in error


def test_a_model_without_weights_is_refused(tiny: Path, main: Main, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    code, _, error = main("bench", "generate", tmp_path, "--stages", 2)
    assert code == 2
    assert "safetensors" in error
