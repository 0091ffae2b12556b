"""Random weights as transformers initialises the whole model, a stage at a time.

Every block, and every module beside the blocks, is drawn from a seed of its own, made of its name in the whole model:
neither the cut nor the number of stages makes a difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from lp_plugin.integrations.deepspeed.layers import undisturbed_random
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.materialize import materialize

__all__ = ["initialize_stage"]


def initialize_stage(stage: DecoderStage, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
    """Materialises a stage and fills it.

    Args:
        stage: On the meta device. Tied matrices on two stages are two random ones: whoever ties them copies one.
        device: Where the stage will run; another kind of device draws other numbers.
        dtype: Precision of the weights.
        seed: Of the whole model.
    """
    materialize(stage, device, dtype, tie=stage.tied)
    for parameter in stage.model.parameters():
        parameter._is_hf_initialized = False
    own, whole = stage.model.config.num_hidden_layers, stage.config.num_hidden_layers
    stage.model.config.num_hidden_layers = whole  # some families scale by the depth
    with undisturbed_random():
        for name, modules in _units(stage):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            for module in modules:
                stage.model._init_weights(module)
    stage.model.config.num_hidden_layers = own


def _units(stage: DecoderStage) -> Iterator[tuple[str, list[nn.Module]]]:
    """Name in the whole model -> modules to initialise, a child before its parent; a tied head is its embedding."""
    blocks = stage.model.get_submodule(stage.blocks_name)
    for index, block in enumerate(blocks):
        yield f"{stage.blocks_name}.{stage.first_block + index}", list(reversed(list(block.modules())))
    inside = set(blocks.modules())
    tied = stage.model.get_output_embeddings() if stage.tied and stage.has_embedding and stage.has_head else None
    for name, module in stage.model.named_modules():
        if module not in inside and module is not tied and any(True for _ in module.parameters(recurse=False)):
            yield name, [module]
