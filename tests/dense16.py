"""The reference model and its strategies."""

from __future__ import annotations

import json
from pathlib import Path

from lp_plugin import ModelProfile
from lp_plugin.strategy.layouts import Strategy

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
BASELINE = Strategy(tensor_parallel=8, pipeline_parallel=2)
REPLICAS, PIPELINE = Strategy(data_parallel=16), Strategy(pipeline_parallel=16)


def dense(**changes: int) -> ModelProfile:
    """The reference model with some fields of its config changed."""
    return ModelProfile.from_config(json.loads((DENSE16 / "config.json").read_text()) | changes)
