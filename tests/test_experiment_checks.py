"""Experiments that read well but can't run: what they are told, before any process starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lp_plugin.bench.experiment.checks import checked_experiment
from lp_plugin.errors import InvalidInputError, WorkloadError

SMALL = Path(__file__).parent.parent / "examples" / "dense16" / "small" / "config.json"
CASE = {"name": "one", "processes": 2, "phase": "prefill", "batch": 4, "sequence": 16, "configurations": ["tp=2", "1"]}
DECODE = {"phase": "decode", "new_tokens": 2}
BERT = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
T5 = {"model_type": "t5", "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "vocab_size": 100}


def written(folder: Path, case: dict[str, object], config: dict[str, object], scale_out: dict[str, object]) -> Path:
    """An experiment file beside its model."""
    small = json.loads(SMALL.read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config if "model_type" in config else small | config))
    lines = ['model = "."', "[[case]]", *(f"{key} = {json.dumps(value)}" for key, value in (CASE | case).items())]
    if scale_out:
        whole = {"case": "one", "devices": [8], "cluster": "h200", "batch": 8} | scale_out
        lines += ["[[scale_out]]", *(f"{key} = {json.dumps(value)}" for key, value in whole.items())]
    path = folder / "experiment.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("case", "config", "told"),
    [
        (
            {},
            {"num_attention_heads": 3, "hidden_size": 48, "num_key_value_heads": 3},
            "tp=2: tensor_parallel is 2, but",
        ),
        (
            {"processes": 20, "configurations": ["pp=20"]},
            {},
            "pp=20 has 20 stages for 19 layers; lower pp to at most 19",
        ),
        ({"sequence": 4000}, {}, "sequence is 4000, but the model allows 2048 positions"),
        (
            DECODE | {"sequence": 2047},
            {},
            "sequence is 2047 and new_tokens 2, together 2049, but the model allows 2048",
        ),
        (DECODE, BERT, "it only encodes"),
        ({}, T5, "can be planned, but not run"),
        ({"batch": 10**9}, {}, "16000000000 tokens, more than 1,000,000,000; lower batch or sequence"),
    ],
)
def test_what_no_configuration_could_run_is_told_with_its_place(
    tmp_path: Path, case: dict[str, object], config: dict[str, object], told: str
) -> None:
    with pytest.raises(WorkloadError, match=r"experiment.toml: case one: ") as caught:
        checked_experiment(written(tmp_path, case, config, {}), ("performance",))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("scale_out", "told"),
    [
        ({"cluster": "abacus"}, "device 'abacus' is not in the catalogue"),
        ({"micro_batch": 9}, "micro_batch is 9, more than the batch of 8"),
    ],
)
def test_clusters_that_cannot_be_simulated(tmp_path: Path, scale_out: dict[str, object], told: str) -> None:
    path = written(tmp_path, {}, {}, scale_out)
    assert checked_experiment(path, ("performance",)).scale_out
    with pytest.raises(WorkloadError, match=r"experiment.toml: scale_out of case one: ") as caught:
        checked_experiment(path, ("scaling",))
    assert told in str(caught.value)


def test_a_calibration_that_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path, {}, {}, {})
    path.write_text(f'calibration = "none.toml"\n{path.read_text(encoding="utf-8")}', encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"none.toml can't be read"):
        checked_experiment(path, ())


def test_an_encoder_reads_whole_sequences(tmp_path: Path) -> None:
    assert checked_experiment(written(tmp_path, {}, BERT, {}), ()).cases


def test_no_framework_is_read_for_it() -> None:
    script = "import sys, lp_plugin.bench.experiment.checks, lp_plugin.bench.experiment.output; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "deepspeed", "matplotlib"} & set(done.stdout.split())
