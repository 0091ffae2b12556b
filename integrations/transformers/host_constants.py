"""Constants that a model's code makes on the host and copies to the device, made on the device instead.

Such a copy waits for the device, and a CUDA graph can't hold it. In the decoders that run here there are two kinds:
falcon picks its key and value heads with a list of one index, and the masks of bloom are made with a scalar tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["NoHostConstants"]


class NoHostConstants(TorchFunctionMode):
    """Inside, an index ``[i]`` in a tuple of indices is the slice that picks the same, and scalars are filled in."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(_sliced(index) for index in args[1]))
        elif func is torch.tensor and isinstance(args[0], float):
            return torch.full((), args[0], **kwargs)
        return func(*args, **kwargs)


def _sliced(index: Any) -> Any:
    if isinstance(index, list) and len(index) == 1 and isinstance(index[0], int):
        return slice(index[0], index[0] + 1 or None)
    return index
