"""Files are data: nothing in them is run, nothing asks on standard input, and nothing that is read can block."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from campaigns.fuzz_workspace import make_model

from lp_plugin import cli
from lp_plugin.errors import ModelConfigError, UnsupportedModelError
from lp_plugin.integrations.transformers import load
from lp_plugin.job.documents import load_tokenizer

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("lp_plugin", "integrations")
    for path in (ROOT / folder).rglob("*.py")
    if "lp_plugin/integrations" not in path.as_posix()  # the link
)
MODULES = {"cloudpickle", "dill", "imp", "joblib", "marshal", "pickle", "pty", "runpy", "shelve", "yaml"}
"""That run what they read, or what they are given."""
CALLS = {
    "__import__",
    "compile",
    "eval",
    "exec",
    "input",
    "importlib.import_module",
    "os.popen",
    "os.system",
    "torch.load",
}
"""The same."""
OWN_PROCESSES = "between the processes of one job, which the user started: no file, and no one else's data"
EXCEPTIONS = {
    ("lp_plugin/job/launch.py", "pickle"): "a job for the processes that it starts, in memory of its own",
    ("lp_plugin/job/ranks.py", "broadcast_object_list"): OWN_PROCESSES,
    ("lp_plugin/job/ranks.py", "all_gather_object"): OWN_PROCESSES,
    ("lp_plugin/measure/links.py", "broadcast_object_list"): OWN_PROCESSES,
    ("lp_plugin/measure/split.py", "all_gather_object"): OWN_PROCESSES,
    ("integrations/deepspeed/methods.py", "all_gather_object"): OWN_PROCESSES,
    ("integrations/transformers/save.py", "all_gather_object"): OWN_PROCESSES,
    ("integrations/deepspeed/agreement.py", "all_gather_object"): OWN_PROCESSES,
    ("integrations/deepspeed/checkpoints.py", "broadcast_object_list"): OWN_PROCESSES,
    (
        "integrations/deepspeed/checkpoints.py",
        "load_checkpoint",
    ): "DeepSpeed's checkpoints are pickles, as its docstring says",
    ("integrations/deepspeed/launch.py", "runpy"): "runs the script that the user names, which is what it is for",
    (
        "lp_plugin/model/architecture.py",
        "importlib.import_module",
    ): "a module of this package, by its table of families",
}
"""What is done all the same, and why it may be."""


def findings(path: Path) -> Iterator[str]:
    """What a module does that could run what it reads."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or ""] if module else [alias.name for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from called(node)


def called(node: ast.Call) -> Iterator[str]:
    """What is wrong with a call."""
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS:
        yield name
    if last.endswith(("_object", "_object_list")) or last == "load_checkpoint":
        yield last
    for option in ("shell", "allow_pickle", "trust_remote_code"):
        value = options.get(option)
        harmless = isinstance(value, ast.Constant) and value.value is False
        of_the_user = isinstance(value, ast.Name) and value.id == option
        if value is not None and not harmless and not of_the_user:
            yield f"{option}={ast.unparse(value)}"
    loads = last in {"from_pretrained", "from_config"} and name.startswith(("Auto", "transformers.Auto"))
    if loads and "trust_remote_code" not in options:
        yield f"{name} at line {node.lineno} without trust_remote_code=False: it asks on standard input"


