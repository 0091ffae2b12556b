"""``lp-plugin plan --strategy all``: data, tensor and pipeline parallelism side by side."""

from __future__ import annotations

from pathlib import Path

from lp_plugin.cli.app import console
from lp_plugin.errors import InfeasibleError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.strategy.compare import study
from lp_plugin.strategy.report import strategy_report
from lp_plugin.workload import Workload

__all__ = ["compare_all"]


def compare_all(
    profile: ModelProfile, cluster: Cluster, workload: Workload, constraints: Constraints, picture: Path | None
) -> None:
    """Prints the comparison, and draws it if a picture is asked for."""
    studied = study(profile, cluster, workload, constraints)
    console().print(strategy_report(studied))
    if all(comparison.throughput is None for comparison in studied.comparisons):
        raise InfeasibleError(
            f"no strategy fits {profile.name} on these devices; the tables above say why. "
            "'lp-plugin plan' without --strategy all names changes that would fit."
        )
    if picture is not None:
        from lp_plugin.strategy.picture import strategy_picture  # noqa: PLC0415 - matplotlib is slow to import

        strategy_picture(studied, picture)
        console().print(f"picture written to {picture}")
