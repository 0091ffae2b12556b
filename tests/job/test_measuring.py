"""``lp-plugin calibrate`` and ``lp-plugin profile``: two real processes, and one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from conftest import REFERENCE, Main

from lp_plugin import Cluster, ModelProfile, Workload, make_plan
from lp_plugin.bench.calibration import calibrate_host
from lp_plugin.report import console

SMALL = REFERENCE / "small"


def test_a_calibration_is_a_cluster_to_plan_for(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launched = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false"}
    for name, value in (environment | launched).items():
        monkeypatch.setenv(name, value)
    path, picture = tmp_path / "mine.toml", tmp_path / "mine.png"
    before = signal.getsignal(signal.SIGINT)
    calibrate_host(console(), output=path, processes=2, picture=picture)
    assert signal.getsignal(signal.SIGINT) is before
    printed = capfd.readouterr().out
    for part in ("measuring matrix products ...", "working set", "all-reduce over 2", "a tiny layer", "link: "):
        assert part in printed
    cluster = Cluster.parse(str(path))
    assert [device.name for device in cluster.devices] == ["cpu", "cpu"]
    assert set(dict(cluster.devices[0].peak_flops)) == {"float32", "float16", "bfloat16"}
    assert picture.exists()
    plan = make_plan(ModelProfile.from_config(SMALL), cluster, Workload(batch=8, sequence=64))
    assert plan.num_stages == 2


def test_a_profile_shows_every_kind_of_layer_and_whether_the_cut_moves(main: Main, tmp_path: Path) -> None:
    output = tmp_path / "times.json"
    asked = ("--sequence", 16, "--micro-batch", 2, "--stages", 2, "--tensor-parallel", 2)
    code, printed, errors = main("profile", SMALL, *asked, "-o", output)
    assert code == 0, errors
    for part in (
        "embedding",
        "block 0 .. block 15, each of 16",
        "norm",
        "head",
        "the cut into 2 stages",
        "not measured",
    ):
        assert part in printed
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert figures["layers"][1] == "block 0"
    assert len(figures["layers"]) == len(figures["times"]["seconds"]) == 19
    assert figures["times"]["tensor_parallel"] == 2
    assert " 0 s " not in printed


def test_decode_steps_for_a_described_cluster(main: Main) -> None:
    asked = ("--sequence", 32, "--phase", "decode", "--granularity", "sublayer", "--cluster", "cpu:3", "--stages", 3)
    code, printed, errors = main("profile", SMALL, *asked)
    assert code == 0, errors
    assert "block 0 mlp .. block 15 mlp, each of 16" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("calibrate", "-o", "mine.json"), "give a name that ends in .toml"),
        (("calibrate", "-o", "nowhere/mine.toml"), "its folder does not exist"),
        (("calibrate", "-o", "mine.toml", "--picture", "mine.txt"), "give a name that ends in .png"),
        (("calibrate", "-o", "/proc/mine.toml"), "can't be written to /proc/mine.toml"),
        (("calibrate", "-o", "mine.toml", "--processes", 10**5), "processes are too many"),
        (("profile", "nowhere", "--sequence", 8), "nowhere"),
        (("profile", SMALL, "--sequence", 4000), "--sequence is 4000, but the model allows 2048 positions"),
        (("profile", SMALL, "--sequence", 8, "--stages", 400), "--stages is 400; small has 19 layers"),
        (("profile", SMALL, "--sequence", 0), "sequence is 0"),
        (("profile", SMALL, "--sequence", 8, "-o", "nowhere/times.json"), "its folder does not exist"),
        (("profile", SMALL, "--sequence", 8, "--tensor-parallel", 3), "3"),
        (("profile", SMALL, "--sequence", 8, "--stages", 4, "--cluster", "cpu:2"), "has 2 devices, but 4 are needed"),
    ],
)
def test_bad_input_is_one_message(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = main(*arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert not list(tmp_path.iterdir())
