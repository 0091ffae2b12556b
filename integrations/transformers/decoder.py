"""A run of a decoder's layers as one module: the hollow decoder.

Layers are numbered as in `ModelProfile.from_config`: 0 is the embedding, ``1 .. n`` the blocks, ``n + 1`` the
final norm, ``n + 2`` the head. A stage builds transformers' own decoder with as many blocks as it holds, leaves
out the embedding, norm and head it does not hold, and calls that decoder with ``inputs_embeds``, so that masks,
rotary embeddings and sliding windows stay transformers'.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lp_plugin.errors import UnsupportedModelError
from lp_plugin.integrations.transformers.runnable import check_runnable

__all__ = ["DecoderStage", "num_layers"]

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f")
"""What families call the final norm, where transformers has no accessor for it."""
_POSITION_TABLES = ("wpe",)
"""What families call a learned position table."""
_EMBEDDING_DROPOUTS = ("drop", "emb_dropout")
"""Dropout after the embedding; it belongs to the embedding layer."""


def num_layers(config: PretrainedConfig) -> int:
    """Layers in the list: embedding, blocks, norm, head."""
    return int(config.num_hidden_layers) + 3


class _NoPositions(nn.Module):
    """In place of a position table that another stage has added already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


class DecoderStage(nn.Module):
    """Layers ``start .. stop - 1`` of a decoder, on the meta device until materialised.

    Args:
        config: The whole model's configuration.
        start: First layer.
        stop: One past the last layer.

    Raises:
        UnsupportedModelError: If the model can't be cut this way; says why.
    """

    def __init__(self, config: PretrainedConfig, start: int, stop: int) -> None:
        super().__init__()
        check_runnable({"model_type": config.model_type})
        blocks = int(config.num_hidden_layers)
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise UnsupportedModelError(
                "scale_attn_by_inverse_layer_idx makes a block depend on its position in the whole model; "
                "such a model can't be cut into stages."
            )
        self.first_block = max(start - 1, 0)
        last_block = min(stop - 1, blocks)
        self.has_embedding = start == 0
        self.has_norm = start <= blocks + 1 < stop
        self.has_head = stop == blocks + 3
        self.has_decoder = self.has_embedding or self.has_norm or self.first_block < last_block
        self.tied = bool(config.tie_word_embeddings)
        own = _shortened(config, self.first_block, max(last_block, self.first_block))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own)
        self.decoder_name = model.base_model_prefix
        self.head_name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        table = model.get_input_embeddings()
        decoder = getattr(model, self.decoder_name)
        self.embedding_name = next(f"{name}.weight" for name, module in decoder.named_modules() if module is table)
        self.model = model
        self._hollow()

    def forward(self, value: Any) -> Any:
        """Runs the layers.

        Args:
            value: Token ids [batch, sequence] for the first stage, else the activation [batch, sequence, hidden];
                or a tuple of that and an attention mask [batch, sequence] (1 for tokens, 0 for padding), which
                is handed on.

        Returns:
            The same structure for the next stage; logits [batch, sequence, vocabulary] alone after the head.
        """
        masked = isinstance(value, tuple)
        hidden, mask = value if masked else (value, None)
        if self.has_decoder:
            inputs = {"input_ids": hidden} if self.has_embedding else {"inputs_embeds": hidden}
            decoder = getattr(self.model, self.decoder_name)
            hidden = decoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        if self.has_head:
            return self.model.get_output_embeddings()(hidden)
        return (hidden, mask) if masked else hidden

    def checkpoint_name(self, name: str) -> str:
        """Name of one of ``self.model``'s tensors in the whole model."""
        prefix = f"{self._blocks_name}."
        if not name.startswith(prefix):
            return name
        index, rest = name[len(prefix) :].split(".", 1)
        return f"{prefix}{int(index) + self.first_block}.{rest}"

    def materialize(self, device: torch.device | str, dtype: torch.dtype, *, tie: bool = False) -> None:
        """Gives every tensor memory on ``device``: parameters uninitialised, computed buffers recomputed.

        Args:
            device: Where to.
            dtype: Precision of the parameters.
            tie: Whether head and embedding, if both are here, share their matrix.

        Raises:
            UnsupportedModelError: If a buffer that no checkpoint holds can't be recomputed.
        """
        rebuilt: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if module._non_persistent_buffers_set and any(
                module._buffers[key] is not None for key in module._non_persistent_buffers_set
            ):
                try:
                    rebuilt[name] = type(module)(config=self.model.config)
                except TypeError as error:
                    raise UnsupportedModelError(
                        f"{type(module).__name__} holds a buffer that no checkpoint has and can't be rebuilt: {error}"
                    ) from error
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.to_empty(device=device)
        for name, module in rebuilt.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module.to(device))
        if tie and self.has_embedding and self.has_head:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def randomize(self, std: float = 0.02) -> None:
        """Random weights, for timing a layer whose values don't matter."""
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            else:
                nn.init.ones_(parameter)

    def _hollow(self) -> None:
        """Takes out what the stage does not hold."""
        decoder = getattr(self.model, self.decoder_name)
        norm = next((name for name in _FINAL_NORMS if hasattr(decoder, name)), None)
        stack = next(
            (
                name
                for name, module in decoder.named_children()
                if isinstance(module, nn.ModuleList) and len(module) == self.model.config.num_hidden_layers
            ),
            None,
        )
        if norm is None or stack is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no list of blocks followed by a final norm that we know; "
                "it can't be cut into stages."
            )
        self._blocks_name = f"{self.decoder_name}.{stack}"
        if not self.has_embedding:
            decoder.set_input_embeddings(nn.Identity())
            for name in _POSITION_TABLES:
                if hasattr(decoder, name):
                    setattr(decoder, name, _NoPositions())
            for name in _EMBEDDING_DROPOUTS:
                if hasattr(decoder, name):
                    setattr(decoder, name, nn.Identity())
        if not self.has_norm:
            setattr(decoder, norm, nn.Identity())
        if not self.has_head:
            self.model.set_output_embeddings(nn.Identity())


def _shortened(config: PretrainedConfig, first: int, last: int) -> PretrainedConfig:
    """The configuration of a decoder that has blocks ``first .. last - 1`` alone."""
    own = copy.deepcopy(config)
    own.num_hidden_layers = last - first
    own.tie_word_embeddings = False  # ties are made, or loaded twice, by the stages that hold the tensors
    if getattr(own, "layer_types", None):
        own.layer_types = own.layer_types[first:last]
    return own
