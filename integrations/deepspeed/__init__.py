"""DeepSpeed: importing this package adds partition methods to ``deepspeed.pipe.PipelineModule``.

::

    import lp_plugin.integrations.deepspeed          # that's all: then
    PipelineModule(layers=layers, num_stages=4, partition_method="cache-aware")

``cache-aware`` plans from parameters and the device's memory tiers, ``profile`` from layers timed on the real
device, ``plan:PATH`` takes a plan file. `configure` hands over a DeepSpeed configuration with an ``"lp_plugin"``
section; `PipelineModule` here takes the same section as an argument instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lp_plugin.errors import MissingDependencyError

try:
    import deepspeed.pipe
except ImportError as error:
    raise MissingDependencyError(
        f"DeepSpeed can't be imported ({error}); install it with: pip install 'lp-plugin[deepspeed]'"
    ) from error

from lp_plugin.integrations.deepspeed import places
from lp_plugin.integrations.deepspeed.config import Section, Settings, read_settings
from lp_plugin.integrations.deepspeed.methods import install

__all__ = ["PipelineModule", "Section", "configure"]

_configured = Settings(section=Section())


def configure(config: str | Path | Mapping[str, Any]) -> Settings:
    """Uses a DeepSpeed configuration's ``"lp_plugin"`` section for all PipelineModules made from now on.

    Args:
        config: The configuration's path or contents.

    Returns:
        What was read.

    Raises:
        DeepSpeedConfigError: If the section is wrong.
    """
    global _configured  # noqa: PLW0603 - DeepSpeed's constructor leaves no other way in
    _configured = read_settings(config)
    return _configured


class PipelineModule(deepspeed.pipe.PipelineModule):
    """DeepSpeed's PipelineModule with ``cache-aware`` as its default partition method.

    Args:
        layers: As for DeepSpeed.
        partition_method: ``cache-aware``, ``profile``, ``plan:PATH`` or one of DeepSpeed's own.
        config: DeepSpeed configuration with an ``"lp_plugin"`` section, path or contents, for this module alone.
        kwargs: Everything else DeepSpeed's PipelineModule takes.
    """

    def __init__(
        self,
        layers: Any,
        *,
        partition_method: str = "cache-aware",
        config: str | Path | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if config is not None:
            self.lp_settings = read_settings(config)
        super().__init__(layers, partition_method=partition_method, **kwargs)


def _settings_of(module: deepspeed.pipe.PipelineModule) -> Settings:
    return module.__dict__.get("lp_settings", _configured)


install(_settings_of)
places.install(_settings_of)
