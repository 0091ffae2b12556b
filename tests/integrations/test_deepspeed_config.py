"""The ``"lp_plugin"`` section, and the errors of ``lp-plugin launch``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import BIN

from lp_plugin.cli import main
from lp_plugin.errors import DeepSpeedConfigError, InvalidInputError, LpPluginError, RuntimeEnvironmentError
from lp_plugin.integrations.deepspeed import PipelineModule, configure
from lp_plugin.integrations.deepspeed.config import Section, read_settings
from lp_plugin.integrations.deepspeed.launch import config_argument, launch_script
from lp_plugin.integrations.deepspeed.methods import install

CACHE_AWARE = {"lp_plugin": {"method": "cache-aware"}}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Writes what it was given and how it was run beside itself."""
    path = tmp_path / "Script.py"
    path.write_text(
        "import json, pathlib, sys\n"
        "import beside\n"
        "seen = {'argv': sys.argv, 'name': __name__, 'beside': beside.VALUE}\n"
        "pathlib.Path(sys.argv[0]).with_suffix('.json').write_text(json.dumps(seen))\n"
        "if '--exit' in sys.argv: sys.exit(int(sys.argv[-1]))\n"
        "if '--raise' in sys.argv: raise eval(sys.argv[-1])\n"
    )
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path / "ds.json", CACHE_AWARE)


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, no leftovers: launching changes the process for good."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["lp-plugin"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("lp_plugin.integrations.deepspeed._configured", configure({}))
    monkeypatch.delitem(sys.modules, "beside", raising=False)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The ``lp-plugin`` command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["lp-plugin", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# read_settings


def test_nothing_written_leaves_everything_to_the_script() -> None:
    settings = read_settings({})
    assert settings.section == Section()
    assert settings.method is None
    assert (settings.micro_batch, settings.num_micro_batches) == (1, 1)
    assert (settings.dtype, settings.phase) == ("float32", "prefill")


def test_every_key_arrives(tmp_path: Path) -> None:
    section = {
        "method": "profile",
        "device": "h200",
        "objective": "memory",
        "phase": "decode",
        "sequence": 128,
        "input": [{"shape": [2, 128], "dtype": "int64", "high": 50}, {"shape": [2, 1], "dtype": "bfloat16"}],
        "timeout": 20.5,
        "check_finite": True,
    }
    content = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8, "lp_plugin": section}
    from_dict, from_file = read_settings(content), read_settings(written(tmp_path / "ds.json", content))
    assert from_dict == from_file
    assert from_dict.section.model_dump(exclude_none=True) == {
        **section,
        "input": [section["input"][0], {**section["input"][1], "high": 2}],
    }
    assert (from_dict.method, from_dict.micro_batch, from_dict.num_micro_batches) == ("profile", 2, 8)


def test_set_of_keys_is_what_is_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    table = documented[documented.index("| key | meaning |") :].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(Section.model_fields)


