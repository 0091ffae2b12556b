"""Projections of the same input as one matrix product: on GPUs small passes are bound by the number of kernels.

Queries, keys and values of attention are made of one tensor, and so are gate and up projections of a gated MLP.
transformers computes each by itself. Here their weights become rows of one joint matrix, in the same amount of memory;
whichever is asked first computes all, and the others hand out what it found for them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import nn
from torch.nn import functional

__all__ = ["JointProjections"]

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls projections of the same input, in the order in which it asks them."""

_Forward = Callable[[torch.Tensor], torch.Tensor]


class JointProjections:
    """Contexts in which a model's projections of the same input run as one product; can be entered again and again.

    Passes in them may be launched, captured or traced by ``torch.compile``, all without gradients. Results differ by
    rounding at most. Weights move once, when the first such context of a model is made: graphs that were captured
    before must not run again. Parameters stay the same objects of the same names and values. Whether a module asks its
    projections in the expected way is tried out; if not, or if they aren't plain linear layers without gradients, they
    are left alone, and so are weights that have been moved since.

    Args:
        model: transformers' model, on its device.

    Attributes:
        all: For compiled passes.
        attention: For others: without gate and up projections, whose parts of one product lie apart in memory, which
            costs kernels that aren't compiled more than one product saves.
    """

    def __init__(self, model: nn.Module) -> None:
        groups = [group for owner in model.modules() for group in _groups(owner)]
        joints = [_Joint(group) for group in groups]
        self.all = _Within(joints)
        self.attention = _Within([joint for joint, group in zip(joints, groups, strict=True) if len(group) == 3])


class _Within:
    """A context in which some groups run as one product each."""

    def __init__(self, joints: Sequence[_Joint]) -> None:
        self._joints = joints

    def __enter__(self) -> None:
        for joint in self._joints:
            if joint.is_current():
                for module, forward in joint.forwards:
                    module.__dict__["forward"] = forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for joint in self._joints:
            for module, _ in joint.forwards:
                module.__dict__.pop("forward", None)


class _Joint:
    """Projections of one input, in the order in which they are asked.

    Args:
        modules: Linear layers, all with bias or all without.

    Attributes:
        forwards: Each of them, and what it runs in place of its own forward.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._weights = [module.weight for module in modules]
        self._biases = [module.bias for module in modules if module.bias is not None]
        self._sizes = [len(weight) for weight in self._weights]
        self._weight = _joined(self._weights)
        self._bias = _joined(self._biases) if self._biases else None
        self._places = [parameter.data_ptr() for parameter in (*self._weights, *self._biases)]
        self._input: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()
        self.forwards: list[tuple[nn.Linear, _Forward]] = [(modules[0], self._first)]
        for number, module in enumerate(modules[1:], 1):
            self.forwards.append((module, functools.partial(self._further, module, number)))

    def is_current(self) -> bool:
        """Whether the modules' weights still are the rows of the joint matrix."""
        found = [module.weight.data_ptr() for module, _ in self.forwards]
        if self._biases:
            found += [module.bias.data_ptr() for module, _ in self.forwards]
        return found == self._places

    def _first(self, value: torch.Tensor) -> torch.Tensor:
        self._input = value
        self._parts = functional.linear(value, self._weight, self._bias).split(self._sizes, dim=-1)
        return self._parts[0]

    def _further(self, module: nn.Linear, number: int, value: torch.Tensor) -> torch.Tensor:
        if value is not self._input:
            return functional.linear(value, module.weight, module.bias)
        part = self._parts[number]
        if number == len(self._sizes) - 1:  # nothing is kept from pass to pass
            self._input, self._parts = None, ()
        return part


def _groups(owner: nn.Module) -> Iterator[list[nn.Linear]]:
    """A module's children that can be joined."""
    for names in _GROUPS:
        found = [owner._modules.get(name) for name in names]
        group = [module for module in found if type(module) is nn.Linear and _is_untouched(module)]
        if len(group) == len(names) and _joinable(group) and _asks_in_order(owner, group):
            yield group


def _is_untouched(module: nn.Module) -> bool:
    """Whether nothing is done to what comes in or goes out, as some styles of tensor parallelism do."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def _joinable(group: Sequence[nn.Linear]) -> bool:
    """Whether one matrix can hold the weights, and one vector the biases, without further memory."""
    weights = [module.weight for module in group]
    biases = [module.bias for module in group if module.bias is not None]
    kinds = {(weight.dtype, weight.device, weight.shape[1]) for weight in weights}
    plain = all(type(each) is nn.Parameter and not each.requires_grad for each in (*weights, *biases))
    return (
        len(kinds) == 1
        and len(biases) in (0, len(group))
        and plain
        and all(_adjoin(each) or all(map(_owns_memory, each)) for each in (weights, biases))
    )


def _owns_memory(parameter: torch.Tensor) -> bool:
    return parameter.is_contiguous() and bool(parameter.untyped_storage().nbytes() == parameter.nbytes)


def _adjoin(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether each lies right behind the one before in the same memory, as after joining."""
    return all(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.data_ptr() + one.nbytes == other.data_ptr()
        and one.is_contiguous()
        and other.is_contiguous()
        for one, other in itertools.pairwise(parameters)
    )


def _joined(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """One tensor whose rows the parameters are, or become."""
    if _adjoin(parameters):
        rows = parameters[0].detach()
        return rows.as_strided((sum(map(len, parameters)), *rows.shape[1:]), rows.stride())
    joint = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, joint.split([len(each) for each in parameters]), strict=True):
        parameter.data = rows
    if joint.is_cuda:
        torch.cuda.empty_cache()  # what they leave is too small for the next joint matrix
    return joint


class _AllAsked(Exception):  # noqa: N818 - no error
    """Ends a module's pass once it has asked all its projections."""


def _asks_in_order(owner: nn.Module, group: Sequence[nn.Linear]) -> bool:
    """Whether a module, given a sample, asks its projections in this order about the same tensor before all else."""
    asked: list[tuple[nn.Linear, torch.Tensor]] = []

    def ask(module: nn.Linear, value: torch.Tensor) -> torch.Tensor:
        asked.append((module, value))
        if len(asked) == len(group):
            raise _AllAsked
        return functional.linear(value, module.weight, module.bias)

    weight = group[0].weight
    _, *others = inspect.signature(owner.forward).parameters.values()
    needed = {each.name: None for each in others if each.default is each.empty and each.kind != each.VAR_KEYWORD}
    for module in group:
        module.__dict__["forward"] = functools.partial(ask, module)
    try:
        with torch.no_grad():
            owner.forward(weight.new_zeros(1, 1, weight.shape[1]), **needed)
    except _AllAsked:
        return all(
            one is expected and value is asked[0][1] for (one, value), expected in zip(asked, group, strict=True)
        )
    except Exception:  # noqa: BLE001 - a module that needs other arguments first is left alone
        return False
    finally:
        for module in group:
            del module.__dict__["forward"]
    return False
