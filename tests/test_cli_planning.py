"""``lp-plugin plan | score | export`` in this process: what is printed, written and refused."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lp_plugin import cli, load_plan
from lp_plugin.exchange.rules import RULES
from lp_plugin.integrations.formats import FORMATS

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "examples" / "dense16"
LLAMA = ROOT / "examples" / "llama-70b"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``lp-plugin``; exit code, standard output without line breaks and runs of blanks, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lp-plugin", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        out, err = capfd.readouterr()
        return code, " ".join(out.split()), err

    return run


def planned(command: Command, *options: object, model: Path = REFERENCE, cluster: str = "h100-sxm:16") -> str:
    code, out, err = command("plan", model, "--cluster", cluster, *options)
    assert (code, err) == (0, "")
    return out


def refused(command: Command, *arguments: object) -> str:
    code, _, err = command(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err


WORK = ("--batch", 64, "--sequence", 2048)


def test_halves_of_blocks_even_out_12_devices(command: Command, tmp_path: Path) -> None:
    """24 h^2 a stage for whole blocks, 20 h^2 for halves: 6 x 4 h^2 of attention and 2 x 8 h^2 of MLP."""
    for granularity, weights in (("layer", 24), ("sublayer", 20)):
        file = tmp_path / f"{granularity}.json"
        options = ("--granularity", granularity, "--objective", "memory", "--micro-batch", 1, "-o", file)
        planned(command, "--batch", 1, "--sequence", 1, *options, cluster="h100-sxm:12")
        heaviest = max(stage.weight_bytes for stage in load_plan(file).stages)
        assert round(heaviest / 2 / 8192**2, 1) == weights


def test_objectives_and_constraints_reach_the_planner(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    bounds = ("--max-latency", "60 ms", "--min-sequences", 40, "--max-memory", "60 GB", "--min-tokens-per-second", 500)
    out = planned(
        command,
        *("--phase", "decode", "--batch", 32, "--sequence", 10_000),
        "--objective",
        "sequences",
        *bounds,
        "-o",
        file,
    )
    plan = load_plan(file)
    assert plan.objective == "sequences"
    assert plan.latency_seconds <= 0.06
    assert plan.max_sequences is not None
    assert plan.max_sequences >= 40
    assert max(stage.memory_bytes for stage in plan.stages) <= 60e9
    assert plan.tokens_per_second >= 500
    assert "latency at most 60.0 ms" in out


def test_precision_of_weights(command: Command, tmp_path: Path) -> None:
    sizes = {}
    for weights in ("float16", "float8", "int4"):
        file = tmp_path / f"{weights}.json"
        planned(command, *WORK, *(() if weights == "float16" else ("--weights", weights)), "-o", file)
        sizes[weights] = load_plan(file).stages[1].weight_bytes
    assert 1.9 < sizes["float16"] / sizes["float8"] <= 2
    assert 3.7 < sizes["float16"] / sizes["int4"] <= 4


def test_stages_of_tensor_parallel_groups(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    planned(command, *WORK, "--tensor-parallel", 8, "-o", file)
    plan = load_plan(file)
    assert (plan.num_stages, plan.tensor_parallel) == (2, 8)
    assert sum(stage.weight_bytes for stage in plan.stages) < 16 * 1.61e9 / 8 * 1.05


def test_training_options_lower_memory(command: Command, tmp_path: Path) -> None:
    needs = []
    for options in ((), ("--checkpointing",), ("--checkpointing", "--zero-stage", 1, "--data-parallel", 8)):
        file = tmp_path / "plan.json"
        planned(command, "--phase", "train", *WORK, "--micro-batch", 1, *options, "-o", file)
        needs.append(max(stage.memory_bytes for stage in load_plan(file).stages))
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 3


def test_the_best_order_of_unequal_devices(command: Command, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(
        '[[device]]\ntype = "l40s"\ncount = 2\n[[device]]\ntype = "h100-pcie"\ncount = 2\n', encoding="utf-8"
    )
    seconds = []
    for options in ((), ("--best-order",)):
        file = tmp_path / "plan.json"
        planned(command, *WORK, *options, "-o", file, cluster=str(cluster))
        seconds.append(load_plan(file).bottleneck_seconds)
    assert seconds[1] <= seconds[0]


def test_all_strategies(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "strategies.png"
    out = planned(command, "--strategy", "all", "--batch", 1024, "--sequence", 10_000, "--picture", picture)
    for text in ("DP=16", "TP=8 x PP=2", "PP=16", "prefill", "decode", "1.61 GB", "214", "Don't pipeline"):
        assert text.lower() in out.lower(), text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_strategy_fits(command: Command) -> None:
    code, out, err = command(
        *("plan", REFERENCE, "--cluster", "h100-sxm:4", *WORK, "--strategy", "all", "--max-memory", "1 MB")
    )
    assert code == 2
    assert "does not fit" in out
    assert "no strategy fits dense16" in err


@pytest.mark.parametrize("target", ["pipe", "folder"])
def test_nothing_but_regular_files_is_read_or_replaced(command: Command, tmp_path: Path, target: str) -> None:
    path = tmp_path / target
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    plan = tmp_path / "plan.json"
    work = ("plan", REFERENCE, "--cluster", "h100-sxm:4", *WORK)
    assert str(path) in refused(command, *work, "-o", path)
    assert str(path) in refused(command, "plan", REFERENCE, "--cluster", path.with_suffix(".toml"), *WORK)
    planned(command, *WORK, "-o", plan, cluster="h100-sxm:4")
    for arguments in (
        ("explain", path),
        ("explain", plan, "--picture", path),
        ("export", plan, "--to", "vllm", "-o", path),
    ):
        assert str(path) in refused(command, *arguments)
    assert str(path) in refused(command, *work, "--strategy", "all", "--picture", path)
    if target == "pipe":
        assert str(path) in refused(command, "plan", path, "--cluster", "h100-sxm:4", *WORK)
        assert path.is_fifo()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strategy", "all", "--stages", 4), "--strategy all"),
        (("--strategy", "all", "--objective", "memory"), "--objective"),
        (("--picture", "x.png"), "--strategy all"),
        (("--max-latency", "soon"), "soon"),
        (("--max-latency", "0"), "max_latency_seconds"),
        (("--max-memory", "-1 GB"), "-1 GB"),
        (("--min-tokens-per-second", "nan"), "min_tokens_per_second"),
        (("--tier", "l9"), "l9"),
        (("--tier", "l2"), "l2"),
        (("--tensor-parallel", 3), "3"),
        (("--tensor-parallel", 0), "0"),
        (("--weights", "int3"), "int3"),
        (("--checkpointing",), "checkpointing"),
        (("--zero-stage", 2, "--phase", "train"), "zero_stage"),
        (("--max-latency", "1 us"), "latency"),
        (("--phase", "train", "--objective", "sequences"), "KV cache"),
        (("--micro-batch", 65), "micro_batch"),
        (("--best-order", "--objective", "latency"), "--best-order"),
        (("--best-order", "--min-sequences", 1), "--best-order"),
    ],
)
def test_bad_options_are_refused(command: Command, options: tuple[object, ...], says: str) -> None:
    assert says in refused(command, "plan", REFERENCE, "--cluster", "h100-sxm:16", *WORK, *options)


# --- score ---------------------------------------------------------------------------------------------------------


def test_rules_are_scored_against_the_best(command: Command) -> None:
    code, out, err = command("score", LLAMA, "--cluster", "h100-sxm:8", *WORK, "--rule", "all")
    assert (code, err) == (0, "")
    for rule in RULES:
        assert f"rule {rule}" in out
    gaps = [float(gap) for gap in re.findall(r"([+-]\d+\.\d)%", out)]
    assert gaps[0] == 0.0
    assert min(gaps) == 0.0
    assert max(gaps) > 0.5


def test_rules_that_can_not_split_a_model_are_left_out(command: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "dtype": "bfloat16"}', encoding="utf-8")
    code, out, err = command(
        "score", tmp_path, "--cluster", "h100-sxm:3", "--batch", 4, "--sequence", 64, "--rule", "all"
    )
    assert (code, err) == (0, "")
    assert "rule deepspeed_uniform" in out
    assert "rule vllm" not in out


def test_partitions_of_any_engine_are_scored(command: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    planned(command, *WORK, "-o", plan, model=LLAMA, cluster="h100-sxm:8")
    for name in FORMATS:
        text = tmp_path / f"{name}.txt"
        assert command("export", plan, "--to", name, "-o", text)[0] == 0
        code, out, err = command("score", LLAMA, "--cluster", "h100-sxm:8", *WORK, "--partition", f"{name}:@{text}")
        assert (code, err) == (0, ""), name
        assert out.count("+0.0%") == 2, name  # the best one, and the same again


def test_a_scored_partition_becomes_a_plan(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ("--partition", "vllm:10,10,20,40", "-o", file)
    assert command("score", LLAMA, "--cluster", "h200:4", *WORK, *options)[0] == 0
    plan = load_plan(file)
    assert plan.boundaries == (0, 11, 21, 41, 83)
    assert plan.objective is None


def test_a_partition_that_does_not_fit_is_marked(command: Command) -> None:
    code, out, _ = command("score", LLAMA, "--cluster", "h100-sxm:2", *WORK, "--partition", "vllm:75,5")
    assert code == 0
    assert "does not fit" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "nothing to score"),
        (("--partition", "40,40"), "FORMAT:TEXT"),
        (("--partition", "vllm:40,41"), "81"),
        (("--partition", "vllm:@nowhere.txt"), "nowhere.txt"),
        (("--partition", "vllm:40,40", "--partition", "vllm:20,20,40"), "one number of stages"),
        (("--rule", "none"), "none"),
        (("--partition", "vllm:40,40", "--rule", "vllm", "-o", "x.json"), "-o"),
        (("--partition", "vllm:10,10,20,40"), "devices"),
    ],
)
def test_bad_partitions_are_refused(command: Command, options: tuple[object, ...], says: str) -> None:
    assert says in refused(command, "score", LLAMA, "--cluster", "h100-sxm:2", *WORK, *options)


# --- export --------------------------------------------------------------------------------------------------------


def test_exports_of_the_reference(command: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    planned(command, *WORK, "-o", plan, cluster="h100-sxm:8")
    assert json.loads(command("export", plan, "--to", "deepspeed")[1]) == list(load_plan(plan).boundaries)
    assert command("export", plan, "--to", "vllm")[1] == "2,2,2,2,2,2,2,2"
    assert command("export", plan, "--to", "megatron")[1] == "Et*2|" + "t*2|" * 6 + "t*2L"
    assert json.loads(command("export", plan, "--to", "accelerate")[1])["model.layers.15"] == 7


def test_what_can_not_be_exported_is_refused(command: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    planned(command, *WORK, "--granularity", "sublayer", "-o", plan, cluster="h100-sxm:12")
    assert "block" in refused(command, "export", plan, "--to", "vllm")
    assert "nowhere" in refused(command, "export", plan, "--to", "nowhere")
    assert "cannot" in refused(command, "export", plan, "--to", "deepspeed", "-o", tmp_path / "no" / "x").replace(
        "can't", "cannot"
    )


# --- sweep ---------------------------------------------------------------------------------------------------------


def test_a_sweep_agrees_with_single_plans(command: Command, tmp_path: Path) -> None:
    table, picture, file = tmp_path / "sweep.csv", tmp_path / "sweep.png", tmp_path / "plan.json"
    grid = ("--cluster", "h100-sxm:4,h100-sxm:8", "--batch", "32,64", "--sequence", 2048, "--phase", "decode")
    code, out, err = command("sweep", REFERENCE, *grid, "--csv", table, "--picture", picture)
    assert (code, err) == (0, "")
    assert "h100-sxm:8" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 4
    for row in rows:
        work = ("--phase", "decode", "--batch", row["batch_sequences"], "--sequence", row["sequence_tokens"])
        planned(command, *work, "-o", file, cluster=row["cluster"])
        assert float(row["tokens_per_second"]) == load_plan(file).tokens_per_second
        assert row["boundaries"] == " ".join(map(str, load_plan(file).boundaries))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cluster", "h100-sxm:4,,h100-sxm:8"), "--cluster: item 2"),
        (("--batch", "32,few"), "--batch: item 2"),
        (("--sequence", "64,64"), "--sequence: item 2"),
        (("--dtype", "float99"), "--dtype: item 1"),
        (("--weights", "int3"), "--weights: item 1"),
        (("--csv", "no/such/folder.csv"), "folder.csv"),
    ],
)
def test_bad_sweeps_are_refused(command: Command, options: tuple[object, ...], says: str) -> None:
    grid = ("--cluster", "h100-sxm:4", "--batch", 8, "--sequence", 64)
    assert says in refused(command, "sweep", REFERENCE, *grid, *options)


def test_errors_bring_no_control_characters_to_the_terminal(command: Command, tmp_path: Path) -> None:
    said = refused(command, "plan", tmp_path / "\x1b[2J", "--cluster", "h200", *WORK)
    assert "\x1b" not in said
    assert r"\x1b[2J" in said
