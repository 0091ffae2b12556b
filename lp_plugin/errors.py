"""Every deliberate error of lp_plugin.

::

    LpPluginError
    ├── InvalidInputError (also a ValueError)   something the user wrote is wrong
    │   ├── ModelConfigError                    a config.json that is missing, broken or contradictory
    │   ├── UnsupportedModelError               an architecture that we have no description of
    │   ├── WeightsError                        checkpoint files missing, truncated or of other shapes
    │   ├── HardwareError                       an unknown device, a broken cluster file
    │   ├── WorkloadError                       a batch, sequence or micro-batch that makes no sense
    │   ├── PlanFileError                       a plan that is truncated, invalid or for another model
    │   ├── DeepSpeedConfigError                a wrong "lp_plugin" section
    │   ├── DocumentError                       input text that can't be scored
    │   └── PartitionFormatError                a partition that an engine can't express, or whose text is wrong
    ├── InfeasibleError                         no partition fits the memory; carries the table and a remedy
    └── RuntimeEnvironmentError                 the machine or the launch is wrong
        ├── MissingDependencyError              an extra that is not installed
        ├── WorldSizeError                      more or fewer processes than stages
        ├── RankFailedError                     a process of the run died; names the rank
        ├── OutOfMemoryError                    a device's memory ran out; says where, and what was predicted
        └── NotFiniteError                      a stage made values that are not finite; names stage and micro-batch

Each message says what was wrong, the value got, the bound, and the remedy. The command line prints it
without a traceback and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "DeepSpeedConfigError",
    "DocumentError",
    "HardwareError",
    "InfeasibleError",
    "InvalidInputError",
    "LpPluginError",
    "MissingDependencyError",
    "ModelConfigError",
    "NotFiniteError",
    "OutOfMemoryError",
    "PartitionFormatError",
    "PlanFileError",
    "RankFailedError",
    "RuntimeEnvironmentError",
    "UnsupportedModelError",
    "WeightsError",
    "WorkloadError",
    "WorldSizeError",
]


class LpPluginError(Exception):
    """Base of every deliberate error."""


class InvalidInputError(LpPluginError, ValueError):
    """Something the user wrote is wrong."""


class ModelConfigError(InvalidInputError):
    """A model configuration is missing, broken or contradictory."""


class UnsupportedModelError(InvalidInputError):
    """The architecture is not one we can describe; the message names it and lists those we can."""


class WeightsError(InvalidInputError):
    """Checkpoint files are missing, truncated, or don't match the configuration."""


class HardwareError(InvalidInputError):
    """An unknown device or a broken cluster description."""


class WorkloadError(InvalidInputError):
    """A batch, sequence, micro-batch or number of stages that makes no sense."""


class PlanFileError(InvalidInputError):
    """A plan file is truncated, invalid, or was made for another model."""


class DeepSpeedConfigError(InvalidInputError):
    """The "lp_plugin" section of a DeepSpeed configuration is wrong."""


class DocumentError(InvalidInputError):
    """Input text can't be scored: empty, unreadable, or longer than the model allows."""


class PartitionFormatError(InvalidInputError):
    """A partition that an engine's format can't express, or a text in such a format that is wrong."""


class InfeasibleError(LpPluginError):
    """No partition fits the devices' memory.

    Attributes:
        table: The least bad partition as text, a row per stage, the offending rows marked.
        remedies: Single changes, each verified by solving again, smallest first; may be empty.
    """

    def __init__(self, message: str, *, table: str = "", remedies: tuple[str, ...] = ()) -> None:
        self.table = table
        self.remedies = remedies
        parts = [message]
        if table:
            parts.append(table)
        if remedies:
            parts.append("What would fit (each checked): " + "; or ".join(remedies) + ".")
        super().__init__("\n".join(parts))


class RuntimeEnvironmentError(LpPluginError):
    """The machine or the way the job was started is wrong."""


class MissingDependencyError(RuntimeEnvironmentError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class WorldSizeError(RuntimeEnvironmentError):
    """The number of processes is not what the plan needs."""


class RankFailedError(RuntimeEnvironmentError):
    """A process of the run died; the message names the rank and the signal or exit code."""


class OutOfMemoryError(RuntimeEnvironmentError):
    """A device's memory ran out; the message says where, and what the plan predicted."""


class NotFiniteError(RuntimeEnvironmentError):
    """A stage made values that are not finite of ones that were; the message names stage and micro-batch."""
