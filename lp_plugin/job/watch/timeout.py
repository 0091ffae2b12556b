"""How long a rank may hang."""

from __future__ import annotations

from lp_plugin.errors import WorkloadError

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "LEAST_TIMEOUT_SECONDS", "MOST_TIMEOUT_SECONDS", "check_timeout"]

DEFAULT_TIMEOUT_SECONDS = 300.0
"""For a rank that hangs; one that dies is noticed at once."""
LEAST_TIMEOUT_SECONDS, MOST_TIMEOUT_SECONDS = 1.0, 86_400.0


def check_timeout(seconds: float, option: str) -> None:
    """Refuses a time after which a rank can't be told to hang.

    Raises:
        WorkloadError: Naming the option.
    """
    if not LEAST_TIMEOUT_SECONDS <= seconds <= MOST_TIMEOUT_SECONDS:
        raise WorkloadError(
            f"{option} is {seconds:g} s; give {LEAST_TIMEOUT_SECONDS:g} to {MOST_TIMEOUT_SECONDS:,.0f} seconds, more "
            "than a micro-batch takes on the slowest stage."
        )
