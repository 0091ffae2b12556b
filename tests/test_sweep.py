"""Sweeps: every point is what `make_plan` gives, or says why not; table and CSV show all of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from lp_plugin import Cluster, HardwareError, InvalidInputError, ModelProfile, Workload, WorkloadError, make_plan
from lp_plugin.errors import InfeasibleError
from lp_plugin.objective import Constraints
from lp_plugin.quantity import format_seconds
from lp_plugin.report import WIDTH, as_text
from lp_plugin.sweep.grid import MOST_POINTS, Grid, Point, parse_clusters, parse_names, parse_numbers, sweep
from lp_plugin.sweep.report import save_csv, sweep_csv, sweep_report, sweep_table, sweep_title

EXAMPLES = Path(__file__).parent.parent / "examples"
DECODE = Workload(phase="decode", batch=1, sequence=1)


def profile_of(dtype: str | None, weight_dtype: str | None) -> ModelProfile:
    return ModelProfile.from_config(EXAMPLES / "dense16", dtype=dtype, weight_dtype=weight_dtype)


def grid(
    clusters: str = "h100-sxm:8",
    batches: tuple[int, ...] = (256,),
    sequences: tuple[int, ...] = (2048,),
    dtypes: tuple[str | None, ...] = (None,),
    weight_dtypes: tuple[str | None, ...] = (None,),
) -> Grid:
    return Grid(
        clusters=parse_clusters("--cluster", clusters),
        batches=batches,
        sequences=sequences,
        dtypes=dtypes,
        weight_dtypes=weight_dtypes,
    )


@pytest.fixture(scope="module")
def varied() -> tuple[Point, ...]:
    """Everything varies, some points don't fit, and some make no sense (20 stages for 19 layers)."""
    wide = grid(
        "h100-sxm:4,h200:8,h100-sxm:20", (64, 512), (512, 2048), ("float16", "bfloat16"), weight_dtypes=(None, "int4")
    )
    return sweep(profile_of, wide, DECODE)


def test_every_point_is_what_make_plan_gives(varied: tuple[Point, ...]) -> None:
    combinations = itertools.product(
        ("h100-sxm:4", "h200:8", "h100-sxm:20"), ("float16", "bfloat16"), (None, "int4"), (512, 2048), (64, 512)
    )
    for point, (cluster, dtype, weights, sequence, batch) in zip(varied, combinations, strict=True):
        assert (point.cluster, point.dtype, point.weight_dtype) == (cluster, dtype, weights or dtype)
        assert (point.sequence, point.batch, point.phase) == (sequence, batch, "decode")
        workload = Workload(phase="decode", batch=batch, sequence=sequence)
        try:
            plan = make_plan(profile_of(dtype, weights), Cluster.parse(cluster), workload)
        except InfeasibleError:
            assert point.outcome == "does not fit"
        except WorkloadError:
            assert point.outcome == "makes no sense"
        else:
            assert point.outcome == "planned"
            assert point.boundaries == plan.boundaries
            assert point.micro_batch == plan.workload.micro_batch
            assert point.tokens_per_second == plan.tokens_per_second
            assert point.bottleneck_seconds == plan.bottleneck_seconds
            assert point.latency_seconds == plan.latency_seconds
            assert point.memory_share == plan.memory_share
            assert point.max_sequences == plan.max_sequences
            assert point.bubble_fraction == plan.bubble_fraction
            assert point.reason == ""
    assert {point.outcome for point in varied} == {"planned", "does not fit", "makes no sense"}


def test_a_point_without_a_plan_says_why(varied: tuple[Point, ...]) -> None:
    for point in varied:
        if point.outcome == "planned":
            continue
        figures = (point.micro_batch, point.tokens_per_second, point.bottleneck_seconds, point.latency_seconds)
        assert {*figures, point.memory_share, point.max_sequences, point.bubble_fraction, point.boundaries} == {None}
        if point.outcome == "does not fit":
            assert point.reason.startswith("stage ")
            assert point.reason.endswith(" of 72.0 GB, mostly KV cache")
        else:
            assert "20 stages for dense16 with 19 layers" in point.reason


def test_objective_and_constraints_hold_in_every_point() -> None:
    bounds = Constraints(max_latency_seconds=0.021)
    points = sweep(profile_of, grid("h100-sxm:8,l40s:16"), DECODE, objective="sequences", constraints=bounds)
    workload = Workload(phase="decode", batch=256, sequence=2048)
    first = make_plan(
        profile_of(None, None), Cluster.parse("h100-sxm:8"), workload, objective="sequences", constraints=bounds
    )
    assert points[0].boundaries == first.boundaries
    assert points[0].max_sequences == first.max_sequences
    assert (points[1].outcome, points[1].reason) == ("does not fit", "no partition keeps to latency at most 21.0 ms")
    assert points[0].constraints == "latency at most 21.0 ms"