def test_a_plan_is_a_method_and_keeps_its_case() -> None:
    assert read_settings({"lp_plugin": {"plan": "Plans/A.JSON"}}).method == "plan:Plans/A.JSON"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"metod": "profile"}, ["lp_plugin.metod", "'profile'", "Known keys: method, plan"]),
        ({"method": 3}, ["lp_plugin.method is 3", "string"]),
        ({"timeout": 0.5}, ["lp_plugin.timeout is 0.5", "greater than or equal to 1"]),
        ({"check_finite": 3}, ["lp_plugin.check_finite is 3", "boolean"]),
        ({"sequence": 0}, ["lp_plugin.sequence is 0", "greater than 0"]),
        ({"sequence": "long"}, ["lp_plugin.sequence is 'long'", "integer"]),
        ({"objective": "speed"}, ["lp_plugin.objective is 'speed'", "throughput", "memory"]),
        ({"phase": "training"}, ["lp_plugin.phase is 'training'", "train"]),
        ({"input": {"shape": []}}, ["lp_plugin.input.shape is []", "at least 1"]),
        ({"input": {"shape": [2, -1]}}, ["lp_plugin.input.shape.1 is -1", "greater than 0"]),
        ({"input": {"shape": [2], "dtype": "float64"}}, ["lp_plugin.input.dtype is 'float64'", "bfloat16"]),
        ({"input": [{"shape": [2]}, {"shape": "2"}]}, ["lp_plugin.input.1.shape is '2'", "list"]),
        ({"input": 3}, ["lp_plugin.input is 3"]),
        ("cache-aware", ["lp_plugin is 'cache-aware'", "Known keys"]),
        (None, ["lp_plugin is None", "Known keys"]),
        ({"method": "profile", "plan": "plan.json"}, ['both "plan" and "method"', "keep one"]),
    ],
)
def test_a_wrong_section_is_refused_with_the_key(section: Any, says: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "ds.json", {"lp_plugin": section})
    for given, where in ((path, str(path)), ({"lp_plugin": section}, "the DeepSpeed configuration")):
        with pytest.raises(DeepSpeedConfigError) as refused:
            read_settings(given)
        assert str(refused.value).startswith(f"{where}: ")
        assert all(part in str(refused.value) for part in says), str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"lp_plugin": {"method"', "can't be read as JSON"),
        ("[1, 2]", "holds a JSON list"),
        ('"text"', "holds a JSON str"),
        (b"\xff\xfe\x00", "can't be read as JSON"),
    ],
)
def test_a_broken_file_is_refused(content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DeepSpeedConfigError, match=says):
        read_settings(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"Missing\.json does not exist"):
        read_settings(tmp_path / "Missing.json")
    with pytest.raises(DeepSpeedConfigError, match="can't be read"):
        read_settings(tmp_path)


def test_what_deepspeed_reads_we_read(tmp_path: Path) -> None:
    """DeepSpeed reads Hjson: comments and trailing commas are fine there."""
    path = written(tmp_path / "ds.json", '{\n  # mine\n  "bf16": {"enabled": true}, // half\n  "lp_plugin": {},\n}')
    assert read_settings(path).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        ({"fp16": {"enabled": True}}, "float16"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"bfloat16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": "auto"}}, "float32"),
        ({"fp16": {}}, "float32"),
        ({"bf16": "auto"}, "float32"),
    ],
)
def test_precision_is_deepspeeds(content: dict[str, Any], dtype: str) -> None:
    assert read_settings(content).dtype == dtype


def test_auto_values_count_as_one() -> None:
    auto = read_settings({"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"})
    assert (auto.micro_batch, auto.num_micro_batches) == (1, 1)


@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None])
def test_a_batch_size_that_is_none_is_refused(key: str, value: Any) -> None:
    with pytest.raises(DeepSpeedConfigError, match=f"{key} is .*at least 1"):
        read_settings({key: value})


@pytest.mark.parametrize(
    ("content", "phase"),
    [
        ({"optimizer": {"type": "Adam"}}, "train"),
        ({}, "prefill"),
        ({"lp_plugin": {"phase": "train"}}, "train"),
        ({"optimizer": {"type": "Adam"}, "lp_plugin": {"phase": "decode"}}, "decode"),
    ],
)
def test_phase_is_the_sections_or_follows_the_optimizer(content: dict[str, Any], phase: str) -> None:
    assert read_settings(content).phase == phase


# handing over


def test_the_subclass_refuses_a_wrong_section_before_it_needs_a_job() -> None:
    with pytest.raises(DeepSpeedConfigError, match="Known keys"):
        PipelineModule([], num_stages=1, config={"lp_plugin": {"wrong": 1}})


def test_a_refused_configuration_changes_nothing() -> None:
    configure({"lp_plugin": {"method": "uniform"}})
    with pytest.raises(DeepSpeedConfigError):
        configure({"lp_plugin": {"wrong": 1}})
    import lp_plugin.integrations.deepspeed as package

    assert package._configured.method == "uniform"


