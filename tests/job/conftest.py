"""A tiny model directory and the ``lp-plugin`` command."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lp_plugin import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
REFERENCE = EXAMPLES / "dense16"

Make = Callable[..., Path]
Command = Callable[..., subprocess.CompletedProcess[str]]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make_model(hidden_size=32, ...)`: a directory made by the example's own script from a shrunk config."""
    sys.path.insert(0, str(REFERENCE))
    try:
        script = importlib.import_module("make_model")
    finally:
        sys.path.remove(str(REFERENCE))
    shrunk = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    shrunk |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    small = json.loads((REFERENCE / "small" / "config.json").read_text(encoding="utf-8"))

    def make(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("made")
        (folder / "config.json").write_text(json.dumps(small | shrunk | changes), encoding="utf-8")
        script.main([str(folder), str(folder / "tiny")])
        return folder / "tiny"

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Make) -> Path:
    """A model directory: 3 blocks of width 64, at most 512 positions, bytes as tokens after one leading token."""
    return make_model()


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For processes of our own: one thread each, nothing of a launcher's."""
    launchers = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Command:
    """Runs the installed command to its end."""

    def run(*arguments: object, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("lp-plugin")), *map(str, arguments)],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def main(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    """Runs the command in this process; exit code, standard output and standard error."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    monkeypatch.setenv("COLUMNS", "120")

    def no_ranks(*arguments: object) -> None:
        pytest.fail(f"ranks were started: {arguments}")

    monkeypatch.setattr("lp_plugin.job.launch.launch_local", no_ranks)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lp-plugin", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return run
