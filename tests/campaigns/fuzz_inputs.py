"""Every kind of file that the tool reads: sound ones to begin with, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz_inputs_run import run_kinds
from fuzz_kind import GENERATE, RUN, Kind
from fuzz_workspace import ROOT, make_model, shards
from made_up_results import results
from shrunk import VARIANTS, small_config

from lp_plugin import Cluster, ModelProfile, Workload, load_plan, make_plan, save_plan
from lp_plugin.bench.experiment.checks import checked_experiment
from lp_plugin.bench.experiment.results import load_results, save_results
from lp_plugin.cli.exchange import _file_text
from lp_plugin.integrations.deepspeed.config import read_settings
from lp_plugin.integrations.formats import FORMATS, export_partition, import_partition
from lp_plugin.plan import Plan
from lp_plugin.report import plan_report

__all__ = ["all_kinds"]

_PLANNED = ("--cluster", "h100-sxm:2", "--batch", "4", "--sequence", "32")
_CLUSTER = b"""\
devices_per_node = 2
[[device]]
type = "h100-sxm"
count = 2
[[device]]
name = "mine"
count = 2
compute_efficiency = 0.5
layer_overhead = "5 us"
[[device.tier]]
name = "l2"
capacity = "50 MiB"
bandwidth = "5.5 TB/s"
[[device.tier]]
name = "hbm"
capacity = "80 GB"
bandwidth = "3 TB/s"
usable_fraction = 0.9
[device.flops]
float16 = "900 TFLOP/s"
bfloat16 = "900 TFLOP/s"
float32 = "60 TFLOP/s"
[link]
bandwidth = "450 GB/s"
latency = "10 us"
[network]
bandwidth = "50 GB/s"
latency = "20 us"
[[link_between]]
first = 0
bandwidth = "100 GB/s"
latency = "1 ms"
"""
_EXPERIMENT = b"""\
title = "Mine"
model = "config.json"
calibration = "cluster.toml"
trials = 2
[[case]]
name = "prefill"
changes = { num_hidden_layers = 3, hidden_size = 64 }
processes = 2
phase = "prefill"
batch = 4
micro_batch = 2
sequence = 16
configurations = ["tp=2", "pp=2 uniform", "dp=2", "1"]
[[case]]
name = "decode"
dtype = "float32"
processes = 2
phase = "decode"
batch = 2
sequence = 8
new_tokens = 4
configurations = ["pp=2", "1"]
baseline = "1"
[[scale_out]]
case = "prefill"
devices = [8, 16]
cluster = "h100-sxm"
batch = 64
"""
_DEEPSPEED: tuple[dict[str, Any], ...] = (
    json.loads((ROOT / "examples" / "train" / "ds.json").read_text(encoding="utf-8")),
    {"train_batch_size": 8, "bf16": {"enabled": True}, "lp_plugin": {"plan": "plan.json", "device": "h100-sxm"}},
    {"lp_plugin": {"method": "profile", "phase": "prefill", "input": [{"shape": [4, 8], "dtype": "int64", "high": 9}]}},
)


def all_kinds(folder: Path) -> tuple[Kind, ...]:
    """All of them; what they need is made in a folder."""
    model = make_model(folder)
    sharded = shards(model, folder / "sharded")
    profile = ModelProfile.from_config(model)
    plans = tuple(_plan(profile, folder / "plan.json", **options) for options in _PLANS)
    return (
        *_described(model),
        *_planned(model, plans),
        *_partitions(model, load_plan(folder / "plan.json")),
        *run_kinds(model, sharded),
    )


_PLANS: tuple[dict[str, Any], ...] = (
    {"phase": "prefill"},
    {"phase": "train", "checkpointing": True, "zero_stage": 1, "data_parallel": 2},
    {"phase": "decode"},
)


def _plan(profile: ModelProfile, file: Path, **options: Any) -> bytes:
    save_plan(make_plan(profile, Cluster.parse("h100-sxm:2"), Workload(batch=4, sequence=32, **options)), file)
    return file.read_bytes()


def _described(model: Path) -> tuple[Kind, ...]:
    """What describes models, clusters and experiments."""
    examples = [path.read_bytes() for path in sorted(ROOT.glob("examples/**/config.json"))]
    families = [small_config(name, number) for name, variants in VARIANTS.items() for number in range(len(variants))]
    nested = {"model_type": "llava", "text_config": json.loads(examples[0]), "dtype": "float16"}
    stored = [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ]
    odd = [nested, *(json.loads(examples[0]) | {"quantization_config": each} for each in stored)]
    configs = (*examples, *(json.dumps(each).encode() for each in (*families, *odd)))
    calibrated = (ROOT / "docs" / "results" / "h200-one" / "cluster.toml").read_bytes()
    experiments = [
        path.read_bytes().replace(b'model = "../', b'model = "config.json" # ')
        for path in ROOT.glob("examples/bench/*.toml")
    ]
    results_file = model.parent / "results.json"
    save_results(results(), results_file)
    measured = [path.read_bytes() for path in sorted(ROOT.glob("docs/results/h200-bench/*/results.json"))[:3]]
    with_cluster = ("--cluster", "cluster.toml", "--batch", "4", "--sequence", "32")
    return (
        Kind(
            name="config.json",
            form="json",
            file="config.json",
            seeds=configs,
            api=_profile,
            commands=(
                ("plan", "config.json", *_PLANNED, "-o", "out.json"),
                (
                    "plan",
                    "config.json",
                    *_PLANNED,
                    "--granularity",
                    "sublayer",
                    "--phase",
                    "decode",
                    "--objective",
                    "sequences",
                ),
                ("plan", "config.json", *_PLANNED, "--strategy", "all"),
                (
                    "sweep",
                    "config.json",
                    "--cluster",
                    "h100-sxm:1,h100-sxm:2",
                    "--batch",
                    "4",
                    "--sequence",
                    "32",
                    "--csv",
                    "out.csv",
                ),
                ("score", "config.json", *_PLANNED, "--rule", "all"),
            ),
            weight=16,
        ),
        Kind(
            name="cluster",
            form="toml",
            file="cluster.toml",
            seeds=(_CLUSTER, calibrated),
            api=lambda path: Cluster.from_toml(path).digest,
            commands=(
                ("plan", "model", *with_cluster, "--best-order"),
                ("sweep", "model", *with_cluster),
                ("score", "model", *with_cluster, "--stages", "1", "--rule", "all"),
            ),
            model=model,
            weight=8,
        ),
        Kind(
            name="experiment",
            form="toml",
            file="experiment.toml",
            seeds=(_EXPERIMENT, *experiments),
            api=lambda path: checked_experiment(path, ("scaling",)),
            commands=(("bench", "experiment.toml"),),
            beside=(("config.json", examples[1]), ("cluster.toml", calibrated)),
            weight=8,
        ),
        Kind(
            name="results",
            form="json",
            file="results.json",
            seeds=(results_file.read_bytes(), *measured),
            api=lambda path: save_results(load_results(path), path.with_name("again.json")),
            commands=(("bench", "report", ".", "--table", "consistency"),),
            weight=8,
        ),
        Kind(
            name="DeepSpeed configuration",
            form="json",
            file="ds.json",
            seeds=tuple(json.dumps(each).encode() for each in _DEEPSPEED),
            api=lambda path: (settings := read_settings(path)).method or settings.phase,
            commands=(("launch", "nothing.py", "--deepspeed_config", "ds.json"),),
            weight=8,
        ),
    )


def _planned(model: Path, plans: Sequence[bytes]) -> tuple[Kind, ...]:
    """Plan files, of the phases prefill, train and decode."""
    commands = [
        ("explain", "plan.json", "--picture", "out.svg"),
        *(("export", "plan.json", "--to", name) for name in FORMATS),
    ]
    run = (*RUN[:2], "--plan", "plan.json", *RUN[4:], "text.txt")
    return (
        Kind(
            name="plan",
            form="json",
            file="plan.json",
            seeds=tuple(plans),
            api=_replan,
            commands=(*commands, run, (*GENERATE[:2], "--plan", "plan.json", *GENERATE[4:], "text.txt")),
            model=model,
            weight=12,
        ),
    )


def _partitions(model: Path, plan: Plan) -> tuple[Kind, ...]:
    """What other engines call a partition, a kind for each."""

    def kind(name: str) -> Kind:
        text = export_partition(plan, name)
        return Kind(
            name=f"{name} partition",
            form="json" if text.startswith(("{", "[")) else "text",
            file="partition.txt",
            seeds=(text.encode(),),
            api=lambda path: import_partition(_file_text(path), plan.layers, name, model_type=plan.model_type),
            commands=(("score", "model", *_PLANNED, "--partition", f"{name}:@partition.txt"),),
            model=model,
            weight=1,
        )

    return tuple(kind(name) for name in FORMATS if name not in _INEXPRESSIBLE)


_INEXPRESSIBLE: tuple[str, ...] = ()


def _profile(path: Path) -> object:
    profile = ModelProfile.from_config(path)
    plan = make_plan(profile, Cluster.parse("h100-sxm:2"), Workload(batch=4, sequence=32))
    return profile.digest, plan.bottleneck_seconds


def _replan(path: Path) -> object:
    plan = load_plan(path)
    save_plan(plan, path.with_name("again.json"))
    if load_plan(path.with_name("again.json")) != plan:
        raise AssertionError("the plan written again is another one")
    return plan_report(plan)
