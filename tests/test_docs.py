"""The documentation is true: its sessions run, its links lead somewhere, its files are there."""

import dataclasses
import doctest
import re
from pathlib import Path
from typing import get_args

import pytest

from lp_plugin.bench.experiment.report import TABLES
from lp_plugin.bench.experiment.settings import Case, Execution, Experiment, Partition, ScaleOut

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
SESSIONS = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(>>> .*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def test_there_are_sessions_to_run() -> None:
    assert {page.name for page, _, _ in SESSIONS} >= {"README.md", "planning.md"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("page", "number", "block"), SESSIONS, ids=lambda value: getattr(value, "name", None))
def test_a_session_prints_what_the_page_says(
    page: Path, number: int, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parsed = doctest.DocTestParser().get_doctest(block, {}, f"{page.name}[{number}]", str(page), 0)
    report: list[str] = []
    result = doctest.DocTestRunner().run(parsed, out=report.append)
    assert result.attempted > 0
    assert not result.failed, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_word_of_an_experiment_is_explained() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    keys = {field.name for kind in (Experiment, Case, ScaleOut) for field in dataclasses.fields(kind)}
    words = keys - {"config", "cases"} | {"model", "changes", "[[case]]", "[[scale_out]]"}
    words |= {*get_args(Partition), *get_args(Execution), "dp=N", "tp=N", "pp=N", "1"}
    assert {word for word in words if not re.search(rf"`{re.escape(word)}`|\[{re.escape(word)}\]", page)} == set()
    assert {name for name in TABLES if f"--table {name}`" not in page} == set()
