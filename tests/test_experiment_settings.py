"""Experiment files: what is read, and what a wrong one is told."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_plugin.bench.experiment.settings import Configuration, read_experiment
from lp_plugin.errors import WorkloadError

SMALL = Path(__file__).parent.parent / "examples" / "dense16" / "small"

CASE = {
    "name": "one",
    "processes": 4,
    "phase": "prefill",
    "batch": 8,
    "sequence": 16,
    "configurations": ["tp=2 pp=2", "pp=4", "dp=4 eager", "1"],
}


def written(folder: Path, *, case: dict[str, object] | None = None, **top: object) -> Path:
    """An experiment file; values of None are left out."""
    lines = [
        f"{key} = {json.dumps(value)}" for key, value in ({"model": str(SMALL)} | top).items() if value is not None
    ]
    lines += ["[[case]]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in (CASE | (case or {})).items() if value is not None]
    path = folder / "experiment.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_what_is_left_out_has_sound_defaults(tmp_path: Path) -> None:
    experiment = read_experiment(written(tmp_path, calibration="here.toml"))
    assert (experiment.name, experiment.title, experiment.trials) == ("experiment", "Experiment", 5)
    assert experiment.calibration == tmp_path / "here.toml"
    (case,) = experiment.cases
    assert (case.baseline, case.micro_batch, case.new_tokens, case.counters) == ("tp=2 pp=2", None, 0, False)
    assert [each.strategy.label for each in case.configurations] == ["TP=2 x PP=2", "PP=4", "DP=4", "1 device"]
    assert case.configurations[2].execution == "eager"
    assert case.tokens == 8 * 16
    assert case.workload(case.configurations[2]).batch == 2


def test_decode_counts_all_tokens_but_the_first(tmp_path: Path) -> None:
    experiment = read_experiment(written(tmp_path, case={"phase": "decode", "new_tokens": 5}))
    assert experiment.cases[0].tokens == 8 * 4
    assert experiment.cases[0].workload(experiment.cases[0].configurations[0]).sequence == 21


@pytest.mark.parametrize(
    ("case", "top", "told"),
    [
        ({"phase": "train"}, {}, "case[0].phase is 'train'"),
        ({"batchsize": 3}, {}, "batchsize is not a known key; did you mean batch?"),
        ({"batch": None}, {}, "case[0].batch is missing; add it"),
        ({"batch": 0}, {}, "batch is 0"),
        ({"name": "../up"}, {}, "case[0].name is '../up'"),
        ({}, {"trials": 1}, "trials is 1"),
        ({}, {"model": None}, 'no model; add model = "DIRECTORY or config.json"'),
        ({"configurations": []}, {}, "configurations is []"),
        ({"configurations": ["pp=4", "pp=4"]}, {}, "'pp=4' comes twice"),
        ({"configurations": ["pp=4", "pp=4 cache-aware"]}, {}, "'pp=4 cache-aware' is the same as 'pp=4'"),
        ({"configurations": ["pp=4 fast"]}, {}, "case one: configuration 'pp=4 fast': 'fast' is not understood"),
        ({"configurations": ["1 pp=4"]}, {}, "'1' is not understood"),
        ({"configurations": ["pp=3"]}, {}, "takes 3 devices, but the case has 4 processes"),
        ({"configurations": ["dp=4"], "batch": 3}, {}, "4 replicas for a batch of 3"),
        ({"baseline": "tp=4"}, {}, "it must be one of: tp=2 pp=2, pp=4"),
        ({"phase": "decode"}, {}, "new_tokens is 0; it must be at least 2 when decoding"),
        ({"new_tokens": 4}, {}, "left out for prefill"),
        ({"phase": "decode", "new_tokens": 4, "configurations": ["pp=4 stock"]}, {}, "can't decode; take stock out"),
    ],
)
def test_a_wrong_file_is_told_what_and_where(
    tmp_path: Path, case: dict[str, object], top: dict[str, object], told: str
) -> None:
    with pytest.raises(WorkloadError) as caught:
        read_experiment(written(tmp_path, case=case, **top))
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_simulation_of_a_case_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path)
    simulated = '[[scale_out]]\ncase = "two"\ndevices = [8]\ncluster = "h200"\nbatch = 8\n'
    path.write_text(path.read_text(encoding="utf-8") + "\n" + simulated, encoding="utf-8")
    with pytest.raises(WorkloadError, match=r"scale_out\.case is 'two'; there is no case of that name"):
        read_experiment(path)


@pytest.mark.parametrize("content", [None, b"\xff", b"[[case", b"title = 3\n", b"x" * 2**18])
def test_a_file_that_is_no_experiment(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "experiment.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkloadError, match=r"experiment\.toml"):
        read_experiment(path)


@given(st.text("dtp=0123456789 uniformeagrstock", max_size=24))
def test_configurations_are_understood_or_refused(text: str) -> None:
    try:
        found = Configuration.parse(text)
    except WorkloadError:
        return
    assert found.name == " ".join(text.split())
    assert Configuration.parse(f"  {text}  ").strategy == found.strategy
