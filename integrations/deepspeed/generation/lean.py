"""transformers' forward pass in fewer kernels: on GPUs a decode pass is bound by their number, not by arithmetic.

Nothing of the model changes for good but where its weights lie, and values differ by rounding at most: what
transformers does anew in every block is done once per pass, norms run as one kernel of PyTorch instead of eight,
rotations as 5 instead of 10, and projections of the same input as one product.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from lp_plugin.integrations.deepspeed.joint_projections import JointProjections

__all__ = ["LeanPass", "lean_cache"]

_EPSILONS = ("variance_epsilon", "eps")
"""What transformers' RMS norms call it."""
_TOLERANCE = 1e-5
"""Relative and absolute, in float32, between a norm of transformers and PyTorch's."""
_MASKED = torch.finfo(torch.float16).min
"""Added to scores that don't count: far enough for a share of exactly 0 in any precision, yet finite, so that queries
of padding, which may see no key at all, get numbers and never NaN from any attention kernel (for PyTorch's own
conversion of masks cuDNN's gets the same value)."""


class LeanPass:
    """A context in which a model makes its passes; can be entered again and again.

    Masks are converted to what attention adds once, not in every block. RMS norms run as one kernel, and queries and
    keys are rotated together, where that gives the same; this is tried out beforehand. On GPUs queries, keys and values
    are made by one product. Inside, transformers is changed for the whole process: one thread at a time, and no
    context within another's.

    Args:
        model: transformers' model, on its device.

    Attributes:
        compiled: The context for compiled passes instead.
    """

    def __init__(self, model: nn.Module) -> None:
        on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        joint = JointProjections(model) if on_gpu else None
        self.compiled: contextlib.AbstractContextManager[None] = joint.all if joint else contextlib.nullcontext()
        self._attention: contextlib.AbstractContextManager[None] = (
            joint.attention if joint else contextlib.nullcontext()
        )
        self._norms = list(_fused_norms(model))
        self._rotations = list(_joint_rotations(model))

    def __enter__(self) -> None:
        self._attention.__enter__()
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _additive_mask
        for module, forward in self._norms:
            module.forward = forward
        for source, _, rotation in self._rotations:
            source.apply_rotary_pos_emb = rotation  # type: ignore[attr-defined]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        for module, _ in self._norms:
            del module.forward
        for source, theirs, _ in self._rotations:
            source.apply_rotary_pos_emb = theirs  # type: ignore[attr-defined]
        self._attention.__exit__(kind, error, trace)


def _additive_mask(*args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor | None:
    """The mask of transformers for scaled-dot-product attention, as PyTorch adds it to the scores."""
    mask = sdpa_mask(*args, dtype=dtype, **kwargs)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, _MASKED)


def _fused_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The RMS norms that PyTorch's kernel can stand in for, and it."""
    same: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        epsilon = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
        weight: Any = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or epsilon is None or type(weight) is not nn.Parameter:
            continue
        forward = functools.partial(
            functional.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=float(epsilon)
        )
        if type(module) not in same:
            same[type(module)] = _is_same(module, forward)
        if same[type(module)]:
            yield module, forward


def _is_same(module: nn.Module, forward: Any) -> bool:
    weight = forward.keywords["weight"].float()
    sample = torch.linspace(-3, 2, 2 * weight.numel(), device=weight.device).view(2, -1)
    theirs = module(sample).float()
    return torch.allclose(forward(sample, weight=weight), theirs, rtol=_TOLERANCE, atol=_TOLERANCE)


Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""transformers' ``apply_rotary_pos_emb``: (queries, keys, cos, sin) -> (queries, keys)."""


class _JointRotation:
    """Rotary positions for queries and keys [rows, heads, tokens, size] in one go: 5 kernels instead of 10.

    Args:
        theirs: For calls of another form, such as those that rotate a part of the size.
    """

    def __init__(self, theirs: Rotation) -> None:
        self._theirs = theirs
        self._sin: torch.Tensor | None = None
        self._signed: torch.Tensor | None = None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates."""
        size = cos.shape[-1]
        if others or named or size != q.shape[-1]:
            return self._theirs(q, k, cos, sin, *others, **named)
        if self._signed is None or self._sin is not sin:  # once per pass: all blocks get the same
            self._sin = sin
            self._signed = torch.cat((-sin[..., : size // 2], sin[..., size // 2 :]), dim=-1).unsqueeze(1)
        both, angles = torch.cat((q, k), dim=1), cos.unsqueeze(1)
        turned = both.roll(size // 2, dims=-1)
        if both.dtype == cos.dtype:  # in place: this is where a block's memory peaks
            both.mul_(angles).add_(turned.mul_(self._signed))
        else:
            both = both * angles + turned * self._signed
        return both[:, : q.shape[1]], both[:, q.shape[1] :]


def _joint_rotations(model: nn.Module) -> Iterator[tuple[ModuleType, Rotation, Rotation]]:
    """Modules of transformers whose blocks rotate in the usual way: module, its function, and ours."""
    for source in {sys.modules[type(module).__module__] for module in model.modules()}:
        theirs: Rotation | None = getattr(source, "apply_rotary_pos_emb", None)
        if theirs is not None and _rotates_alike(theirs):
            yield source, theirs, _JointRotation(theirs)


def _rotates_alike(theirs: Rotation) -> bool:
    """Whether values and types are the same for a sample, angles in its precision and in a higher one."""
    numbers = torch.linspace(-2, 3, 8 * 12).view(1, 4, 3, 8)
    q, k, cos, sin = numbers[:, :2], numbers[:, 2:3], numbers[:, 3], numbers[:, 3] + 1
    for precision in (torch.float32, torch.bfloat16):
        sample = (q.to(precision), k.to(precision), cos, sin)
        for expected, found in zip(theirs(*sample), _JointRotation(theirs)(*sample), strict=True):
            if expected.dtype != found.dtype or not torch.equal(expected, found):
                return False
    return True


class _Filling:
    """How far the caches of all blocks are filled: the same everywhere."""

    def __init__(self, device: torch.device) -> None:
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.columns = torch.zeros(0, dtype=torch.long, device=device)


class _BlockCache(StaticLayer):
    """A static cache of one block, which counts together with the other blocks'."""

    def __init__(self, length: int, filling: _Filling, *, is_first: bool, is_last: bool) -> None:
        super().__init__(max_cache_len=length)
        self.cumulative_length = filling.length
        self._filling, self._is_first, self._is_last = filling, is_first, is_last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the keys and values of a pass's tokens; gives the whole cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, filling = key_states.shape[-2], self._filling
        if self._is_first:
            filling.columns = torch.arange(tokens, device=key_states.device) + filling.length
        self.keys.index_copy_(2, filling.columns, key_states)
        self.values.index_copy_(2, filling.columns, value_states)
        if self._is_last:
            filling.length.add_(tokens)
        return self.keys, self.values


def lean_cache(cache: Cache, device: torch.device) -> Cache:
    """A cache of as many blocks and tokens, whose blocks count their tokens together.

    Args:
        cache: Of static layers of one length, still empty.
        device: Where it will be.
    """
    filling, last = _Filling(device), len(cache.layers) - 1
    return Cache(
        layers=[
            _BlockCache(layer.max_cache_len, filling, is_first=index == 0, is_last=index == last)
            for index, layer in enumerate(cache.layers)
        ]
    )
