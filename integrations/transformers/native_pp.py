"""transformers' own pipeline parallelism (``DistributedConfig(pp_size=...)``) with a plan's boundaries.

It splits the blocks evenly and gives what is left over to the last rank, which also has norm and head. This puts a plan
in place of that while a model is loaded::

    with native_split(plan):
        model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(pp_size=4))
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from lp_plugin.errors import MissingDependencyError, PartitionFormatError, WorldSizeError
from lp_plugin.exchange.counts import Partitioned, blocks_per_stage
from lp_plugin.integrations.formats import expressible

try:
    from transformers.distributed.pipeline_parallel import PipelineStage
except ImportError as error:
    raise MissingDependencyError(
        f"transformers' pipeline parallelism can't be imported ({error}); "
        "install a transformers that has it with: pip install -U 'lp-plugin[transformers]'"
    ) from error

__all__ = ["native_split"]


@contextlib.contextmanager
def native_split(plan: Partitioned) -> Iterator[None]:
    """Models that are loaded inside are split as planned; afterwards transformers' own rule holds again.

    Args:
        plan: A stage per pipeline rank, each with at least one block.

    Raises:
        PartitionFormatError: If transformers can't express the partition; inside, if a model has other blocks.
        WorldSizeError: Inside, if ``pp_size`` is not the number of stages.
    """
    reason = expressible(plan, "transformers")
    if reason is not None:
        raise PartitionFormatError(reason)
    bounds = tuple(itertools.accumulate(blocks_per_stage(plan.layers, plan.boundaries), initial=0))

    def layer_range_for_rank(self: Any, rank: int, num_layers: int) -> tuple[int, int]:
        if self.pp_size != len(bounds) - 1:
            raise WorldSizeError(
                f"the plan has {len(bounds) - 1} stages, but pp_size is {self.pp_size}; make them the same."
            )
        if num_layers != bounds[-1]:
            raise PartitionFormatError(
                f"the plan places {bounds[-1]} blocks, but this model has {num_layers}; make a plan for this model."
            )
        return bounds[rank], bounds[rank + 1]

    original = PipelineStage.layer_range_for_rank
    PipelineStage.layer_range_for_rank = layer_range_for_rank
    try:
        yield
    finally:
        PipelineStage.layer_range_for_rank = original
