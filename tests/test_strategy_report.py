"""Strategies as text and picture: every figure legible, every claim true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from dense16 import DENSE16, dense
from small_cases import FREE, device

from lp_plugin import Cluster, InvalidInputError, LayerCost, ModelProfile, Workload
from lp_plugin.report import WIDTH, as_text
from lp_plugin.strategy.compare import Study, filling_crossover, study, sweep_crossover
from lp_plugin.strategy.picture import strategy_picture
from lp_plugin.strategy.report import equal_batch_table, footprint, strategy_report, strategy_table, sweep_table

RULE = re.compile(r"^ ─+$")


@pytest.fixture(scope="module")
def reference() -> Study:
    profile = ModelProfile.from_config(DENSE16)
    return study(profile, Cluster.parse("h100-sxm:16"), Workload(batch=1024, sequence=10_000))


@pytest.fixture(scope="module")
def text(reference: Study) -> str:
    return as_text(strategy_report(reference))


def rows(table: str) -> list[str]:
    lines = table.splitlines()
    start = next(index for index, line in enumerate(lines) if RULE.match(line))
    return [line.strip() for line in lines[start + 1 :]]


def test_the_footprint_of_the_reference(reference: Study) -> None:
    shown = "\n".join(as_text(part) for part in footprint(reference))
    (blocks,) = [line for line in shown.splitlines() if "block" in line]
    assert "1.61 GB" in blocks
    assert "25.8 GB in all, against 1.28 TB of device memory (1.15 TB usable)" in shown
    assert "168 GB of the whole batch at a stage boundary, 164 MB of one sequence" in shown
    assert "524 kB per token, 5.37 TB of the whole batch: 214 of 1,024 sequences fit at most" in shown


def test_the_report_of_the_reference(reference: Study, text: str) -> None:
    words = " ".join(text.split())
    assert text.startswith("dense16 in float16 on 16 x h100-sxm in 2 nodes of 8\n")
    assert "left out: TP=16, a group would reach across 2 nodes of 8 devices" in words
    for comparison in reference.comparisons:
        assert f"{comparison.workload.phase}: batch 1,024 x sequence 10,000" in words
        assert comparison.verdict in words
    assert "214 of 1,024" in text
    assert "at an equal batch of 128" in text
    assert text.count("micro-batches swept") == 2


def test_a_row_per_strategy_the_best_first(reference: Study) -> None:
    for comparison in reference.comparisons:
        shown = rows(as_text(strategy_table(comparison, reference.swept[0])))
        assert len(shown) == len(comparison.outcomes)
        for line, outcome in zip(shown, comparison.outcomes, strict=True):
            assert line.startswith(outcome.strategy.label + " ")
            assert f" {outcome.tokens_per_second:,.0f} " in line
            assert f" {outcome.num_micro_batches:,} x {outcome.micro_batch:,} " in line
            assert f"{outcome.schedule_bound:.1%}" in line
            assert f"{outcome.roofline_share:.1%}" in line
            assert bool(re.search(r" \*( T)?( L)?$", line)) == outcome.on_front
        assert shown[0].endswith((" T", " T L"))
        assert sum(line.endswith("L") for line in shown) == 1


def test_rates_are_compared_with_the_baseline(reference: Study) -> None:
    comparison = reference.comparisons[0]
    shown = rows(as_text(strategy_table(comparison, reference.swept[0])))
    baseline = comparison.of(reference.swept[0])
    best = comparison.outcomes[0]
    assert baseline is not None
    assert f" {best.tokens_per_second / baseline.tokens_per_second - 1:+.0%} " in shown[0]
    assert f" {best.dram_bytes_per_token / baseline.dram_bytes_per_token - 1:+.0%} " in shown[0]
    (own,) = [line for line in shown if line.startswith("TP=8 x PP=2")]
    assert not re.search(r"[+-]\d+% ", own)


def test_decode_shows_what_a_sequence_waits_and_what_the_rate_is(reference: Study) -> None:
    table = as_text(strategy_table(reference.comparisons[1], reference.swept[0]))
    heading = table.splitlines()[0].split()
    assert {"TPOT", "1/TPS"} <= set(heading)
    assert "TPOT" not in as_text(strategy_table(reference.comparisons[0], reference.swept[0]))


def test_the_sweep_of_the_reference(reference: Study, text: str) -> None:
    for sweep in reference.sweeps:
        shown = rows(as_text(sweep_table(sweep, reference.swept)))
        fitting = [row for row in sweep if any(row.outcomes)]
        assert [line.split()[0] for line in shown] == [f"{row.num_micro_batches:,}" for row in fitting]
        assert sum(line.count("<") for line in shown) == 3  # the best m of each strategy
        for line, row in zip(shown, fitting, strict=True):
            assert line.split().count("-") % row.outcomes.count(None) == 0 if None in row.outcomes else "-" not in line
    words = " ".join(text.split())
    for sweep in reference.sweeps:
        assert f"PP=16 is ahead of TP=8 x PP=2 from m = {sweep_crossover(sweep, 2, 0):,} on" in words
    last = reference.sweeps[0][-1].outcomes
    assert last[2] is not None
    assert last[0] is not None
    count = filling_crossover(last[2], last[0])
    assert (
        f"PP=16 is ahead of TP=8 x PP=2 once a replica has {count} of them (bound {count / (count + 15):.1%})" in words
    )  # type: ignore[operator]


def test_the_equal_batch_of_the_reference(reference: Study, text: str) -> None:
    shown = rows(as_text(equal_batch_table(reference.equal_batch)))
    assert [line.split("  ")[0] for line in shown] == ["TP=8 x PP=2", "DP=16", "PP=16"]
    assert "A stage reads its weights again for every micro-batch: 3.22 GB per token in PP=16 (16)" in text


@pytest.mark.parametrize("phase", ["prefill", "train"])
@pytest.mark.parametrize(
    ("spec", "batch"), [("h100-sxm:1", 1), ("h100-sxm:6", 7), ("h100-sxm:16", 1024), ("h100-sxm:64", 1_000_000)]
)
def test_every_line_fits_the_width_and_no_figure_is_cut_off(phase: str, spec: str, batch: int) -> None:
    made = study(dense(num_hidden_layers=14), Cluster.parse(spec), Workload(phase=phase, batch=batch, sequence=4096))
    report = as_text(strategy_report(made))
    assert "…" not in report
    assert max(map(len, report.splitlines())) <= WIDTH
    assert "nan" not in report


def test_a_pipeline_that_never_catches_up_is_said_so() -> None:
    """Two uneven layers on two devices: replicas of both are always ahead."""
    layers = tuple(LayerCost(name=f"layer {flops}", flops_per_token=flops) for flops in (9.0, 1.0))
    profile = ModelProfile(name="uneven", layers=layers, dtype="float16", input_bytes_per_token=0.0)
    made = study(profile, Cluster.homogeneous(device(1000), 2, FREE), Workload(batch=4, sequence=1))
    report = as_text(strategy_report(made))
    assert "PP=2 is not ahead of DP=2 at equal m" in report
    assert "PP=2 stays behind DP=2 however long the batch is" in report


def test_what_does_not_fit_is_listed_with_its_reason() -> None:
    profile = ModelProfile.from_costs([1.0] * 4, weight_bytes=[300] * 4)
    made = study(profile, Cluster.homogeneous(device(1000), 2, FREE), Workload(batch=8, sequence=1, micro_batch=1))
    report = as_text(strategy_report(made))
    assert "does not fit: DP=2 needs 1.20 kB on a device with 1.00 kB usable" in report
    assert "micro-batches swept" not in report  # it was given
    assert "KV cache" not in report.split("prefill:")[1]


@pytest.fixture(scope="module")
def nothing_fits() -> Study:
    profile = ModelProfile.from_costs([1.0] * 4, weight_bytes=[3000] * 4)
    return study(profile, Cluster.homogeneous(device(1000), 2, FREE), Workload(batch=8, sequence=1))


def test_nothing_fits(nothing_fits: Study) -> None:
    report = as_text(strategy_report(nothing_fits))
    assert "Nothing fits; nearest to it is PP=2, which needs 6.00 kB on a device with 1.00 kB usable." in report
    assert report.count("does not fit: ") == 3


def test_a_model_that_costs_nothing_can_be_reported_but_not_drawn(tmp_path: Path) -> None:
    made = study(
        ModelProfile.from_costs([0, 0]), Cluster.homogeneous(device(10), 2, FREE), Workload(batch=2, sequence=1)
    )
    assert "inf tokens/s" in as_text(strategy_report(made))
    with pytest.raises(InvalidInputError, match="takes no time"):
        strategy_picture(made, tmp_path / "none.png")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_written(reference: Study, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"strategies{suffix}"
    strategy_picture(reference, target)
    assert target.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_the_picture_names_every_strategy(reference: Study, tmp_path: Path) -> None:
    target = tmp_path / "strategies.svg"
    strategy_picture(reference, target)
    drawn = target.read_text(encoding="utf-8")  # matplotlib leaves each text as a comment beside its glyphs
    for comparison in reference.comparisons:
        for outcome in comparison.outcomes:
            assert f"<!-- {outcome.strategy.label} -->" in drawn
    for words in ("prefill: 1,024 sequences of 10,000 tokens", "decode: 128-214 of 1,024 sequences of 10,000 tokens"):
        assert f"<!-- {words} -->" in drawn


def test_a_picture_without_sweep(tmp_path: Path) -> None:
    workload = Workload(phase="train", batch=8, sequence=16, micro_batch=2)
    made = study(dense(num_hidden_layers=2), Cluster.parse("h100-sxm:2"), workload)
    strategy_picture(made, tmp_path / "strategies.svg")
    drawn = (tmp_path / "strategies.svg").read_text(encoding="utf-8")
    assert "<!-- train: 8 sequences of 16 tokens -->" in drawn
    assert "tokens/s over micro-batches" not in drawn


def test_pictures_that_can_not_be_drawn(reference: Study, nothing_fits: Study, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nothing to draw"):
        strategy_picture(nothing_fits, tmp_path / "none.png")
    with pytest.raises(InvalidInputError, match="can't be written"):
        strategy_picture(reference, tmp_path / "missing" / "picture.png")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_loaded_for_pictures_alone() -> None:
    code = "import sys, lp_plugin.strategy.report, lp_plugin.strategy.picture; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_studies_are_repeatable() -> None:
    def made() -> str:
        return as_text(strategy_report(study(dense(), Cluster.parse("h100-sxm:4"), Workload(batch=64, sequence=512))))

    assert made() == made()
