"""Hugging Face transformers: a decoder as the flat layer list of a pipeline.

`HFPipelineModule` is a DeepSpeed PipelineModule over embedding, blocks, final norm and head; every rank builds
and loads its own layers only, and runs them through transformers' own decoder (`lp_plugin...decoder`).
"""

import importlib.util

from lp_plugin.errors import MissingDependencyError

for _name in ("torch", "safetensors", "transformers"):
    if importlib.util.find_spec(_name) is None:
        raise MissingDependencyError(
            f"{_name} is not installed; install it with: pip install 'lp-plugin[transformers]'"
        )

__all__: list[str] = []
