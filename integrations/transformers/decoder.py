"""A run of a model's layers as one module: the hollow decoder.

Layers are numbered as in `ModelProfile.from_config`: 0 is the embedding, then come the blocks (each one layer, or, in
halves, attention and MLP, one layer each), the final norm where there is one, and the head. A stage is transformers'
own model with the blocks that the stage holds, without embedding, norm and head that it does not hold; it is called
with ``inputs_embeds``, so that masks, rotary embeddings, sliding windows and what is done to logits stay transformers'.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask

from lp_plugin.errors import UnsupportedModelError, WorkloadError
from lp_plugin.integrations.transformers.halves import HALVES, leave_out
from lp_plugin.integrations.transformers.host_constants import NoHostConstants
from lp_plugin.integrations.transformers.runnable import ENCODERS, check_runnable
from lp_plugin.model import LayerCost, ModelProfile

__all__ = ["CACHE_ARGUMENT", "DecoderStage", "num_layers"]

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers' models call their KV cache: ``cache`` since 5.24, which warns of the older name."""

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f")
"""What families call the final norm, where transformers has no accessor for it."""

_HOST_CONSTANTS = frozenset({"bloom", "falcon"})
"""Families whose code copies constants from the host in every pass, in one of the versions of transformers."""


class _NoPositions(nn.Module):
    """In place of a position table that another stage has added already."""

    def forward(self, mask_or_positions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=mask_or_positions.device)