def test_points_that_make_no_sense() -> None:
    template = dataclasses.replace(DECODE, batch=64, micro_batch=32)
    points = sweep(profile_of, grid("h100-sxm:8,l40s:2", (16, 64), (512, 10**6)), template)
    assert [point.outcome for point in points[:4]] == ["makes no sense", "planned", "makes no sense", "makes no sense"]
    assert points[0].reason == "micro_batch is 32, more than the batch of 16"
    assert points[3].reason == "sequence is 1000000 tokens, but dense16 allows 16384 (max_position_embeddings)"


def test_a_precision_that_a_device_lacks() -> None:
    own = dataclasses.replace(Cluster.parse("h200:1").devices[0], name="own", peak_flops=(("float32", 1e12),))
    clusters = {"own": Cluster(devices=(own,), links=()), "h200:1": Cluster.parse("h200:1")}
    points = sweep(profile_of, Grid(clusters=clusters, batches=(1,), sequences=(512,)), DECODE)
    assert [point.outcome for point in points] == ["makes no sense", "planned"]
    assert points[0].reason == "own has no peak for dtype 'float16'"


def test_a_sweep_without_any_sense_is_an_error() -> None:
    with pytest.raises(WorkloadError, match="20 stages"):
        sweep(profile_of, grid("h100-sxm:20,h100-sxm:30"), DECODE)
    with pytest.raises(WorkloadError, match="objective"):
        sweep(profile_of, grid(), DECODE, objective="speed")


def test_points_are_told_as_they_come() -> None:
    told: list[Point] = []
    small = grid("h100-sxm:4,h100-sxm:8", (8, 16))
    points = sweep(profile_of, small, DECODE, on_point=told.append)
    assert tuple(told) == points
    assert len(points) == small.num_points == 4


def test_each_precision_is_described_once() -> None:
    asked: list[tuple[str | None, str | None]] = []

    def counted(dtype: str | None, weight_dtype: str | None) -> ModelProfile:
        asked.append((dtype, weight_dtype))
        return profile_of(dtype, weight_dtype)

    sweep(counted, grid("h100-sxm:2,h100-sxm:4", (8, 16), dtypes=("float16", "bfloat16")), DECODE)
    assert asked == [("float16", None), ("bfloat16", None)]


def test_one_precision_twice() -> None:
    with pytest.raises(WorkloadError, match="comes to float16"):
        sweep(profile_of, grid(dtypes=(None, "float16")), DECODE)


def test_groups_count_all_their_devices() -> None:
    """With tensor parallelism a stage is a group."""
    clusters = {"h100-sxm:8, TP 2": Cluster.parse("h100-sxm:8").grouped(2)}
    points = sweep(
        lambda *pair: profile_of(*pair).sharded(2), Grid(clusters=clusters, batches=(8,), sequences=(512,)), DECODE
    )
    assert (points[0].num_stages, points[0].num_devices, points[0].device) == (4, 8, "h100-sxm")


def test_limits_of_a_grid() -> None:
    many = tuple(range(1, 102))
    with pytest.raises(WorkloadError, match=r"10,201 points: 1 clusters x 101 batches .* at most 10,000"):
        grid(batches=many, sequences=many)
    assert grid(batches=tuple(range(1, MOST_POINTS + 1))).num_points == MOST_POINTS
    for empty in ({"batches": ()}, {"sequences": ()}, {"dtypes": ()}, {"batches": (1, 2, 1)}):
        with pytest.raises(WorkloadError, match="at least one, each once"):
            grid(**empty)


# Lists on the command line


