"""Decides which layers of a transformer go on which device, and runs the result.

>>> from lp_plugin import Cluster, ModelProfile, Workload, make_plan
>>> profile = ModelProfile.from_costs([4, 18, 2, 5, 12, 11])
>>> make_plan(profile, Cluster.homogeneous("h200", 4), Workload(batch=8, sequence=1)).boundaries
(0, 1, 2, 5, 6)
"""

from lp_plugin._version import __version__
from lp_plugin.errors import (
    DeepSpeedConfigError,
    DocumentError,
    HardwareError,
    InfeasibleError,
    InvalidInputError,
    LpPluginError,
    MissingDependencyError,
    ModelConfigError,
    NotFiniteError,
    OutOfMemoryError,
    PartitionFormatError,
    PlanFileError,
    RankFailedError,
    RuntimeEnvironmentError,
    UnsupportedModelError,
    WeightsError,
    WorkloadError,
    WorldSizeError,
)
from lp_plugin.hardware import Cluster, Device, Link, MemoryTier
from lp_plugin.model import LayerCost, ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.planfile import load_plan, save_plan
from lp_plugin.planner import make_plan
from lp_plugin.workload import Workload

__all__ = [
    "Cluster",
    "DeepSpeedConfigError",
    "Device",
    "DocumentError",
    "HardwareError",
    "InfeasibleError",
    "InvalidInputError",
    "LayerCost",
    "Link",
    "LpPluginError",
    "MemoryTier",
    "MissingDependencyError",
    "ModelConfigError",
    "ModelProfile",
    "NotFiniteError",
    "OutOfMemoryError",
    "PartitionFormatError",
    "Plan",
    "PlanFileError",
    "RankFailedError",
    "RuntimeEnvironmentError",
    "UnsupportedModelError",
    "WeightsError",
    "Workload",
    "WorkloadError",
    "WorldSizeError",
    "__version__",
    "load_plan",
    "make_plan",
    "save_plan",
]
