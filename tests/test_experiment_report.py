"""The report: the same figures three times, whatever is missing, and nothing it shows taken for markup."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_results import decode_case, prefill_case, results
from rich.console import Console

from lp_plugin.bench.experiment.device_tables import clocks_table, footprint_table
from lp_plugin.bench.experiment.document import Figures, Section, figures_table
from lp_plugin.bench.experiment.html import as_html
from lp_plugin.bench.experiment.markdown import as_markdown
from lp_plugin.bench.experiment.pictures import _layer_bars
from lp_plugin.bench.experiment.report import TABLES, print_tables, write_report
from lp_plugin.bench.experiment.results import Results, Row, load_results, save_results
from lp_plugin.bench.experiment.timelines import trace_of
from lp_plugin.bench.experiment.wording import file_names
from lp_plugin.errors import InvalidInputError
from lp_plugin.report import as_text


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps text and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")
        if tag not in {"img", "meta"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    assert write_report(results(), made) == (made / "report.md", made / "report.html")
    return made


def printed(found: Results, *tables: str) -> str:
    page = Console(file=io.StringIO(), width=250, color_system=None)
    print_tables(page, found, tables)
    return page.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def empty(reason: str = "", rows: tuple[Row, ...] = ()) -> Results:
    case = dataclasses.replace(prefill_case(), rows=rows, layers=(), turns=(), environment=None, reason=reason)
    return Results(command="x", experiment="x", title="x", trials=2, cases=(case,))


def test_the_page_needs_nothing_beside_it(folder: Path) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.sources) == len(list(folder.glob("*.png")))
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe)|https?://", text)


def test_all_three_show_the_same_rows(folder: Path) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")]
        for line in markdown.replace("\\|", "!").splitlines()
        if line.startswith("| ")
    ]
    assert [[cell.replace("|", "!") for cell in row] for row in page.cells] == lines
    shown = printed(results())
    for row in page.cells:
        if len(row) == 11 and row[0] == "pp=2":
            assert all(cell in shown for cell in row)


def test_pictures_and_timelines_lie_beside_it(folder: Path) -> None:
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)]+)\)", markdown))
    assert linked == {path.name for path in folder.iterdir() if path.suffix in {".png", ".json"}}
    name = file_names([prefill_case().name])[prefill_case().name]
    assert {f"{name}-performance.png", f"{name}-split.png", f"timeline-{name}--pp2.json", "scaling.png"} <= linked


def test_timelines_stay_when_a_report_is_made_of_results_that_were_saved(tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    save_results(results(), tmp_path / "results.json")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("timeline-*")}
    for tables in (("performance",), ()):
        write_report(load_results(tmp_path / "results.json"), tmp_path, tables)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("timeline-*")} == before
    assert all(f"({name})" in (tmp_path / "report.md").read_text(encoding="utf-8") for name in before)


def test_what_did_not_run_says_why(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "does not fit: stage 1 needs 160 GB of 141 GB \\| 90% usable" in text
    assert "Not run: 8 processes were asked for, but there are 2 GPUs" in text
    assert "ncu: ERR\\_NVGPUCTRPERM, no permission" in text
    assert "left out: pp=2 parameters with a name that is long" in text


def test_figures_of_the_report(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| dp=2 | DP=2 |  | 0, 19 | 32 x 1 |" in text
    assert "By timed layers, dp=2 was expected to be fastest, and was: regret 0." in text
    assert "MFU and HBM share: not measured, since the peak of this device is not known." in text
    assert "| pp=2 | 0, 9, 19 | 0, 9, 19 | the same |" in text
    assert "| 12 | PP=12 | whole layers | 140,000 | -18.1% | 1.01 of 1.50 |" in text
    assert (
        "| block 0 .. block 15, each of 16 | 1 | eager | 1.61 GB | 1.61 GB | 0.0% | 369 MB | 358 MB | +3.1% |" in text
    )
    assert "| tp=2 | 0 .. 1 |" in text
    assert "A/A control, the baseline against itself in turns of its own:" in text


def test_clocks_beside_the_bound_that_they_explain(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| pp=2 | 0 | 1,490 MHz | 1,525 MHz | -2.3% | 100% | 98% |" in text
    assert "| pp=2 | 1 | 1,980 MHz |  |  | 0% |  |" in text
    assert clocks_table(decode_case()) is None  # of whose rows no clock is known


def test_only_the_tables_asked_for(tmp_path: Path) -> None:
    write_report(results(), tmp_path, ["scaling", "consistency"])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Consistency", "Scaling, simulated", "Beside the published figures", "Environment"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "scaling.png"}
    assert "cache hits" not in text
    with pytest.raises(InvalidInputError, match="table 'speed' is unknown; give of: performance, time-split"):
        write_report(results(), tmp_path, ["speed"])


LOST = Row(
    name="tp=2",
    data_parallel=1,
    tensor_parallel=2,
    pipeline_parallel=1,
    partition="uniform",
    reason="out of memory",
)


@pytest.mark.parametrize("found", [empty("died: signal 9"), empty(rows=(LOST,))])
def test_with_nothing_measured_there_is_still_a_report(tmp_path: Path, found: Results) -> None:
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "died: signal 9" in text or "out of memory" in text
    assert "not measured" in text
    assert "Not simulated" in text
    assert not list(tmp_path.glob("*.png"))
    assert "nothing ran" in printed(found)


def test_one_trial_without_predictions_profile_or_layers(tmp_path: Path) -> None:
    rows = tuple(
        dataclasses.replace(row, seconds=row.seconds[:1], predictions=(), split=(), memory=(), alone_seconds=())
        for row in prefill_case().rows
    )
    found = empty(rows=rows)
    write_report(found, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".md", ".png"]
    assert "[" not in re.findall(r"^\| pp=2 \| eager.*$", (tmp_path / "report.md").read_text(), re.MULTILINE)[0]


def test_a_model_that_is_not_known_any_more_costs_the_footprint_only(tmp_path: Path) -> None:
    case = dataclasses.replace(decode_case(), model={"model_type": "gone"})
    found = Results(command="x", experiment="x", title="x", trials=2, cases=(case,))
    write_report(found, tmp_path, ["footprint"])
    assert "Not measured: no layer was timed." in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_an_earlier_report_has_left_goes_and_nothing_else(tmp_path: Path) -> None:
    write_report(results(), tmp_path, ["time-split", "scaling"])
    assert list(tmp_path.glob("timeline-*.json"))
    own = {"notes-performance.png", "mine.png", "results.json"}
    for name in own:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    with (tmp_path / "report.md").open("a", encoding="utf-8") as report:
        report.write("[mine](mine.png) [results](results.json) [above](../scaling.png)")
    write_report(results(), tmp_path, ["scaling"])
    assert {path.name for path in tmp_path.iterdir()} == own | {"report.md", "report.html", "scaling.png"}


def test_what_went_wrong_after_the_trials_is_said(tmp_path: Path) -> None:
    case = dataclasses.replace(prefill_case(), note="ended: rank 1 was killed")
    found = dataclasses.replace(results(), cases=(case,))
    write_report(found, tmp_path, ["performance"])
    assert "\n\nreference layers, sequence 2048, 2 GPUs ended: rank 1 was killed.\n\n" in (
        tmp_path / "report.md"
    ).read_text(encoding="utf-8")
    assert "; ended: rank 1 was killed." in " ".join(printed(found, "performance").split())


def test_times_of_layers_below_noise_are_no_times() -> None:
    case = decode_case()
    times = dataclasses.replace(case.layers[0], seconds=(0.0, *case.layers[0].seconds[1:]))
    found = dataclasses.replace(results(), cases=(dataclasses.replace(case, layers=(times,)),))
    text = printed(found, "footprint")
    assert "< 1.00 us" in text
    assert " 0 s" not in text


def test_a_layer_timed_in_several_ways_is_one_line() -> None:
    case = decode_case()
    eager = case.layers[0]
    graphs = dataclasses.replace(eager, execution="graphs", seconds=tuple(each / 2 for each in eager.seconds))
    larger = dataclasses.replace(graphs, execution="compiled", peak_bytes=tuple(7 for _ in eager.peak_bytes))
    several = dataclasses.replace(case, layers=(eager, graphs, larger))
    table = footprint_table(several)
    blocks = [row for row in table.rows if row[0].startswith("block")] if table else []
    ways = table.headings.index("timed as") if table else 0
    assert [row[ways] for row in blocks] == ["eager, graphs", "compiled"]
    assert "40.0 us, 20.0 us" in blocks[0]
    bars = [bar.name for bar in _layer_bars(several) if bar.is_predicted]
    assert [name.partition(", ")[2] for name in bars] == ["eager and graphs", "compiled"]
    assert [name.partition(", ")[2] for name in (bar.name for bar in _layer_bars(case))] == ["", ""]


def test_layers_timed_with_different_rows_are_told_apart() -> None:
    case = decode_case()
    fewer = dataclasses.replace(case.layers[0], rows=8)
    table = footprint_table(dataclasses.replace(case, layers=(*case.layers, fewer)))
    blocks = [row for row in table.rows if row[0].startswith("block")] if table else []
    assert table is not None
    assert [row[table.headings.index("rows")] for row in blocks] == ["1", "8"]
    alone = footprint_table(case)
    assert alone is not None
    assert "rows" not in alone.headings


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="the report can't be written to"):
        write_report(results(), tmp_path / "file", ["consistency"])


def test_text_is_never_markup(tmp_path: Path) -> None:
    evil = "<b>|*x*|</b> [a](b) `c` &amp;\nnext"
    table = Figures(title=evil, headings=(evil, "n"), rows=((evil, "1"),), notes=(evil,))
    blocks = [Section(title=evil, blocks=(evil, table))]
    page = Page(as_html(evil, blocks, tmp_path))
    assert page.open == []
    assert page.cells == [[evil, "n"], [evil, "1"]]
    lines = as_markdown(evil, blocks).splitlines()
    assert all(re.search(r"(?<!\\)[<*`\[]", line) is None for line in lines if not line.startswith("**"))
    assert [line for line in lines if line.startswith("|")][1] == "|---|---:|"
    assert "<b>|*x*|</b> [a](b) `c`" in as_text(figures_table(table))


def test_traces_are_complete_events_in_microseconds() -> None:
    row = prefill_case().rows[1]
    events = json.loads(trace_of(row))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == sum(len(split.spans) for split in row.split)
    first = row.split[0].spans[0]
    assert spans[0]["ts"] == first.start_seconds * 1e6
    assert spans[0]["dur"] == pytest.approx((first.stop_seconds - first.start_seconds) * 1e6)
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"
    }
    assert names["process_name", 1, 0] == "rank 1"
    assert {names["thread_name", event["pid"], event["tid"]] for event in spans} == {"stream 7", "stream 25"}


def test_files_get_names_of_their_own() -> None:
    names = file_names(["tp=2 pp=2", "tp2-pp2", "a/../b", "1"])
    assert names == {"tp=2 pp=2": "tp2-pp2", "tp2-pp2": "tp2-pp2-2", "a/../b": "a-..-b", "1": "1"}


def test_every_table_can_be_asked_for_alone() -> None:
    for table in TABLES:
        assert printed(results(), table)
