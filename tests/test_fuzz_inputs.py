"""Damaged files of every kind: a part of `tests/campaigns/fuzz.py`, and what it has found once."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from campaigns.fuzz_workspace import make_model

from lp_plugin import Cluster, ModelConfigError, ModelProfile, PlanFileError, Workload, load_plan, make_plan, save_plan
from lp_plugin.bench.experiment.results import load_results
from lp_plugin.errors import DocumentError, HardwareError, InvalidInputError, LpPluginError, WeightsError
from lp_plugin.files import open_regular, parse_json, read_bytes
from lp_plugin.integrations.transformers.checkpoint import read_headers
from lp_plugin.job.documents import Document, check_characters, read_documents, tokenize
from lp_plugin.job.journal import Journal
from lp_plugin.quantity import said
from lp_plugin.score.scores import Score

COUNT = 200


@pytest.fixture(scope="module")
def campaign() -> Any:
    sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
    try:
        import fuzz
    finally:
        sys.path.pop(0)
    return fuzz


def test_damaged_files_are_read_or_refused(campaign: Any, tmp_path: Path) -> None:
    kinds = campaign.all_kinds(tmp_path)
    cases = [campaign.make_case(kinds, number, seed=2) for number in range(COUNT)]
    ended = list(campaign.run_cases(kinds, cases))
    assert [f"{case.number}, {case.kind}: {each.text}" for case, each in ended if each.outcome == "defect"] == []
    assert len({case.kind for case, _ in ended}) > len(kinds) - 5, "some are rare"
    outcomes = [each.outcome for _, each in ended]
    assert outcomes.count("valid") > COUNT / 10, "some stay sound"
    assert outcomes.count("refused") > COUNT / 2


def test_sound_files_are_read(campaign: Any, tmp_path: Path) -> None:
    kinds = campaign.all_kinds(tmp_path)
    cases = [
        campaign.Case(number=0, kind=kind.name, way=0, trick="", raw=raw) for kind in kinds for raw in kind.seeds[:3]
    ]
    assert {(case.kind, each.outcome, each.text) for case, each in campaign.run_cases(kinds, cases)} == {
        (kind.name, "valid", "") for kind in kinds
    }


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("raise KeyError('a' * 9)", "KeyError: 'aaaaaaaaa'"),
        ("raise SystemExit(1)", "exit code 1"),
        ("raise SystemExit(2)", "exit code 2"),
        ("input()", "killed"),
        ("import os; os._exit(3)", "died"),
        ("import time; time.sleep(1.2)", "took 1.2"),
        ("bytearray(250 * 10**6)", "took 2"),
        ("print('\\x1b[31m')", "control characters"),
    ],
)
def test_a_defect_is_found(
    campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, told: str
) -> None:
    monkeypatch.setattr("lp_plugin.cli.main", lambda: exec(does))  # noqa: S102 - of these lines
    monkeypatch.setattr("fuzz_isolation._PATIENCE_SECONDS", 2.0)
    kind = campaign.Kind(name="any", form="text", file="any.txt", seeds=(b"",), api=Path.read_bytes, commands=((),))
    case = campaign.Case(number=0, kind="any", way=1, trick="", raw=b"")
    ((_, ended),) = campaign.run_cases([kind], [case])
    assert ended.outcome == "defect"
    assert told in ended.text


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "pipe", "/dev/zero", "/dev/stdin"])
def test_what_may_never_end_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a folder or a special file, not a regular file"):
        open_regular(tmp_path / name)


def test_a_size_is_looked_at_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="it has 1,099,511,627,776 bytes, but at most 10 are read; split it"):
        read_bytes(tmp_path / "large", 10, "split it")


def test_a_bound_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    tracemalloc.start()
    assert read_bytes(tmp_path / "small", 2**40, "split it") == b"small"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_json_is_bounded() -> None:
    assert parse_json("[1, 2]", 3) == [1, 2]
    with pytest.raises(ValueError, match="it holds some 4 values, but at most 3 are read"):
        parse_json("[1, 2, 3]", 3)
    with pytest.raises(ValueError, match="its values are nested too deeply"):
        parse_json("[" * 100_000, 10**6)


def test_what_others_say_is_quoted_in_one_short_line() -> None:
    assert said(ValueError("first\nsecond")) == "first"
    assert said(ValueError("\x1b[31mred")) == r"\x1b[31mred"
    assert said(ValueError()) == "ValueError"
    assert len(said(ValueError("x" * 10**6))) < 300


# --- found by the campaign -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"dtype": "x" * 10**5}, {"model_type": "\x1b" * 10**5}, {"quantization_config": {"quant_method": "x" * 10**5}}],
)
def test_a_message_quotes_little_of_a_config(change: dict[str, Any]) -> None:
    with pytest.raises(LpPluginError) as caught:
        ModelProfile.from_config({"model_type": "llama"} | change)
    assert len(str(caught.value)) < 2000
    assert "\x1b" not in str(caught.value)


def test_a_config_of_too_many_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "layer_types": [0] * 200_000}))
    with pytest.raises(ModelConfigError, match=r"it holds some 200,00. values, but at most 100,000 are read"):
        ModelProfile.from_config(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[" * 100_000, "line 1: not valid JSON .its values are nested too deeply"),
        ('{"id": 1, "text": ' + "9" * 5000 + "}", "line 1: not valid JSON .Exceeds the limit"),
        ('{"id": [' + "0," * 50_000 + '0], "text": ""}', r"line 1: \"id\" is .{,200}whole number"),
    ],
)
def test_lines_of_documents(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(DocumentError, match=told):
        read_documents(tmp_path / "in.jsonl")


def test_a_tokenizer_whose_settings_make_no_sense(tmp_path: Path) -> None:
    directory = make_model(tmp_path)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "many"}))
    with pytest.raises(ModelConfigError, match="can't be used: TypeError"):
        tokenize([Document(id=1, text="a")], directory, 64, 300)


def test_a_plan_of_many_wrong_values(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    cluster, workload = Cluster.parse("h100-sxm:1"), Workload(batch=1, sequence=1)
    save_plan(make_plan(ModelProfile.from_costs([1, 2]), cluster, workload), file)
    plan = json.loads(file.read_text())
    for change, told in (
        ({f"key {number}": 0 for number in range(2000)}, "2,000 values are wrong"),
        ({"stages": [{}] * 2000}, "stages.0.start: field required"),
        ({"notes": ["many"] * 2000}, "notes: list should have at most 1000 items"),
        ({"boundaries": [0] * 300_000}, "it holds some 300,... values, but at most 300,000 are read"),
    ):
        file.write_text(json.dumps(plan | change))
        with pytest.raises(PlanFileError, match=told):
            load_plan(file)


def test_results_of_many_wrong_values(tmp_path: Path) -> None:
    for cases, told in ((2000, " values are wrong"), (20_001, "it holds some 20,002 objects, but at most 20,000")):
        (tmp_path / "results.json").write_text(json.dumps({"schema_version": 1, "cases": [{}] * cases}))
        with pytest.raises(InvalidInputError, match=told):
            load_results(tmp_path / "results.json")


def test_names_that_would_act_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema_version": 1, "title": "\x1b[31mred"}))
    with pytest.raises(InvalidInputError, match=r"'\\x1b\[31mred' has control characters"):
        load_results(tmp_path / "results.json")
    with pytest.raises(HardwareError, match="leave out control characters"):
        dataclasses.replace(Cluster.parse("h100-sxm:1").devices[0], name="h100\x00")
    plan = tmp_path / "plan.json"
    save_plan(make_plan(ModelProfile.from_costs([1]), Cluster.parse("h100-sxm:1"), Workload(batch=1, sequence=1)), plan)
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"notes": ["\x9b31mred"]}))
    with pytest.raises(
        PlanFileError, match=r"notes\.0: value error, control characters and half characters can't be shown"
    ):
        load_plan(plan)


def test_an_index_of_many_files(tmp_path: Path) -> None:
    files = {f"tensor {number}": f"{number}.safetensors" for number in range(10_001)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(WeightsError, match="it names 10,001 files"):
        read_headers(tmp_path)


def test_a_document_no_model_can_read_is_not_tokenized() -> None:
    check_characters([Document(id=1, text="x" * 2560)], 10)
    with pytest.raises(DocumentError, match="document 1 has 2,561 characters, but the model allows 10 tokens"):
        check_characters([Document(id=1, text="x" * 2561)], 10)


@pytest.mark.parametrize("path", ["in\0.txt", "x" * 5000 + ".txt"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(DocumentError, match="can't be read"):
        read_documents(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"index": 1.0, "num_tokens": 1, "log_likelihood": 1}', "line 2 is damaged .index 1.0 of 2"),
        (b'{"index": true, "num_tokens": 1, "log_likelihood": 1}', "line 2 is damaged .index True of 2"),
        (b'{"index": 0, \r"num_tokens": 1, "log_likelihood": 1}x', "line 2 is damaged"),
        (b"[" * 100_000, "line 2 is damaged .its values are nested too deeply"),
    ],
)
def test_a_damaged_line_of_a_journal_is_not_taken_for_its_end(tmp_path: Path, line: bytes, told: str) -> None:
    """Whatever follows it would be lost."""
    journal = tmp_path / "out.jsonl.partial"
    journal.write_bytes(b'{"job": "digest"}\n' + line + b"\n")
    with pytest.raises(DocumentError, match=told):
        Journal(tmp_path / "out.jsonl", "digest", (1, 2), Score)
    assert journal.read_bytes().endswith(line + b"\n")


def test_a_journal_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.jsonl.partial")
    with pytest.raises(DocumentError, match="it is a folder or a special file"):
        Journal(tmp_path / "out.jsonl", "digest", (1, 2), Score)


@pytest.mark.parametrize("file", ["/dev/zero", "../outside.safetensors", "a/../../b", "", "\x1b[31m", "x" * 300, 8])
def test_an_index_names_files_of_its_directory(tmp_path: Path, file: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json is broken: ") as caught:
        read_headers(tmp_path)
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value)


def safetensors(header: Any, *, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(8)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (safetensors({}, length=2**63), "its header has 9,223,372,036,854,775,808 bytes, but at most"),
        (safetensors({}, length=2 * 10**7), "its header has 20,000,000 bytes, but at most"),
        (safetensors({"\x1b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), r"a tensor called '\\x1b'"),
        (safetensors({"x" * 999: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "a tensor called 'xxx"),
        (safetensors({"a": {"dtype": "\x1b" * 10**5, "shape": [2], "data_offsets": [0, 8]}}), "can't be read: "),
    ],
)
def test_headers(tmp_path: Path, raw: bytes, told: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightsError, match=told) as caught:
        read_headers(tmp_path)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)
