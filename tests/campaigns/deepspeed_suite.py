"""DeepSpeed's own pipeline tests, without our partition methods and with them.

    python tests/campaigns/deepspeed_suite.py CHECKOUT

Runs the test folders of a checkout of DeepSpeed's repository against the DeepSpeed that is installed, once per variant
and each time in a pytest process of its own. Exits 1 if a test that passes without us does not pass with us. Without
CHECKOUT only makes the page again from the results in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from deepspeed_suite_page import HEADER, VARIANTS, Outcomes, complaints, page, rows
from deepspeed_suite_plugin import FOLDER, OUTCOMES, PARTITIONS, VARIANT
from rich.console import Console
from rich.table import Table

from lp_plugin import __version__
from lp_plugin.files import write_atomically
from lp_plugin.measure.device import device_name

FOLDERS = ("unit/pipe", "unit/runtime/pipe")
PACKAGES = ("deepspeed", "torch", "torchvision", "pytest")


def run(variant: str, tests: Path, folder: Path, accelerator: str) -> tuple[dict[str, Any], Outcomes]:
    """One variant: what it took, and each of its tests."""
    hooks, here = folder / "hooks", Path(__file__).resolve().parent
    hooks.mkdir(parents=True)
    if variant != "stock":
        text = "import deepspeed_suite_plugin\n\ndeepspeed_suite_plugin.watch()\n"
        (hooks / "sitecustomize.py").write_text(text, encoding="utf-8")
    for name in (PARTITIONS, OUTCOMES):
        (folder / name).touch()
    paths = [str(hooks), str(here), str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "DS_ACCELERATOR": accelerator,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        VARIANT: variant,
        FOLDER: str(folder),
    }
    environment = {"DEEPSPEED_TIMEOUT": "4"} | environment  # minutes until ranks give up one that failed
    if accelerator == "cpu":  # as many "devices" as the tests ask for at most
        environment |= {"LOCAL_SIZE": "4", "OMP_NUM_THREADS": "1"}
    options = ["-p", "deepspeed_suite_plugin", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no"]
    outcomes: Outcomes = {}
    began, num_processes, last = time.monotonic(), 0, "hung"
    while last == "hung":  # a test that hangs ends the process: the others go on in a new one
        skip = [f"--deselect={name}" for name in outcomes]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *skip, *FOLDERS], cwd=tests, env=environment, check=False
        )
        num_processes += 1
        lines = (folder / OUTCOMES).read_text(encoding="utf-8").splitlines()
        known, outcomes = len(outcomes), {each.pop("test"): each for each in map(json.loads, lines)}
        last = [each["outcome"] for each in outcomes.values()][-1] if len(outcomes) > known else ""
    return {"pytest_processes": num_processes, "seconds": round(time.monotonic() - began, 1)}, outcomes


def main() -> None:
    """All variants, the table, the result as JSON, and the page over all results in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", help="of DeepSpeed's repository, or a copy with its tests")
    parser.add_argument("--commit", help="as git describes the checkout, for a copy without .git")
    parser.add_argument("--output", type=Path, default=Path("docs/results/deepspeed-suite"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="to run; others are kept")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if arguments.checkout is not None:
        result = start(arguments.checkout, arguments.commit)
        path = arguments.output / f"{result['accelerator']}.json"
        if set(arguments.variants) < set(VARIANTS):
            result = kept(json.loads(path.read_text(encoding="utf-8")), result)
        with tempfile.TemporaryDirectory(prefix="deepspeed-suite-") as folder:
            tests = Path(folder) / "tests"  # without the rest: the checkout's own DeepSpeed is not to be imported
            shutil.copytree(arguments.checkout / "tests", tests)
            for variant in arguments.variants:
                about, outcomes = run(variant, tests, Path(folder) / variant, result["accelerator"])
                result["variants"][variant], result["tests"][variant] = about, outcomes
        failed = complaints(result)
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        table = Table(*HEADER)
        for row in rows(result):
            table.add_row(*row)
        Console(width=120, markup=False).print(table, *failed, sep="\n")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.output.glob("*.json"))]
    write_atomically(arguments.output / "README.md", page(results))
    sys.exit(1 if failed else 0)


def start(checkout: Path, commit: str | None) -> dict[str, Any]:
    """A result without its variants."""
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if (checkout / ".git").exists():
        git = ["git", "-C", str(checkout), "describe", "--tags", "--always", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "accelerator": accelerator,
        "device": device_name(),
        "num_devices": torch.cuda.device_count() if accelerator == "cuda" else os.cpu_count(),
        "versions": {
            "lp_plugin": __version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in PACKAGES},
        },
        "variants": {},
        "tests": {},
    }


def installed(package: str) -> str:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result whose other variants are an older one's, if all else is the same."""
    differing = [key for key in new if key not in {"variants", "tests"} and old[key] != new[key]]
    if differing:
        raise SystemExit(f"The other variants ran with another {' and '.join(differing)}; run all of them.")
    return old


if __name__ == "__main__":
    main()
