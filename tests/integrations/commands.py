"""Where the commands of this environment lie."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
"""torchrun, deepspeed and lp-plugin."""
Start = Callable[..., str]
"""The fixture ``start``: runs a command to its end and returns what it printed."""
