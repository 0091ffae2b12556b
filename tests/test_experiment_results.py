"""Results as JSON and back, and files that are none."""

import dataclasses
import json
from pathlib import Path

import pytest
from made_up_results import results

from lp_plugin.bench.experiment.output import keep, made_folder, report_again
from lp_plugin.bench.experiment.results import load_results, save_results
from lp_plugin.errors import InvalidInputError
from lp_plugin.report import console


def test_what_is_saved_is_loaded_but_for_spans(tmp_path: Path) -> None:
    made = results()
    save_results(made, tmp_path / "results.json")
    found = load_results(tmp_path / "results.json")
    spans = 0
    for case, saved in zip(made.cases, found.cases, strict=True):
        for row, kept in zip(case.rows, saved.rows, strict=True):
            for own, other in zip(row.split, kept.split, strict=True):
                spans += len(own.spans)
                assert dataclasses.replace(own, spans=()) == other
            assert dataclasses.replace(row, split=()) == dataclasses.replace(kept, split=())
        assert dataclasses.replace(case, rows=()) == dataclasses.replace(saved, rows=())
    assert spans
    assert dataclasses.replace(made, cases=()) == dataclasses.replace(found, cases=())


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InvalidInputError, match=r"results\.json can't be read"):
        load_results(path)
    save_results(results(), path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"results\.json: the file: Invalid JSON"):
        load_results(path)
    plain = dataclasses.asdict(results())
    plain["cases"][0]["rows"][0]["seconds"] = ["soon"]
    path.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"cases\.0\.rows\.0\.seconds\.0: Input should be a valid number"):
        load_results(path)
    path.write_text(json.dumps(dataclasses.asdict(results()) | {"schema_version": 99}), encoding="utf-8")
    with pytest.raises(InvalidInputError, match="has schema 99; this version reads 1"):
        load_results(path)


@pytest.mark.parametrize(("field", "value"), [("tokens", 0), ("rows", float("nan"))])
def test_edited_figures_without_sense_are_told(tmp_path: Path, field: str, value: float) -> None:
    path = tmp_path / "results.json"
    made = dataclasses.asdict(results())
    if field == "rows":
        made["cases"][0]["rows"][0]["seconds"] = [value]
    else:
        made["cases"][0][field] = value
    path.write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"no report can be made of .*results.json: .* has it been edited"):
        report_again(console(), tmp_path, tables=("performance", "footprint"))
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_that_holds_no_results_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match=r"folder .*out can't be written"):
        made_folder(tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"the results can't be written to .*results.json"):
        keep(results(), tmp_path / "out")
    assert made_folder(tmp_path / "new" / "one").is_dir()
    assert not list((tmp_path / "new" / "one").iterdir())
