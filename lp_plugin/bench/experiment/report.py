"""The report of an experiment: one set of tables as Markdown, as an HTML page and on the console, with its pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from rich.console import Console

from lp_plugin.bench.experiment.derived import (
    baseline_row,
    bubble_limit,
    error_summary,
    proposed_row,
    row_figures,
    rows_that_ran,
    why_nothing_ran,
)
from lp_plugin.bench.experiment.device_tables import (
    clocks_table,
    footprint_table,
    memory_access_table,
    memory_table,
    time_split_table,
)
from lp_plugin.bench.experiment.document import Block, Files, Picture, Section, figures_table, tables_of
from lp_plugin.bench.experiment.html import as_html
from lp_plugin.bench.experiment.markdown import as_markdown
from lp_plugin.bench.experiment.paper import paper_table
from lp_plugin.bench.experiment.pictures import (
    footprint_picture,
    performance_picture,
    prediction_picture,
    scaling_picture,
)
from lp_plugin.bench.experiment.prediction_tables import cut_table, error_table, prediction_table
from lp_plugin.bench.experiment.results import CaseResult, Environment, Results
from lp_plugin.bench.experiment.scaling import scaling_tables
from lp_plugin.bench.experiment.tables import (
    bubble_table,
    case_line,
    configurations_table,
    consistency_table,
    performance_table,
)
from lp_plugin.bench.experiment.timelines import spans_picture, split_picture, trace_of
from lp_plugin.bench.experiment.wording import change_text, file_names, in_one_line, ratio_text, share_text, tokens_text
from lp_plugin.errors import InvalidInputError
from lp_plugin.files import read_bytes, write_atomically

__all__ = ["TABLES", "chosen_tables", "print_tables", "write_report"]

TABLES = ("performance", "time-split", "memory-access", "footprint", "consistency", "scaling")
"""What can be asked for, in the order of the report."""

_MOST_BYTES = 2**24  # of a report that is replaced; a hundred times as much as one has
_OWN_FILES = re.compile(
    r"[^/]+-(performance|split|footprint)\.png|timeline-[^/]+--[^/]+\.(png|json)|(scaling|predictions)\.png"
)


def write_report(results: Results, folder: str | Path, tables: Sequence[str] = ()) -> tuple[Path, ...]:
    """Writes ``report.md``, ``report.html``, pictures and timelines; existing ones are replaced, each as a whole.

    Args:
        results: What was measured.
        folder: Where to write. Pictures and timelines that the report there links, and this one does not, go.
        tables: Of `TABLES`; none means all.

    Returns:
        The report as Markdown and as HTML.

    Raises:
        InvalidInputError: If a table is unknown or a file can't be written.
    """
    folder = Path(folder)
    try:
        blocks = _blocks(results, chosen_tables(tables), folder)
        written = (folder / "report.md", folder / "report.html")
        before = _linked(written[0])
        write_atomically(written[0], as_markdown(results.title, blocks))
        write_atomically(written[1], as_html(results.title, blocks, folder))
        for name in before - _linked(written[0]):
            if not name.startswith("timeline-") or _has_spans(results):  # else it can't be made again
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInputError(f"the report can't be written to {folder}: {error}.") from error
    return written


def _has_spans(results: Results) -> bool:
    """Whether they come from the run, not from a file."""
    return any(split.spans for case in results.cases for row in case.rows for split in row.split)


def _linked(report: Path) -> set[str]:
    """Files beside a report that it has made itself: pictures and timelines, by the names that they get."""
    if not report.is_file():
        return set()
    text = read_bytes(report, _MOST_BYTES, "it is no report; move it away.").decode(errors="replace")
    links = re.findall(r"\]\(([^()/]+)\)", text)
    return {name for name in map(unquote, links) if _OWN_FILES.fullmatch(name)}


def print_tables(console: Console, results: Results, tables: Sequence[str] = ()) -> None:
    """The same tables on the console, after what came out in sentences.

    Args:
        console: Where.
        results: What was measured.
        tables: Of `TABLES`; none means all.

    Raises:
        InvalidInputError: If a table is unknown.
    """
    for heading, figures in tables_of(_sections(results, chosen_tables(tables), None)):
        console.print(figures_table(figures, heading))
    for sentence in _findings(results):
        console.print(sentence, markup=False, highlight=False)


def chosen_tables(tables: Sequence[str]) -> tuple[str, ...]:
    """The tables that were asked for, all if none were, in the order of the report.

    Raises:
        InvalidInputError: If a name is unknown.
    """
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise InvalidInputError(f"--table {unknown[0]!r} is unknown; give of: {', '.join(TABLES)}.")
    return tuple(name for name in TABLES if name in tables or not tables)


def _blocks(results: Results, tables: Sequence[str], folder: Path) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [f"Made by: {results.command}", *_findings(results), *_sections(results, tables, folder)]
    published = paper_table(results, tables)
    if published is not None:
        blocks.append(Section(title="Beside the published figures", blocks=(published,)))
    return [*blocks, Section(title="Environment", blocks=_environments(results))]


def _sections(results: Results, tables: Sequence[str], folder: Path | None) -> list[Section]:
    """One per table asked for; without a folder no pictures are drawn and no timelines written."""
    sections = []
    files = file_names([case.name for case in results.cases])
    for name in tables:
        title, per_case, missing = _SECTIONS[name]
        inside: list[Block] = []
        for case in results.cases:
            found = per_case(case, folder, files[case.name])
            if found:
                inside.append(Section(title=case.name, blocks=tuple(found)))
        inside += _over_all_cases(name, results, folder)
        sections.append(Section(title=title, blocks=tuple(inside) or (missing,)))
    return sections


def _findings(results: Results) -> list[str]:
    """What came out, a sentence or two per case."""
    found = [sentence for case in results.cases if (sentence := _finding(case))]
    for each in error_summary(results.cases):
        found.append(
            f"Predictions from {each.source}: median error {share_text(each.median)}, worst {change_text(each.worst)} "
            f"({each.where}), over {each.count} configurations."
        )
    return found


def _finding(case: CaseResult) -> str:
    baseline, proposed = baseline_row(case), proposed_row(case)
    ran = rows_that_ran(case)
    note = in_one_line(case.note)
    if not ran:
        if why_nothing_ran(case):
            return f"{case.name}: nothing ran. {in_one_line(case.reason)}".strip()
        return f"{case.name}: {note}." if note else ""  # no table that was asked for needs trials
    best = min(ran, key=lambda row: row.median_seconds)
    parts = [f"{case.name}: fastest is {best.name} with {tokens_text(case.tokens / best.median_seconds)} tokens/s"]
    if baseline is not None and proposed is not None:
        ratio = ratio_text(row_figures(case, proposed).ratio)
        parts.append(f"{proposed.name} makes {ratio} times the tokens/s of {baseline.name}")
        limit = bubble_limit(case, proposed)
        if limit is not None:
            parts.append(f"{share_text(limit.share_of_bound)} of its bubble bound")
    parts += _by_stages_alone(case)
    failed = [row.name for row in case.rows if row.reason]
    if failed:
        parts.append(f"left out: {', '.join(failed)}")
    if note:
        parts.append(note)
    return "; ".join(parts) + "."


def _by_stages_alone(case: CaseResult) -> Iterator[str]:
    """Of pipelines that had too few GPUs."""
    for row in case.rows:
        limit = None if row.seconds else bubble_limit(case, row)
        if limit is not None and limit.stages_over_baseline is not None:
            rate = f"{limit.stages_over_baseline:.3f} times the tokens/s of {case.baseline}"
            yield f"by its stages alone {row.name} would make {rate}"


def _performance(case: CaseResult, folder: Path | None, file: str) -> list[Block]:
    if not case.rows:
        return [case_line(case), f"Not run: {in_one_line(case.reason)}"]
    note = f"{case.name} {in_one_line(case.note)}." if case.note else None
    blocks: list[Block | None] = [case_line(case), note, performance_table(case)]
    if folder is not None and performance_picture(case, folder / f"{file}-performance.png"):
        caption = f"{case.name}: tokens per second, and the ratio to {case.baseline}"
        blocks.append(Picture(file=f"{file}-performance.png", caption=caption))
    blocks += [configurations_table(case), bubble_table(case), clocks_table(case)]
    blocks += [prediction_table(case), cut_table(case)]
    return [block for block in blocks if block is not None]


def _time_split(case: CaseResult, folder: Path | None, file: str) -> list[Block]:
    table = time_split_table(case)
    if table is None:
        return []
    blocks: list[Block] = [table]
    if folder is None:
        return blocks
    if split_picture(case, folder / f"{file}-split.png"):
        blocks.append(Picture(file=f"{file}-split.png", caption=f"{case.name}: where each rank's time went"))
    names = file_names([row.name for row in case.rows])
    traces = []
    for row in case.rows:
        name = f"{file}--{names[row.name]}"
        picture, trace = folder / f"timeline-{name}.png", folder / f"timeline-{name}.json"
        if spans_picture(case, row, picture):
            write_atomically(trace, trace_of(row))
        if row.split and picture.exists():  # perhaps of the run itself: results that were saved have no spans
            blocks.append(Picture(file=picture.name, caption=f"{case.name}, {row.name}: what each rank did when"))
        if row.split and trace.exists():
            traces.append(trace.name)
    if traces:
        blocks.append(Files(text="The same for ui.perfetto.dev, beside this report", names=tuple(traces)))
    return blocks


def _memory_access(case: CaseResult, folder: Path | None, file: str) -> list[Block]:
    table = memory_access_table(case)
    return [] if table is None else [table]


def _footprint(case: CaseResult, folder: Path | None, file: str) -> list[Block]:
    blocks: list[Block] = [table for table in (footprint_table(case), memory_table(case)) if table is not None]
    if folder is not None and footprint_picture(case, folder / f"{file}-footprint.png"):
        blocks.append(Picture(file=f"{file}-footprint.png", caption=f"{case.name}: memory, predicted and measured"))
    return blocks


def _consistency(case: CaseResult, folder: Path | None, file: str) -> list[Block]:
    return [consistency_table(case)] if case.rows else []


def _nothing(case: CaseResult, folder: Path | None, file: str) -> list[Block]:
    return []


_SECTIONS: dict[str, tuple[str, Callable[[CaseResult, Path | None, str], list[Block]], str]] = {
    "performance": ("Performance", _performance, "Not measured: no case ran."),
    "time-split": ("Time split", _time_split, "Not measured: no trial was profiled."),
    "memory-access": ("Memory access", _memory_access, "Not measured: no case asks for counters."),
    "footprint": ("Footprint", _footprint, "Not measured: no layer was timed."),
    "consistency": ("Consistency", _consistency, "Not measured: no case ran."),
    "scaling": ("Scaling, simulated", _nothing, "Not simulated: the experiment has no scale_out."),
}


def _over_all_cases(name: str, results: Results, folder: Path | None) -> list[Block]:
    """What a section says about all cases together."""
    blocks: list[Block] = []
    if name == "scaling":
        blocks += scaling_tables(results)
        if folder is not None and scaling_picture(results.simulated, folder / "scaling.png"):
            blocks.append(Picture(file="scaling.png", caption="simulated tokens per second over devices"))
    errors = error_table(results.cases)
    if name == "performance" and errors is not None:
        blocks.append(errors)
        if folder is not None and prediction_picture(results.cases, folder / "predictions.png"):
            blocks.append(Picture(file="predictions.png", caption="predicted against measured seconds of a trial"))
    return blocks


def _environments(results: Results) -> tuple[Block, ...]:
    """Each environment once, with the cases that ran in it."""
    found: dict[str, list[str]] = {}
    for case in results.cases:
        if case.environment is not None:
            found.setdefault(_environment_text(case.environment), []).append(case.name)
    blocks: list[Block] = [f"{', '.join(names)}: {text}" for text, names in found.items()]
    blocks.append(f"{results.trials} trials of each configuration. All figures: results.json.")
    return tuple(blocks)


def _environment_text(environment: Environment) -> str:
    counts = {name: environment.devices.count(name) for name in dict.fromkeys(environment.devices)}
    devices = ", ".join(f"{count} x {name}" for name, count in counts.items())
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    variables = ", ".join(f"{name}={value}" for name, value in environment.variables.items())
    text = f"{devices}; {environment.host}, {environment.cores} cores, {environment.backend}; {versions}"
    return f"{text}; {variables}." if variables else f"{text}."
