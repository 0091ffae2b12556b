"""The command line: planning, running, measuring; `lp-plugin --help` lists the commands.

Every deliberate error ends with one message and exit code 2.
"""

from __future__ import annotations

import sys

from lp_plugin.cli.app import app
from lp_plugin.cli.benching import bench_experiment, bench_generate, bench_planner, bench_report
from lp_plugin.cli.exchange import export, score
from lp_plugin.cli.measuring import calibrate, profile
from lp_plugin.cli.planning import explain, plan
from lp_plugin.cli.running import generate, launch, run
from lp_plugin.cli.sweeping import sweep
from lp_plugin.errors import LpPluginError
from lp_plugin.quantity import printable

__all__ = [
    "app",
    "bench_experiment",
    "bench_generate",
    "bench_planner",
    "bench_report",
    "calibrate",
    "explain",
    "export",
    "generate",
    "launch",
    "main",
    "plan",
    "profile",
    "run",
    "score",
    "sweep",
]


def main() -> None:
    """Entry point of the ``lp-plugin`` command."""
    try:
        app()
    except LpPluginError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
