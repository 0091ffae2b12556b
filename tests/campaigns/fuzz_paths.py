"""Imported first by what is run as a script here: makes the modules of the tests importable, too."""

import sys
from pathlib import Path

__all__: list[str] = []

sys.path.insert(1, str(Path(__file__).parent.parent))
