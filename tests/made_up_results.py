"""Results as an experiment on 2 and 4 GPUs could have given them; for tests of what is made of them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lp_plugin.bench.experiment.results import CaseResult, Environment, Prediction, Results, Row, SimulatedRow
from lp_plugin.measured import Clock, Counters, LayerTimes, Links, Memory, RankClocks, Span, TimeSplit
from lp_plugin.model import ModelProfile

CONFIG: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "examples" / "dense16" / "config.json").read_text(encoding="utf-8")
)
SMALL = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
ENVIRONMENT = Environment(
    devices=("NVIDIA H200", "NVIDIA H200"),
    backend="nccl",
    host="Linux x86_64",
    cores=16,
    versions={"python": "3.12.3", "torch": "2.11.0", "deepspeed": "0.19.8"},
    variables={"NCCL_NVLS_ENABLE": "0"},
)
BLOCK_SECONDS = 6.7e-3
CLOCKS = (
    RankClocks(
        rank=0, trials=Clock(hertz=1.49e9, capped_fraction=1.0), alone=Clock(hertz=1.525e9, capped_fraction=0.98)
    ),
    RankClocks(rank=1, trials=Clock(hertz=1.98e9, capped_fraction=0.0), alone=None),
)
"""Of a GPU at its power limit, and of one that is not."""


def trials(seconds: float, seed: int, count: int = 5) -> tuple[float, ...]:
    """Around a value, by a few tenths of a per cent."""
    return tuple(float(each) for each in seconds * (1 + 0.002 * np.random.default_rng(seed).standard_normal(count)))


def prefill_row(name: str, *, dp: int = 1, tp: int = 1, pp: int = 1, slow: float = 1.0, **fields: Any) -> Row:
    """Of 64 micro-batches over 16 blocks."""
    micro_batches = math.ceil(64 / dp)
    stage = BLOCK_SECONDS * 16 / pp / tp * (1.11 if tp > 1 else 1.0)
    seconds = slow * stage * (micro_batches + pp - 1) * 1.012
    edges = [1 + 16 * number // pp for number in range(1, pp)]
    predictions = tuple(
        Prediction(
            source=source, seconds=seconds * error, stage_seconds=(stage * error,) * pp, hop_seconds=(9e-5,) * (pp - 1)
        )
        for source, error in (("catalogue", 0.87), ("timed layers", 0.986))
    )
    weights, peak = 25_900_000_000 // (tp * pp), 25_900_000_000 // (tp * pp) + 1_200_000_000
    ranks = range(dp * tp * pp)
    defaults = {
        "partition": "cache-aware",
        "boundaries": (0, *edges, 19),
        "catalogue_boundaries": (0, *edges, 19) if pp > 1 else (),
        "execution": "eager",
        "seconds": trials(seconds, sum(map(ord, name))),
        "first_token_seconds": trials(stage * pp, len(name)),
        "alone_seconds": (stage,) * pp,
        "flops": 3.6e15,
        "peak_flops": 9.894e14 * len(ranks),
        "traffic_bytes": 3.1e12,
        "peak_bandwidth": 4.8e12 * len(ranks),
        "predictions": predictions,
        "memory": tuple(
            Memory(
                rank=rank, predicted_weights=weights, loaded=weights + 5_000_000, predicted_peak=peak, peak=peak + 10**8
            )
            for rank in ranks
        ),
        "split": tuple(split_of(rank, stage, micro_batches, pp, tp) for rank in ranks),
    }
    return Row(name=name, data_parallel=dp, tensor_parallel=tp, pipeline_parallel=pp, **(defaults | fields))


def split_of(rank: int, stage: float, micro_batches: int, pp: int, tp: int) -> TimeSplit:
    """A rank that computes, then sends beside the next micro-batch; tensor-parallel ranks reduce in between."""
    late, shown = (rank // tp % pp) * stage, min(micro_batches, 12)
    wall = (shown + pp - 1) * stage
    spans = []
    for number in range(shown):
        start, busy = late + number * stage, stage * (0.9 if tp > 1 else 0.985)
        spans.append(Span(kind="compute", name="gemm", start_seconds=start, stop_seconds=start + busy, lane="stream 7"))
        if tp > 1 or (pp > 1 and late < (pp - 1) * stage):
            name, lane = ("AllReduce", "stream 7") if tp > 1 else ("SendRecv", "stream 25")
            begin = start + busy if tp > 1 else start + stage
            stop = start + stage if tp > 1 else start + 1.1 * stage
            spans.append(Span(kind="communication", name=name, start_seconds=begin, stop_seconds=stop, lane=lane))
    share = 1.0 if tp > 1 or pp > 1 else 0.0
    compute, communication = shown * stage * (0.9 if tp > 1 else 0.985), share * 0.1 * shown * stage
    overlap = 0.0 if tp > 1 else 0.8 * communication
    known = tp == 1
    return TimeSplit(
        rank=rank,
        wall_seconds=wall,
        compute_seconds=compute,
        communication_seconds=communication,
        transfer_seconds=0.6 * communication if known else None,
        overlap_seconds=overlap,
        idle_seconds=max(wall - compute - communication + overlap, 0.0),
        exposed_transfer_seconds=0.15 * communication if known else None,
        spans=tuple(spans),
    )


def layer_times(config: dict[str, Any], tp: int, block_seconds: float, *, fits: bool) -> LayerTimes:
    """Blocks that take so long, everything else next to nothing."""
    profile = ModelProfile.from_config(config)
    profile = profile.sharded(tp) if tp > 1 else profile
    seconds = tuple(block_seconds / tp if layer.block is not None else 4e-5 for layer in profile.layers)
    return LayerTimes(
        tensor_parallel=tp,
        execution="eager",
        granularity="layer",
        rows=1,
        seconds=seconds,
        resident_seconds=tuple(each / 1.22 if fits else None for each in seconds),
        weight_bytes=tuple(layer.weight_bytes for layer in profile.layers),
        peak_bytes=tuple(
            int(2048 * (layer.output_bytes_per_token + layer.buffer_bytes_per_token) * 0.97) for layer in profile.layers
        ),
        launch_seconds=1.8e-4,
    )


def links() -> Links:
    """35 us and 350 GB/s."""
    sizes = tuple(4096 * 4**step for step in range(9))
    return Links(
        send_bytes=sizes,
        send_seconds=tuple(35e-6 + size / 350e9 for size in sizes),
        reduce_bytes=sizes,
        reduce_seconds=tuple(40e-6 + size / 289e9 for size in sizes),
        ranks=2,
    )


def prefill_case(processes: int = 2) -> CaseResult:
    """Seven configurations, one of which did not fit."""
    baseline = prefill_row("tp=2" if processes == 2 else "tp=2 pp=2", tp=2, pp=processes // 2)
    rows = (
        baseline,
        prefill_row(f"pp={processes}", pp=processes, clocks=CLOCKS),
        prefill_row(f"pp={processes} uniform", pp=processes, partition="uniform", catalogue_boundaries=(), split=()),
        prefill_row(f"pp={processes} stock", pp=processes, slow=1.04, execution="stock", predictions=(), split=()),
        prefill_row(f"dp={processes}", dp=processes, slow=0.992),
        Row(
            name="pp=2 parameters with a name that is long",
            data_parallel=1,
            tensor_parallel=1,
            pipeline_parallel=2,
            partition="parameters",
            reason="does not fit: stage 1 needs 160 GB\nof 141 GB | 90% usable",
        ),
        prefill_row("1", split=()),
        dataclasses.replace(
            baseline, name=f"{baseline.name} (again)", seconds=trials(baseline.seconds[0], 77), split=()
        ),
    )
    return CaseResult(
        name=f"reference layers, sequence 2048, {processes} GPUs",
        model=CONFIG,
        dtype="float16",
        phase="prefill",
        processes=processes,
        batch=64,
        micro_batch=1,
        sequence=2048,
        new_tokens=0,
        tokens=64 * 2048,
        baseline=baseline.name,
        rows=rows,
        turns=tuple(row.name for row in rows if row.seconds) * 2,
        layers=(layer_times(CONFIG, 1, BLOCK_SECONDS, fits=False), layer_times(CONFIG, 2, BLOCK_SECONDS, fits=False)),
        links=links(),
        environment=ENVIRONMENT,
    )


def decode_case() -> CaseResult:
    """Small stages, counters read."""
    counted = {"counted_bytes": 51_000_000, "nvlink_bytes": 2.1e6, "counted_link_bytes": 2_097_152}
    rows = tuple(
        Row(
            name=name,
            data_parallel=1,
            tensor_parallel=tp,
            pipeline_parallel=pp,
            partition="cache-aware",
            boundaries=(0, 3, 7) if pp == 2 else (0, 7),
            execution="graphs",
            seconds=trials(seconds, 5),
            first_token_seconds=trials(2e-2, 6),
            token_seconds=trials(seconds / 63, 7),
            predictions=(
                Prediction(source="timed layers", seconds=seconds * 0.99, stage_seconds=(6e-5,) * pp, hop_seconds=()),
            ),
            counters=counters,
        )
        for name, tp, pp, seconds, counters in (
            ("tp=2", 2, 1, 0.031, (Counters(stage=0, reason="ncu: ERR_NVGPUCTRPERM, no permission", **counted),)),
            (
                "pp=2",
                1,
                2,
                0.0142,
                tuple(
                    Counters(
                        stage=stage,
                        l2_read_hit_fraction=0.984,
                        dram_read_bytes=60_000.0,
                        dram_write_bytes=1_000.0,
                        predicted_hit_fraction=1.0,
                        **counted,
                    )
                    for stage in range(2)
                ),
            ),
        )
    )
    return CaseResult(
        name="small stages, decode",
        model=SMALL,
        dtype="float16",
        phase="decode",
        processes=2,
        batch=32,
        micro_batch=16,
        sequence=64,
        new_tokens=64,
        tokens=32 * 63,
        baseline="tp=2",
        rows=rows,
        layers=(layer_times(SMALL, 1, 4e-5, fits=True),),
        links=links(),
        environment=ENVIRONMENT,
    )


def simulated() -> tuple[SimulatedRow, ...]:
    """8, 12 and 16 devices."""
    case = prefill_case().name
    rates = {
        "TP=8 x PP={}": ("layer", {8: 118e3, 12: 171e3, 16: 229e3}),
        "PP={}": ("layer", {8: 139e3, 12: 140e3, 16: 268e3}),
        "PP={} ": ("sublayer", {8: 139e3, 12: 190e3, 16: 268e3}),
        "DP={}": ("layer", {8: 155e3, 12: 232e3, 16: 309e3}),
    }
    return tuple(
        SimulatedRow(
            case=case,
            devices=devices,
            strategy=strategy.strip().format(devices // 8 or 1 if "TP" in strategy else devices),
            granularity=granularity,  # type: ignore[arg-type]
            boundaries=(*range(devices), 19) if "DP" not in strategy else (0, 19),
            tokens_per_second=rate,
            seconds=1024 * 2048 / rate,
            bubble_fraction=0.05,
            communication_fraction=0.31 if "TP" in strategy else 0.01,
            assumed=("all-reduces over 8 ranks by the ring formula",) if "TP" in strategy else (),
        )
        for strategy, (granularity, curve) in rates.items()
        for devices, rate in curve.items()
    )


def results() -> Results:
    """Everything that a report can show, and a case that died."""
    failed = dataclasses.replace(prefill_case(4), name="more GPUs than there are", rows=(), layers=(), environment=None)
    failed = dataclasses.replace(failed, reason="8 processes were asked for, but there are 2 GPUs")
    return Results(
        command="lp-plugin bench examples/bench/h200.toml -o docs/results/h200",
        experiment="h200",
        title="The reference layers, and small ones",
        trials=5,
        cases=(prefill_case(2), prefill_case(4), decode_case(), failed),
        simulated=simulated(),
    )