def test_lists_are_read() -> None:
    assert parse_numbers("--batch", "256, 1024") == (256, 1024)
    assert parse_names("--dtype", "float16,bfloat16", ("float16", "bfloat16")) == ("float16", "bfloat16")
    clusters = parse_clusters("--cluster", "h100-sxm:4, h200:2x8")
    assert clusters == {"h100-sxm:4": Cluster.parse("h100-sxm:4"), "h200:2x8": Cluster.parse("h200:2x8")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--batch: item 1 of '' is empty"),
        ("1,,2", "--batch: item 2 of '1,,2' is empty"),
        ("1,", "--batch: item 2 of '1,' is empty"),
        ("1,0", "--batch: item 2 is '0'; it must be a whole number of 1 to 1,000,000,000"),
        ("-1", "--batch: item 1 is '-1'"),
        ("1.5", "--batch: item 1 is '1.5'"),
        ("1e3", "--batch: item 1 is '1e3'"),
        ("1000000001", "--batch: item 1 is '1000000001'"),
        ("9" * 5000, "--batch: item 1 is '999"),
        ("\u0663", "--batch: item 1 is '\u0663'"),
        ("8,16,08", "--batch: item 3, 8, is there already"),
        (",".join(["7"] * 10_001), "--batch has 10,001 items"),
    ],
)
def test_wrong_numbers(text: str, message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        parse_numbers("--batch", text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("parse", "text", "error", "message"),
    [
        (parse_clusters, "h100-sxm:4,h100-sxm:4", WorkloadError, "--cluster: item 2, 'h100-sxm:4', is there already"),
        (parse_clusters, "h100-sxm:4,", WorkloadError, "--cluster: item 2"),
        (
            parse_clusters,
            "h100-sxm:4,h100:4",
            HardwareError,
            "item 2: device 'h100' is not in the catalogue",
        ),
        (parse_clusters, "h100-sxm", HardwareError, "--cluster: item 1: cluster 'h100-sxm' is not understood"),
        (parse_clusters, "missing.toml", HardwareError, "--cluster: item 1: cluster file missing.toml"),
    ],
)
def test_wrong_clusters(
    parse: Callable[[str, str], object], text: str, error: type[InvalidInputError], message: str
) -> None:
    with pytest.raises(error) as caught:
        parse("--cluster", text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "item 1 is 'int4'; known are float16, bfloat16"),
        ("float16,float16", "is there already"),
        (",", "empty"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match="--dtype: ") as caught:
        parse_names("--dtype", text, ("float16", "bfloat16"))
    assert message in str(caught.value)


# Table and CSV


def test_the_table_shows_every_point(varied: tuple[Point, ...]) -> None:
    text = as_text(sweep_table(varied))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    words = " ".join(text.split())
    for point in varied:
        if point.outcome == "planned":
            assert f"{point.tokens_per_second:,.0f} {format_seconds(point.bottleneck_seconds)}" in words
    assert words.count("mostly KV cache") == sum(point.outcome == "does not fit" for point in varied)
    headings = text.splitlines()[0].split()
    assert headings[:6] == ["cluster", "stages", "dtype", "weights", "sequence", "batch"]


def test_layers_per_stage_are_joined() -> None:
    points = sweep(profile_of, grid("h100-sxm:8,h100-sxm:1"), Workload(batch=1, sequence=1))
    sizes = [high - low for low, high in itertools.pairwise(points[0].boundaries)]
    assert sizes == [3, 2, 2, 2, 2, 2, 2, 4]
    first, second = as_text(sweep_table(points)).splitlines()[-2:]
    assert first.endswith("3, 6 x 2, 4")
    assert second.endswith("19")


def test_what_is_the_same_stands_in_the_title() -> None:
    points = sweep(profile_of, grid(batches=(8, 256)), DECODE)
    assert sweep_title(points) == "dense16, decode, for throughput: h100-sxm:8, float16, sequence 2,048"
    headings = as_text(sweep_table(points)).splitlines()[0].split()
    assert headings[0] == "batch"
    assert "room" in headings
    headings = as_text(sweep_table(sweep(profile_of, grid(dtypes=("float16", "bfloat16")), DECODE))).split()
    assert "dtype" in headings
    assert "weights" not in headings  # as the dtype in every point
    assert "room" not in as_text(sweep_table(sweep(profile_of, grid(), Workload(phase="train", batch=1, sequence=1))))


def test_the_report_names_the_fastest_point(varied: tuple[Point, ...]) -> None:
    best = max((point for point in varied if point.tokens_per_second), key=lambda point: point.tokens_per_second)
    last = as_text(sweep_report(varied)).splitlines()[-1]
    assert last == (
        f"most tokens/s: {best.tokens_per_second:,.0f} with cluster {best.cluster}, dtype {best.dtype}, "
        f"weights {best.weight_dtype}, sequence {best.sequence:,}, batch {best.batch:,}"
    )


def test_any_cluster_name_can_be_shown() -> None:
    devices = Cluster.parse("h100-sxm:2")
    names = ("[bold]x[/bold]", "日本.toml", "a" * 200 + ".toml", "a,b\n.toml")
    wide = Grid(clusters=dict.fromkeys(names, devices), batches=(8,), sequences=(512,))
    points = sweep(profile_of, wide, DECODE)
    text = "".join(as_text(sweep_report(points)).split())
    assert "[bold]x[/bold]" in text
    assert [row["cluster"] for row in csv.DictReader(io.StringIO(sweep_csv(points), newline=""))] == [*names]


def test_csv_gives_the_same_figures_again(varied: tuple[Point, ...], tmp_path: Path) -> None:
    save_csv(varied, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(varied)
    for row, point in zip(rows, varied, strict=True):
        assert row["cluster"] == point.cluster
        assert (row["batch_sequences"], row["sequence_tokens"]) == (str(point.batch), str(point.sequence))
        assert row["outcome"] == point.outcome
        assert row["reason"] == point.reason
        for name in ("tokens_per_second", "bottleneck_seconds", "latency_seconds", "memory_share", "bubble_fraction"):
            assert (float(row[name]) if row[name] else None) == getattr(point, name)
        for name in ("max_sequences", "num_stages", "num_devices"):
            assert (int(row[name]) if row[name] else None) == getattr(point, name)
        assert (row["micro_batch_sequences"] or None) == (point.micro_batch and str(point.micro_batch))
        assert (tuple(map(int, row["boundaries"].split())) or None) == point.boundaries
    assert sweep_csv(varied) == sweep_csv(varied)
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.csv"]


def test_csv_that_can_not_be_written(varied: tuple[Point, ...], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="can't be written"):
        save_csv(varied, tmp_path / "missing" / "sweep.csv")
    odd = dataclasses.replace(varied[0], cluster="\udcff.toml")
    with pytest.raises(InvalidInputError, match="can't be written"):
        save_csv([odd], tmp_path / "sweep.csv")
    assert not list(tmp_path.iterdir())
