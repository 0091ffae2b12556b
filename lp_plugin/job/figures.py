"""A finished job's figures as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lp_plugin.errors import DocumentError
from lp_plugin.files import write_atomically

__all__ = ["write_figures"]


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes them as JSON.

    Raises:
        DocumentError: If the file can't be written; the results are on disk then.
    """
    try:
        write_atomically(path, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise DocumentError(
            f"--report {path} can't be written: {error.strerror or error}; the results are complete, the figures lost."
        ) from None
