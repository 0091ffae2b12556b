"""From a checkpoint's names and layout to those of transformers' model, by transformers' own conversions.

Everything is decided from headers alone, for the whole model: each rank finds the same mistakes by itself, without
communication, whichever part it will load.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lp_plugin.errors import UnsupportedModelError, WeightsError
from lp_plugin.integrations.transformers.checkpoint import StoredTensor

__all__ = ["Layout", "Piece", "lay_out"]

_NEVER_LOADED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)masked_bias$")
"""Buffers that old checkpoints hold and models compute themselves."""
_AS_IT_IS = ""
"""In place of a conversion's pattern, of tensors that need none."""
_NAMED = 3
"""Tensors named in an error message; of the rest their number."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stored tensor and the part of a model's tensor that it fills."""

    stored: StoredTensor
    """Where it is read from."""
    start: tuple[int, ...]
    """First element of the part, by dimension of the model's tensor."""
    stacked: int | None = None
    """Dimension that the model's tensor has and the stored one lacks: stored tensors are stacked along it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part, by dimension of the model's tensor."""
        if self.stacked is None:
            return self.stored.shape
        return (*self.stored.shape[: self.stacked], 1, *self.stored.shape[self.stacked :])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a checkpoint fills a whole model."""

    pieces: Mapping[str, tuple[Piece, ...]]
    """Name of a tensor in the whole model -> what fills it; tied tensors that are stored once share theirs."""
    tied: Mapping[str, str]
    """Names that the configuration ties: head -> embedding."""
    conversions: tuple[Any, ...]
    """transformers' conversions that were needed, in its order; saving reverts them."""


def lay_out(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], directory: Path, *, without: Iterable[str] = ()
) -> Layout:
    """Finds what fills each tensor of a model, from names and shapes alone.

    Args:
        model: The whole model, on the meta device.
        stored: The checkpoint's tensors.
        directory: Named in messages.
        without: Tensors that need not be there.

    Raises:
        WeightsError: If a tensor is missing, of another shape, stored twice, in a precision that can't be converted, or
            belongs to a module of this model that has no such tensor.
        UnsupportedModelError: If transformers would convert in a way that can't be done piece by piece.
    """
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, dict[str, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    rest: dict[str, StoredTensor] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, _AS_IT_IS
        if target in state:
            sources[target][pattern or _AS_IT_IS].append(stored[name])
        else:
            rest[target] = stored[name]
    pieces = {target: _pieces(target, state[target], given, by_pattern) for target, given in sources.items()}
    tied = dict(model.all_tied_weights_keys)
    for head, embedding in tied.items():
        found = pieces.get(head) or pieces.get(embedding)
        if found is not None:
            pieces.setdefault(head, found)
            pieces.setdefault(embedding, found)
    _refuse(directory, "lacks", sorted(state.keys() - pieces.keys() - set(without), key=dot_natural_key))
    _refuse(directory, "also holds", _unexpected(rest, model, state))
    return Layout(pieces=pieces, tied=tied, conversions=tuple(each for each in conversions if each.was_used()))


def _unexpected(rest: Mapping[str, StoredTensor], model: PreTrainedModel, state: Iterable[str]) -> list[str]:
    """Of tensors that the model lacks, those that belong to its own modules; other modules' tensors are let be."""
    prefix = f"{model.base_model_prefix}."
    own = {name.removeprefix(prefix).split(".", 1)[0] for name in state}
    ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *_NEVER_LOADED]))
    return [
        f"{tensor.name} (in {tensor.file.name})"
        for name, tensor in rest.items()
        if name.removeprefix(prefix).split(".", 1)[0] in own and not ignored.search(name)
    ]


def _pieces(
    target: str,
    tensor: torch.Tensor,
    given: Mapping[str, list[StoredTensor]],
    by_pattern: Mapping[str, WeightConverter],
) -> tuple[Piece, ...]:
    """What fills one tensor of the model."""
    if _AS_IT_IS not in given:
        return _merged(target, tensor, given, by_pattern[next(iter(given))])
    found = [each for same in given.values() for each in same]
    if len(found) > 1:
        names = " and ".join(f"{each.name} (in {each.file.name})" for each in found[:_NAMED])
        raise WeightsError(f"{found[0].file.parent}: {names} would both fill {target}; remove one, or save it again.")
    (one,) = found
    _check(one, tuple(tensor.shape))
    return (Piece(stored=one, start=(0,) * tensor.dim()),)


def _merged(
    target: str,
    tensor: torch.Tensor,
    given: Mapping[str, list[StoredTensor]],
    converter: WeightConverter,
) -> tuple[Piece, ...]:
    """The pieces of a tensor that is stacked of many and joined, as of the experts of a layer."""
    stack, *joins = converter.operations
    known = type(stack) is MergeModulelist and [type(each) for each in joins] in ([], [Concatenate])
    if not known:
        raise UnsupportedModelError(
            f"the checkpoint stores {target} in a layout that transformers converts by {converter.operations}, which "
            "can't be loaded piece by piece; load it with transformers and save it with save_original_format=False."
        )
    patterns = converter.source_patterns
    part = list(tensor.shape)
    if joins:
        part[joins[0].dim] //= len(patterns)
    expected = tuple(part[: stack.dim] + part[stack.dim + 1 :])
    pieces: list[Piece] = []
    for position, pattern in enumerate(patterns):
        found = given.get(pattern, [])
        if len(found) != tensor.shape[stack.dim]:
            some = next(each for same in given.values() for each in same)
            raise WeightsError(
                f"{some.file.parent} has {len(found)} tensors like *{pattern} for {target}, but the config asks for "
                f"{tensor.shape[stack.dim]}; the checkpoint is incomplete or belongs to another config."
            )
        for index, each in enumerate(found):
            _check(each, expected)
            start = [0] * tensor.dim()
            if joins:
                start[joins[0].dim] = position * part[joins[0].dim]
            start[stack.dim] = index
            pieces.append(Piece(stored=each, start=tuple(start), stacked=stack.dim))
    return tuple(pieces)


def _check(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Refuses another shape, and a precision that can't be converted."""
    if stored.shape != shape:
        raise WeightsError(
            f"{stored.file}: {stored.name} has shape {stored.shape}, but the config asks for {shape}; "
            "the weights belong to another config."
        )
    _ = stored.torch_dtype


def _refuse(directory: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise WeightsError(
            f"{directory} {what} {', '.join(names[:_NAMED])}{more}, compared with what its config asks for; "
            "the weights belong to another config, or the checkpoint is incomplete."
        )
