"""The published figures with ours beside them: each from the rows it speaks of, or the reason why there is none."""

import dataclasses

from made_up_results import BLOCK_SECONDS, SMALL, decode_case, layer_times, prefill_case, results, simulated

from lp_plugin.bench.experiment.paper import paper_table
from lp_plugin.bench.experiment.report import TABLES
from lp_plugin.bench.experiment.results import CaseResult, Results, SimulatedRow


def ours(*cases: CaseResult, rows: tuple[SimulatedRow, ...] = ()) -> dict[str, str]:
    """Our side of each figure."""
    found = Results(command="x", experiment="x", title="x", trials=5, cases=cases, simulated=rows)
    table = paper_table(found, TABLES)
    assert table is not None
    return {row[0]: row[table.headings.index("ours")] for row in table.rows}


def test_every_published_table_is_there_and_explained() -> None:
    table = paper_table(results(), TABLES)
    assert table is not None
    assert [row[0] for row in table.rows] == [
        "tokens/s",
        "TPOT",
        "compute / memory / synchronisation",
        "cache hits",
        "DRAM traffic",
        "NVLink use of peak",
        "one layer",
        "5 runs",
        "8, 12, 16 GPUs",
    ]
    assert all(row[3] and row[4] for row in table.rows)
    scaling = paper_table(results(), ["scaling"])
    assert scaling is not None
    assert [row[0] for row in scaling.rows] == ["8, 12, 16 GPUs"]
    assert paper_table(results(), []) is None


def test_without_measurements_each_says_so() -> None:
    found = ours()
    assert all(text.startswith(("not measured: ", "not simulated: ")) for text in found.values())
    alone = dataclasses.replace(prefill_case(), baseline="dp=2")
    assert "no prefill case has both" in ours(alone)["tokens/s"]


def test_ratios_shares_and_footprints() -> None:
    case = prefill_case()
    found = ours(case, rows=simulated())
    ratio = case.rows[0].median_seconds / case.rows[1].median_seconds
    assert found["tokens/s"].startswith(f"{ratio:.3f} [")
    assert f"({case.name}: pp=2 against tp=2)" in found["tokens/s"]
    assert found["tokens/s"].endswith("simulated: +17.8% on 8, -18.1% on 12, +17.0% on 16")
    assert found["TPOT"].startswith(f"1/TPS {1 / ratio - 1:+.1%}")
    assert "tp=2 computing 90.0%, not computing 10.0%" in found["compute / memory / synchronisation"]
    assert found["one layer"].startswith("weights 1.61 GB, output and buffers 358 MB")
    assert "PP 8: 1.00, 12: 1.01, 16: 1.93" in found["8, 12, 16 GPUs"]
    assert "DP 8: 1.00, 12: 1.50, 16: 1.99" in found["8, 12, 16 GPUs"]
    rows = tuple(row for row in simulated() if row.devices > 8 or row.granularity == "layer")
    without = ours(case, rows=rows)
    assert "PP, sub-layer cuts 12: 1.37, 16: 1.93" in without["8, 12, 16 GPUs"]  # over 8 devices with whole layers
    assert found["cache hits"] == "not measured: no case asks for counters"


def test_counters_and_their_reasons() -> None:
    found = ours(decode_case())
    assert found["cache hits"] == "small stages, decode, pp=2: 98.4%"
    assert found["DRAM traffic"] == "small stages, decode, pp=2: -100.0% counted"
    assert found["TPOT"].startswith("TPOT 49")
    rows = decode_case().rows
    closed = ours(dataclasses.replace(decode_case(), rows=rows[:1]))
    assert closed["cache hits"] == "not measured: ncu: ERR_NVGPUCTRPERM, no permission"
    assert "only shares compare" in found["one layer"]


def test_dram_traffic_is_of_all_devices_that_share_a_micro_batch() -> None:
    case = decode_case()
    read = {"dram_read_bytes": 40e6, "dram_write_bytes": 10e6}
    shared = dataclasses.replace(case.rows[0], counters=(dataclasses.replace(case.rows[0].counters[0], **read),))
    halves = tuple(dataclasses.replace(each, **read) for each in case.rows[1].counters)
    piped = dataclasses.replace(case.rows[1], counters=halves)
    assert ours(dataclasses.replace(case, rows=(shared, piped)))["DRAM traffic"].endswith("pp=2: 0.0% measured")
    lone = dataclasses.replace(piped, counters=halves[:1])
    assert "counted" not in ours(dataclasses.replace(case, rows=(shared, lone)))["DRAM traffic"]


def test_cases_of_the_published_width_come_first() -> None:
    small = dataclasses.replace(
        prefill_case(), name="small", model=SMALL, layers=(layer_times(SMALL, 1, BLOCK_SECONDS, fits=True),)
    )
    found = ours(small, prefill_case())
    assert found["tokens/s"].index("reference layers") < found["tokens/s"].index("small")
    assert "reference layers" in found["one layer"]