def test_installing_twice_wraps_once() -> None:
    import deepspeed.pipe

    before = deepspeed.pipe.PipelineModule._partition_layers
    install(lambda module: read_settings({}))
    assert deepspeed.pipe.PipelineModule._partition_layers is before


# lp-plugin launch


@pytest.mark.parametrize(
    "arguments",
    [
        ["--deepspeed_config", "A.json"],
        ["--deepspeed_config=A.json"],
        ["--deepspeed-config", "A.json"],
        ["--steps", "3", "--deepspeed", "--deepspeed_config", "A.json", "--more"],
    ],
)
def test_the_configuration_is_found_among_the_scripts_arguments(arguments: list[str]) -> None:
    assert config_argument(arguments) == "A.json"


@pytest.mark.parametrize("arguments", [[], ["--deepspeed"], ["--deepspeed_config"], ["A.json"]])
def test_arguments_without_a_configuration_are_refused(arguments: Sequence[str]) -> None:
    with pytest.raises(DeepSpeedConfigError, match="--deepspeed_config FILE"):
        config_argument(arguments)


def test_the_script_runs_as_if_started_itself(
    script: Path, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    launch_script(script, ["--deepspeed_config", str(config), "--steps", "3"])
    seen = json.loads((tmp_path / "Script.json").read_text())
    argv = [str(script), "--deepspeed_config", str(config), "--steps", "3"]
    assert seen == {"argv": argv, "name": "__main__", "beside": 7}


def refused_launches(tmp_path: Path, script: Path) -> list[tuple[type[LpPluginError], str, Path, list[str]]]:
    """Error, what it says, script, the script's arguments."""
    good, empty = written(tmp_path / "good.json", CACHE_AWARE), written(tmp_path / "empty.json", {})
    wrong = written(tmp_path / "wrong.json", {"lp_plugin": {"metod": "profile"}})
    flag = "--deepspeed_config"
    return [
        (InvalidInputError, "Absent.py does not exist", tmp_path / "Absent.py", [flag, str(good)]),
        (InvalidInputError, "does not exist", tmp_path, [flag, str(good)]),
        (DeepSpeedConfigError, "--deepspeed_config FILE", script, []),
        (DeepSpeedConfigError, "absent.json does not exist", script, [flag, str(tmp_path / "absent.json")]),
        (DeepSpeedConfigError, 'no "lp_plugin" section', script, [flag, str(empty)]),
        (DeepSpeedConfigError, "lp_plugin.metod", script, [flag, str(wrong)]),
        (RuntimeEnvironmentError, "no launcher started", script, [flag, str(good)]),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_launch_that_cant_work_is_refused(
    number: int, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, says, path, arguments = refused_launches(tmp_path, script)[number]
    with pytest.raises(error) as refused:
        launch_script(path, arguments)
    assert says in str(refused.value)
    assert run_main(monkeypatch, "launch", path, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: {refused.value}\n"
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "Script.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--exit", "3"], 3, ""),
        (["--raise", "EOFError('ran out of input')"], 1, "EOFError: ran out of input"),
    ],
)
def test_the_scripts_own_end_is_the_commands(
    arguments: list[str],
    code: int,
    says: str,
    script: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run_main(monkeypatch, "launch", script, "--deepspeed_config", config, *arguments) == code
    assert says in capsys.readouterr().err


def test_the_scripts_own_error_keeps_its_traceback(script: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["lp-plugin", "launch", str(script), "--deepspeed_config", str(config)])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--raise", "KeyError('theirs')"])
    with pytest.raises(KeyError, match="theirs"):
        main()


def test_the_installed_command_ends_with_one_line_and_code_2(script: Path, config: Path) -> None:
    command = [BIN / "lp-plugin", "launch", script, "--deepspeed_config", config]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert (ended.returncode, ended.stdout, len(errors)) == (2, "", 1)
    assert "torchrun" in errors[0]
    assert "Traceback" not in ended.stderr