def test_nothing_runs_what_it_reads() -> None:
    found = {(path.relative_to(ROOT).as_posix(), what) for path in SOURCES for what in findings(path)}
    assert found - EXCEPTIONS.keys() == set()
    assert EXCEPTIONS.keys() - found == set(), "no longer there: take it off the list"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("eval(text)", "eval"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoConfig.from_pretrained(path)", "without trust_remote_code"),
        ("dist.gather_object(mine)", "gather_object"),
    ],
)
def test_what_is_looked_for_is_found(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    (found,) = findings(tmp_path / "module.py")
    assert expected in found


def test_what_is_harmless_is_not(tmp_path: Path) -> None:
    harmless = (
        "AutoModel.from_config(own, trust_remote_code=trust_remote_code)\nModelProfile.from_config(path)\nmodel.eval()"
    )
    (tmp_path / "module.py").write_text(harmless, encoding="utf-8")
    assert list(findings(tmp_path / "module.py")) == []


# --- models that bring code with them ------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({marker!r}).touch()
"""
AUTO_MAP = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoModel": "mine.Model"}


FAMILY, NO_FAMILY, OWN_TOKENIZER = "a family that transformers has", "one that it has not", "its own tokenizer"


def make_with_code(folder: Path, what: str) -> tuple[Path, Path]:
    """A model directory with code of its own, and what that would make."""
    marker = folder / "marker"
    directory = make_model(folder / "made")
    own_tokenizer = {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}}
    changes = {"config.json": {"auto_map": AUTO_MAP}, "tokenizer_config.json": own_tokenizer}
    if what != FAMILY:
        changes["tokenizer_config.json"] = own_tokenizer | {"tokenizer_class": "MyTokenizer"}
    if what == NO_FAMILY:
        text = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        changes["config.json"] = {"auto_map": AUTO_MAP, "model_type": "mine", "text_config": text}
    for name, change in changes.items():
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    (directory / "custom_generate").mkdir()
    for name in ("mine.py", "custom_generate/generate.py"):
        (directory / name).write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    return directory, marker


Ask = Callable[..., int]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Runs the command in this process, up to where ranks would start; its exit code."""

    def asked(*prompt: object) -> str:
        pytest.fail(f"it asks: {prompt}")

    def started(*arguments: object) -> None:
        del arguments
        raise SystemExit(0)

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("lp_plugin.job.launch.launch_local", started)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A line.\n", encoding="utf-8")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["lp-plugin", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize("what", [FAMILY, NO_FAMILY, OWN_TOKENIZER])
def test_code_of_a_model_is_not_run(what: str, ask: Ask, tmp_path: Path) -> None:
    directory, marker = make_with_code(tmp_path, what)
    known = what != NO_FAMILY
    cluster = ("--cluster", "h100-sxm:2", "--batch", 4, "--sequence", 32)
    assert ask("plan", directory, *cluster) == 0
    assert ask("sweep", directory, *cluster) == 0
    assert ask("run", directory, "--stages", 2, "--input", "text.txt") == (0 if known else 2)
    assert ask("generate", directory, "--stages", 2, "--prompts", "text.txt", "--max-new-tokens", 2) == (
        0 if known else 2
    )
    (directory / "generation_config.json").unlink()
    assert ask("generate", directory, "--stages", 2, "--prompts", "text.txt", "--max-new-tokens", 2) == (
        0 if known else 2
    )
    if not known:
        assert ask("bench", "generate", directory, "--stages", 1) == 2
    with contextlib.suppress(ModelConfigError):  # one that says so
        load_tokenizer(directory)
    assert not marker.exists()


LOADED = """
import sys
from lp_plugin.integrations.transformers import load

with load(sys.argv[1]) as model:
    print(model.score(["A line."]), model.generate(["A line."], max_new_tokens=2))
"""


def test_a_loaded_model_does_not_run_its_code(tmp_path: Path) -> None:
    directory, marker = make_with_code(tmp_path, OWN_TOKENIZER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", LOADED, str(directory)]
    ended = subprocess.run(
        command, input="y\n" * 20, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "[y/N]" not in ended.stdout + ended.stderr
    assert not marker.exists()


def test_a_family_of_its_own_is_not_loaded(tmp_path: Path, ask: Ask) -> None:
    del ask  # for its `input`
    directory, marker = make_with_code(tmp_path, NO_FAMILY)
    with pytest.raises(UnsupportedModelError, match="model_type 'mine'"):
        load(directory)
    assert not marker.exists()
