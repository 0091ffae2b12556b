"""accelerate and transformers' ``from_pretrained(..., device_map=...)``: a JSON object, module name -> device.

Stage ``i`` is device ``i``. Cuts are between whole layers; embedding, norm and head can each be alone. A head that is
tied to the embedding has a table of its own wherever the two are on different devices; accelerate's automatic maps put
it back on the embedding's device instead, which is no pipeline and is refused here. accelerate runs one device after
another: such a map saves memory, not time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import NamedLayer, PartitionFormat, read_json, shown
from lp_plugin.integrations.module_names import boundaries_from_places, check_names, module_names, units_of

__all__ = ["FORMAT"]

_EXPECTED = 'a device_map as JSON, e.g. {"model.embed_tokens": 0, "model.layers.0": 0, ...}'
_DEVICE = re.compile(r"[a-z]+(:[0-9]{1,4})?", re.ASCII)


def _write(layers: Sequence[NamedLayer], boundaries: Sequence[int], model_type: str | None) -> str:
    stage = 0
    device_map: dict[str, int] = {}
    for unit in units_of(layers, model_type):
        stage += unit.start == boundaries[stage + 1]
        device_map |= dict.fromkeys(unit.modules, stage)
    device_map |= dict.fromkeys(module_names(model_type).weightless, 0)
    return json.dumps(device_map)


def _read(text: str, layers: Sequence[NamedLayer], model_type: str | None) -> tuple[int, ...]:
    device_map = read_json(text, _EXPECTED)
    if not isinstance(device_map, dict):
        raise PartitionFormatError(f"{shown(device_map)} is a JSON {type(device_map).__name__}; give {_EXPECTED}.")
    places = {name: _device(device, name) for name, device in device_map.items()}
    boundaries, _ = boundaries_from_places(places, layers, model_type)
    return boundaries


def _device(device: object, name: str) -> int | str:
    """A device, GPUs as their number."""
    if type(device) is int and device >= 0:
        return device
    if isinstance(device, str) and _DEVICE.fullmatch(device) and device != "disk":
        kind, _, number = device.partition(":")
        return int(number) if kind == "cuda" and number else device
    hint = "; weights on disk are offloaded, which is no stage" if device == "disk" else ""
    raise PartitionFormatError(
        f"{shown(name)} is on {shown(device)}{hint}; give a number from 0 or a device such as 'cuda:0' or 'cpu'."
    )


FORMAT = PartitionFormat(name="accelerate", cuts="whole layers", check=check_names, write=_write, read=_read)
"""A device_map with module names of the model's family."""