class _Embedded(nn.Module):
    """In place of a module that embeds: another stage has done so."""

    def forward(self, *, inputs_embeds: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return inputs_embeds


_EMBEDDING_PARTS = {
    "drop": nn.Identity,
    "emb_dropout": nn.Identity,
    "embed_positions": _NoPositions,
    "embedding_multiplier": lambda: 1.0,
    "embeddings": _Embedded,
    "project_in": lambda: None,
    "word_embeddings_layernorm": nn.Identity,
    "wpe": _NoPositions,
}
"""What belongs to the embedding layer beside the table, by its name -> what stands in its place elsewhere."""


def num_layers(config: PretrainedConfig, *, halves: bool = False) -> int:
    """Layers in the list, embedding and head included.

    Args:
        config: The whole model's configuration.
        halves: Whether attention and MLP count separately, where a block can be cut between them.
    """
    return len(_layers(config, halves))


def _layers(config: PretrainedConfig, halves: bool) -> tuple[LayerCost, ...]:
    check_runnable(config.to_dict(), encodes=True)
    return ModelProfile.from_config(config.to_dict(), granularity="sublayer" if halves else "layer").layers


class DecoderStage(nn.Module):
    """Layers ``start .. stop - 1`` of a model, on the meta device until materialised.

    Args:
        config: The whole model's configuration.
        start: First layer.
        stop: One past the last layer.
        halves: Whether layers are numbered with attention and MLP apart, as with ``granularity="sublayer"``.
        head: False for a model without its head, as for embeddings: the last stage gives the final hidden state. An
            encoder never has one.

    Attributes:
        model: transformers' model, hollowed.
        has_embedding: Whether the stage takes token ids.
        has_norm: Whether it holds the final norm.
        has_head: Whether it gives logits.
        is_last: Whether it holds the last layer.
        first_block: The first block that it holds all or half of, as the whole model numbers them.
        decoder_name: Name of the base model within ``model``; empty if it is the base model itself.
        embedding_name: Name of the table of tokens within the base model, ``.weight`` included.
        blocks_name: Name of the list of blocks within ``model``.
        head_name: Name of the head within ``model``; None for an encoder.
        tied: Whether head and embedding of the whole model share their matrix.
        config: The whole model's configuration.
        with_head: Whether the whole model has its head.
        cuts: Name of a tensor within ``model`` -> how tensor parallelism cuts it (`tensor_parallel.Cut`).

    Raises:
        UnsupportedModelError: If the model can't be cut this way; says why.
    """

    def __init__(
        self, config: PretrainedConfig, start: int, stop: int, *, halves: bool = False, head: bool = True
    ) -> None:
        super().__init__()
        layers = _layers(config, halves)
        kinds, parts = {layer.kind for layer in layers[start:stop]}, _parts(layers[start:stop])
        encoder = config.model_type in ENCODERS
        self.has_embedding = "embedding" in kinds
        self.has_norm = "norm" in kinds
        self.is_last = "head" in kinds
        self.has_head = self.is_last and head and not encoder
        self.tied = bool(config.tie_word_embeddings)
        self.first_block = min(parts, default=0)
        self.config, self.with_head = config, head
        self.cuts: dict[str, Any] = {}
        self._frequency_bounds = _frequency_bounds(config)
        self.model = _whole(config, encoder)
        self.decoder_name = self.model.base_model_prefix if hasattr(self.model, self.model.base_model_prefix) else ""
        table, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.embedding_name = next(
            f"{name}.weight" for name, module in self._decoder.named_modules() if module is table
        )
        self.head_name = next(
            (name for name, module in self.model.named_modules() if output is not None and module is output), None
        )
        stack, self.blocks_name = _stack(self.model, self._decoder, int(config.num_hidden_layers))
        if any(layer.kind == "norm" for layer in layers) != (_final_norm(stack) is not None):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no list of blocks followed by a final norm that we know; "
                "it can't be cut into stages."
            )
        self._keep_blocks(stack, parts)
        self._leave_out_ends(stack)

    @property
    def _decoder(self) -> nn.Module:
        """The base model: all but the head."""
        return self.model.get_submodule(self.decoder_name)

    def forward(self, value: Any) -> Any:
        """Runs the layers.

        Args:
            value: Token ids [batch, sequence] for the first stage, else the activation [batch, sequence, hidden];
                or a tuple of that and an attention mask [batch, sequence] (1 for tokens, 0 for padding), which
                is handed on.

        Returns:
            The same structure for the next stage; after the last layer the logits [batch, sequence, vocabulary]
            alone, or, without a head, the final hidden state [batch, sequence, hidden] alone.
        """
        masked = isinstance(value, tuple)
        hidden, mask = value if masked else (value, None)
        hidden = self._run(hidden, attention_mask=mask, use_cache=False)
        return (hidden, mask) if masked and not self.is_last else hidden

    def new_cache(self, rows: int, length: int) -> Cache:
        """An empty static KV cache for this stage, one layer per block that holds attention.

        All layers hold the whole length, those of sliding windows too: windows are in the masks.

        Args:
            rows: Sequences.
            length: Tokens per sequence that it can hold, padding included.

        Raises:
            WorkloadError: If sequences can get so long that the model's rotary frequencies depend on the longest one of
                a batch; tells how long they may be.
            UnsupportedModelError: If the model is an encoder.
        """
        if self.model.config.model_type in ENCODERS:
            raise UnsupportedModelError(f"a {self.model.config.model_type} model encodes; it can't generate tokens.")
        for rope, bound in self._frequency_bounds.items():
            if length > bound:
                raise WorkloadError(
                    f"sequences of {length} tokens, padding and new ones included, can't be generated together: beyond "
                    f"{bound} tokens this model's rotary frequencies ({rope}) depend on the longest sequence of a "
                    "batch; give shorter prompts, or ask for fewer new tokens."
                )
        return Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(self._num_attentions)])

    def step(
        self, hidden: torch.Tensor, *, attention_mask: torch.Tensor, position_ids: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """One prefill or decode pass with cache; a pass of one token can be a CUDA graph if the stage is `capturable`.

        Args:
            hidden: Token ids [rows, tokens] for the first stage, else the activation [rows, tokens, hidden].
            attention_mask: int64 [rows, cache length]: 1 for a token that is in the cache or in this pass, else 0.
            position_ids: int64 [rows, tokens].
            cache: Of `new_cache`; it takes in this pass's keys and values.

        Returns:
            The activation [rows, tokens, hidden]; after the head the logits [rows, 1, vocabulary] of the last position.
        """
        attends = self._num_attentions > 0
        return self._run(
            hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=attends,
            **{CACHE_ARGUMENT: cache if attends else None},
            **({"logits_to_keep": 1} if self.has_head else {}),
        )

    @property
    def capturable(self) -> bool:
        """Whether a `step` of one token can be captured as a CUDA graph.

        Not if rotary frequencies can change: transformers then asks the device for the longest sequence. Nor if there
        are experts in another precision than bfloat16: PyTorch's grouped product then asks it for their shares.
        """
        experts = (parameter for name, parameter in self.model.named_parameters() if ".experts." in name)
        return not self._frequency_bounds and all(parameter.dtype == torch.bfloat16 for parameter in experts)

    def repeat_block(self, copies: int) -> None:
        """Puts further copies of the only block behind it, each with weights and a cache of its own.

        For measuring, on the meta device: the stage holds no layers of the model any more.

        Args:
            copies: Blocks that there are then.
        """
        config = self.model.config
        owner, _, name = self.blocks_name.rpartition(".")
        (block,) = self.model.get_submodule(self.blocks_name)
        blocks = [block, *(copy.deepcopy(block, {id(config): config}) for _ in range(copies - 1))]
        for index, each in enumerate(blocks):
            for module in each.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        setattr(self.model.get_submodule(owner), name, nn.ModuleList(blocks))
        config.num_hidden_layers = copies
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types * copies
        self._num_attentions *= copies

    def checkpoint_name(self, name: str) -> str:
        """Name of one of ``self.model``'s tensors in the whole model."""
        prefix = f"{self.blocks_name}."
        if not name.startswith(prefix):
            return name
        index, rest = name[len(prefix) :].split(".", 1)
        return f"{prefix}{int(index) + self.first_block}.{rest}"

    def _run(self, hidden: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The forward pass, by transformers."""
        inputs["input_ids" if self.has_embedding else "inputs_embeds"] = hidden
        with NoHostConstants() if self.model.config.model_type in _HOST_CONSTANTS else contextlib.nullcontext():
            if self.has_head:
                return self.model(**inputs).logits
            return self._decoder(**inputs).last_hidden_state

    def _keep_blocks(self, stack: nn.Module, parts: dict[int, set[str]]) -> None:
        """Keeps the stage's own blocks, or halves of them, and numbers their caches from 0."""
        config, first = self.model.config, self.first_block
        name = self.blocks_name.rpartition(".")[2]
        blocks = [stack.get_submodule(name)[index] for index in sorted(parts)]
        setattr(stack, name, nn.ModuleList(blocks))
        config.num_hidden_layers = len(blocks)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[first : first + len(blocks)]
        self._num_attentions = 0
        for index, block in zip(sorted(parts), blocks, strict=True):
            if "mlp" not in parts[index]:
                leave_out(block, HALVES[config.model_type].mlp)
            if "attention" not in parts[index]:
                leave_out(block, HALVES[config.model_type].attention)
                continue
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = self._num_attentions
            self._num_attentions += 1
        if not self._num_attentions:
            config._attn_implementation = "none"  # of a kind that transformers has no masks for: it makes none

    def _leave_out_ends(self, stack: nn.Module) -> None:
        """Takes out embedding, norm and head where the stage does not hold them."""
        if not self.has_embedding:
            self._decoder.set_input_embeddings(nn.Identity())
            for owner in (self._decoder, stack):
                for name, stand_in in _EMBEDDING_PARTS.items():
                    if hasattr(owner, name):
                        setattr(owner, name, stand_in())
        norm = _final_norm(stack)
        if norm is not None and not self.has_norm:
            setattr(stack, norm, nn.Identity())
        if not self.is_last and hasattr(stack, "project_out"):
            stack.project_out = None
        if not self.has_head and self.head_name is not None:
            self.model.set_output_embeddings(nn.Identity())


def _parts(layers: Sequence[LayerCost]) -> dict[int, set[str]]:
    """Block -> which of its halves are among the layers, ``attention`` or ``mlp``."""
    parts: dict[int, set[str]] = {}
    for layer in layers:
        if layer.block is not None:
            halves = ("attention", "mlp") if layer.kind == "block" else (layer.kind,)
            parts.setdefault(layer.block, set()).update(halves)
    return parts


def _whole(config: PretrainedConfig, encoder: bool) -> PreTrainedModel:
    """The whole model without weights, on a configuration of its own; an encoder without pooler and head."""
    own = copy.deepcopy(config)
    own.tie_word_embeddings = False  # ties are made, or loaded twice, by the stages that hold the tensors
    with torch.device("meta"):
        if encoder:
            return AutoModel.from_config(own, add_pooling_layer=False, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(own, trust_remote_code=False)


def _stack(model: PreTrainedModel, decoder: nn.Module, blocks: int) -> tuple[nn.Module, str]:
    """The module that holds the list of blocks, and the list's name in the model."""
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == blocks)
    found = next(lists, None)
    for name, module in model.named_modules():
        if module is found:
            return model.get_submodule(name.rpartition(".")[0]), name
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {blocks} blocks; it can't be cut into stages.")


def _final_norm(stack: nn.Module) -> str | None:
    """Name of the norm after the blocks."""
    return next((name for name in _FINAL_NORMS if getattr(stack, name, None) is not None), None)


def _frequency_bounds(config: PretrainedConfig) -> dict[str, int]:
    """Kinds of rotary embeddings whose frequencies change with the longest sequence of a batch -> from which length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    ropes = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    bounds = {}
    for rope in ropes:
        if rope.get("rope_type") == "dynamic":
            bounds["dynamic"] = int(config.max_position_embeddings)
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            bounds["longrope"] = int(original)
    return bounds
