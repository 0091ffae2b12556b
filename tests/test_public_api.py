"""The public names, and what the planner's core may import."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lp_plugin

ROOT = Path(__file__).parent.parent
ABOVE = ("bench", "cli", "generate", "integrations", "job", "measure", "score")
CORE = sorted(
    path
    for path in (ROOT / "lp_plugin").rglob("*.py")
    if path.relative_to(ROOT / "lp_plugin").parts[0] not in {*ABOVE, "__main__.py"}
)
FRAMEWORKS = {"torch", "transformers", "deepspeed", "accelerate", "megatron", "vllm", "sglang"}


def module_name(path: Path) -> str:
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"}:
                names.add(str(node.args[0].value))
    return names


def test_all_is_sorted_complete_and_importable() -> None:
    public = lp_plugin.__all__
    assert list(public) == sorted(public)
    assert len(set(public)) == len(public)
    assert all(hasattr(lp_plugin, name) for name in public)
    errors = importlib.import_module("lp_plugin.errors")
    assert set(errors.__all__) <= set(public)


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_every_module_says_what_is_public(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    assert module.__doc__ or path.stem == "_version"
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name), name


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_imports_no_framework(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & FRAMEWORKS


def test_importing_the_package_loads_no_framework() -> None:
    code = "import sys, lp_plugin; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.splitlines())
    assert "lp_plugin.planner" in loaded
    assert not loaded & (FRAMEWORKS | {"matplotlib"})


def test_imports_in_the_core_go_one_way() -> None:
    modules = {module_name(path): path for path in CORE if path != ROOT / "lp_plugin" / "__init__.py"}
    graph = {name: imported(path) & (modules.keys() - {name}) for name, path in modules.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    position = {name: index for index, name in enumerate(order)}
    chain = ["errors", "hardware.device", "model.profile", "solver.cost", "solver.solve", "planner", "strategy.compare"]
    places = [position[f"lp_plugin.{name}"] for name in chain]
    assert places == sorted(places)
    assert not graph["lp_plugin.errors"]
    assert graph["lp_plugin.solver.runs"] == set()  # the solver itself knows no model and no hardware
    assert graph["lp_plugin.solver.partition"] == {"lp_plugin.errors", "lp_plugin.solver.runs"}


def test_the_core_imports_nothing_that_stands_above_it() -> None:
    for path in CORE:
        upward = {name for name in imported(path) if name.startswith(tuple(f"lp_plugin.{part}" for part in ABOVE))}
        assert not upward, f"{path.name} imports {sorted(upward)}"


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_examples_in_docstrings(path: Path) -> None:
    assert doctest.testmod(importlib.import_module(module_name(path))).failed == 0


def test_there_are_examples_in_docstrings() -> None:
    attempted = [doctest.testmod(importlib.import_module(module_name(path))).attempted for path in CORE]
    assert sum(attempted) >= 10


def test_changelog_and_version_agree() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert next(version for version in versions if version != "Unreleased") == lp_plugin.__version__


def test_errors_form_one_tree() -> None:
    errors = importlib.import_module("lp_plugin.errors")
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.LpPluginError)
    assert issubclass(errors.InvalidInputError, ValueError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert not issubclass(errors.InfeasibleError, ValueError)
