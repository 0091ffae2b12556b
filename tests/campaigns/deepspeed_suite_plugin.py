"""Inside the processes of `deepspeed_suite`: prepares each for its variant, and writes down what tests came to.

A pytest plugin, and by a sitecustomize in every process that the tests start, whichever way they start it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

VARIANT, FOLDER = "DEEPSPEED_SUITE_VARIANT", "DEEPSPEED_SUITE_FOLDER"
"""Environment variables: which variant this is, and where to write."""
PARTITIONS, OUTCOMES = "partitions", "outcomes"
"""Files there, a JSON object per line."""
_current: dict[str, Any] = {}


def watch() -> None:
    """Prepares this process as soon as it has imported DeepSpeed; one that never does stays as it is."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            del path, target
            if name != "deepspeed":
                return None
            sys.meta_path.remove(Finder)
            spec = importlib.util.find_spec(name)
            loader = spec.loader if spec is not None else None
            if loader is not None:
                loader.exec_module = functools.partial(_then_prepare, loader.exec_module)  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder)


def _then_prepare(import_it: Callable[[ModuleType], None], module: ModuleType) -> None:
    import_it(module)
    _prepare()


def _prepare() -> None:
    import torch
    from deepspeed.pipe import PipelineModule

    if not hasattr(torch.cpu, "get_rng_state"):
        torch.cpu.get_rng_state = lambda device: torch.get_rng_state()
        torch.cpu.set_rng_state = lambda state, device: torch.set_rng_state(state)
    if os.environ[VARIANT] in {"registered", "cache-aware"}:
        import lp_plugin.integrations.deepspeed as ours

        if os.environ[VARIANT] == "cache-aware":
            ours.configure({"lp_plugin": {"method": "cache-aware"}})
    partition = PipelineModule._partition_layers

    @functools.wraps(partition)
    def recorded(self: PipelineModule, method: str = "uniform") -> None:
        partition(self, method=method)
        line = {
            "asked": method,
            "planned": hasattr(self, "lp_plan"),
            "registered": hasattr(partition, "of_lp_plugin"),
            "boundaries": [int(bound) for bound in self.parts],
        }
        with (Path(os.environ[FOLDER]) / PARTITIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    PipelineModule._partition_layers = recorded


def pytest_runtest_logstart(nodeid: str) -> None:
    """Writes down that a test has started: what it came to if nothing more is written."""
    _current.update(outcome="hung", seconds=0.0, why="It ended its process, or was given up.")
    _write(nodeid)
    _current.update(outcome="passed", why="")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes each phase of a test; after the last one writes down how it ended, and what was partitioned in it."""
    _current["seconds"] = round(_current["seconds"] + report.duration, 2)
    if report.skipped:
        _current.update(outcome="skipped", why=report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
    elif report.failed:
        _current.update(outcome="failed" if report.when == "call" else "error")
    if report.when == "teardown":
        _write(report.nodeid)


def pytest_exception_interact(call: pytest.CallInfo[Any]) -> None:
    """Notes why the phase failed: the exceptions that led there, the first one first."""
    error = call.excinfo.value if call.excinfo is not None else None
    said = []
    while error is not None:
        said.append(f"{type(error).__name__}: {error}".partition("\n")[0])
        error = error.__context__
    _current["why"] = "; then ".join(reversed(said))


def _write(test: str) -> None:
    folder = Path(os.environ[FOLDER])
    made = (folder / PARTITIONS).read_text(encoding="utf-8").splitlines()
    (folder / PARTITIONS).write_text("", encoding="utf-8")
    partitions = [json.loads(line) | {"processes": count} for line, count in Counter(made).items()]
    with (folder / OUTCOMES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, **_current, "partitions": partitions}) + "\n")
