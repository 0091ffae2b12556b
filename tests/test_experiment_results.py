"""Results as JSON and back, and files that are none."""

import dataclasses
import json
from pathlib import Path

import pytest
from made_up_results import results

from lp_plugin.bench.experiment.results import load_results, save_results
from lp_plugin.errors import InvalidInputError


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = results()
    save_results(made, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == made


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
