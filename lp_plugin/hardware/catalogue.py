"""Reading of TOML: the catalogue of devices that comes with the package, and the user's cluster files."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lp_plugin.errors import HardwareError
from lp_plugin.files import read_text
from lp_plugin.hardware.device import Device, Link, MemoryTier, check_count, slower_link
from lp_plugin.problems import problems_of, suggestion
from lp_plugin.quantity import parse_bytes, parse_flops, parse_rate, parse_seconds, shown

__all__ = ["catalogue", "load_device", "load_link", "load_network", "load_node_size", "read_chain"]

_MAX_FILE_BYTES = 2**17  # thousands of tables; keeps the slowest file under a second
_MAX_DOTS = 32  # tomllib takes time and memory that grow with the square of the parts of a dotted key


def catalogue() -> tuple[str, ...]:
    """The names of the devices that come with the package, sorted."""
    files = (resources.files("lp_plugin") / "hardware").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_device(name: str) -> Device:
    """The catalogue's device of that name; an unknown name raises HardwareError."""
    return _catalogue_file(name).build()


def load_link(name: str) -> Link:
    """The link between devices of that name in one node; an unknown name raises HardwareError."""
    return _catalogue_file(name).link.build()


def load_network(name: str) -> Link:
    """The link between devices of that name in different nodes; an unknown name raises HardwareError."""
    return _catalogue_file(name).network.build()


def load_node_size(name: str) -> int | None:
    """Devices of that name in one node, None for any number; an unknown name raises HardwareError."""
    return _catalogue_file(name).devices_per_node


def read_chain(path: str | Path) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
    """The devices of the cluster that a TOML file describes, and the links between; see docs/clusters.md.

    Raises:
        HardwareError: If the file can't be read, or a value is missing, unknown or out of bounds.
    """
    try:
        return _build_chain(_validated(_ClusterFile, _read_tables(Path(path))))
    except HardwareError as error:
        raise HardwareError(f"cluster file {path}: {error}") from error
    except RecursionError as error:
        raise HardwareError(f"cluster file {path} can't be read: its values are nested too deeply.") from error
    except (OSError, ValueError) as error:  # no such file, no UTF-8, no TOML
        raise HardwareError(f"cluster file {path} can't be read: {error}.") from error


_Bytes = Annotated[int, BeforeValidator(parse_bytes)]
_Rate = Annotated[float, BeforeValidator(parse_rate)]
_Seconds = Annotated[float, BeforeValidator(parse_seconds)]
_Flops = Annotated[float, BeforeValidator(parse_flops)]
_Dtype = Literal["float32", "tf32", "float16", "bfloat16", "float8", "int8"]


class _Table(BaseModel):
    """A table of a TOML file: the form is checked here, the bounds by the dataclass it becomes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _TierTable(_Table):
    name: str
    capacity_bytes: _Bytes = Field(alias="capacity")
    bandwidth_bytes_per_second: _Rate = Field(alias="bandwidth")
    usable_fraction: float = 1.0
    bandwidth_efficiency: float = 1.0


class _LinkTable(_Table):
    name: str = "link"
    bandwidth_bytes_per_second: _Rate = Field(alias="bandwidth")
    latency_seconds: _Seconds = Field(alias="latency")
    bandwidth_efficiency: float = 1.0
    collective_efficiency: float | None = None  # None: as `Link` has it

    def build(self) -> Link:
        return Link(**self.model_dump(exclude={"first"}, exclude_none=True))


class _NetworkTable(_LinkTable):
    name: str = "network"


class _LinkBetweenTable(_LinkTable):
    first: int


class _DeviceTable(_Table):
    name: str
    compute_efficiency: float
    layer_overhead: _Seconds
    tier: list[_TierTable]
    flops: dict[_Dtype, _Flops]

    def build(self) -> Device:
        return Device(
            name=self.name,
            tiers=tuple(MemoryTier(**tier.model_dump()) for tier in self.tier),
            peak_flops=tuple(sorted(self.flops.items())),
            compute_efficiency=self.compute_efficiency,
            layer_overhead_seconds=self.layer_overhead,
        )


class _CatalogueFile(_DeviceTable):
    devices_per_node: int | None = None
    link: _LinkTable
    network: _NetworkTable


class _OwnEntry(_DeviceTable):
    count: int


class _CatalogueEntry(_Table):
    type: str
    count: int
    layer_overhead: _Seconds | None = None


class _ClusterFile(_Table):
    device: list[dict[str, Any]]
    devices_per_node: int | None = None
    link: _LinkTable | None = None
    network: _NetworkTable | None = None
    link_between: list[_LinkBetweenTable] = []


_INNER: dict[str, type[_Table]] = {
    "tier": _TierTable,
    "link": _LinkTable,
    "network": _NetworkTable,
    "link_between": _LinkBetweenTable,
}
_TableT = TypeVar("_TableT", bound=_Table)


def _read_tables(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_FILE_BYTES, "join equal neighbours by their count")
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > _MAX_DOTS and not line.lstrip().startswith("#"):
            raise HardwareError(f"line {number} has {line.count('.')} dots; write at most {_MAX_DOTS} in a line.")
    return tomllib.loads(text)


def _validated(model: type[_TableT], tables: object, prefix: str = "") -> _TableT:
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise HardwareError(f"{problems_of(error, functools.partial(_allowed, model), prefix)}.") from error


def _allowed(model: type[_Table], place: tuple[int | str, ...]) -> list[str]:
    """Keys of the innermost table of a place."""
    parents = [_INNER[part] for part in place[:-1] if isinstance(part, str) and part in _INNER]
    fields = (parents[-1] if parents else model).model_fields
    return [field.alias or name for name, field in fields.items()]


@functools.cache
def _catalogue_file(name: str) -> _CatalogueFile:
    names = catalogue()
    if name not in names:
        hint = f"{suggestion(name, names)}known: {', '.join(names)}"
        raise HardwareError(f"device {shown(name)} is not in the catalogue; {hint}.")
    file = resources.files("lp_plugin") / "hardware" / f"{name}.toml"
    return _validated(_CatalogueFile, tomllib.loads(file.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One ``[[device]]`` table; what the catalogue says of its wiring is None for a device of the user's own."""

    count: int
    device: Device
    link: Link | None = None
    network: Link | None = None
    node_size: int | None = None


def _entry(table: dict[str, Any], where: str) -> _Entry:
    own_keys = _OwnEntry.model_fields.keys() - _CatalogueEntry.model_fields.keys()
    if "type" not in table and own_keys & table.keys():
        own = _validated(_OwnEntry, table, where)
        check_count(f"{where}.count", own.count)
        with _located(where):
            return _Entry(count=own.count, device=own.build())
    known = _validated(_CatalogueEntry, table, where)
    check_count(f"{where}.count", known.count)
    with _located(f"{where}.type"):
        device = load_device(known.type)
    if known.layer_overhead is not None:
        with _located(where):
            device = dataclasses.replace(device, layer_overhead_seconds=known.layer_overhead)
    return _Entry(
        count=known.count,
        device=device,
        link=load_link(known.type),
        network=load_network(known.type),
        node_size=load_node_size(known.type),
    )


def _build_chain(file: _ClusterFile) -> tuple[tuple[Device, ...], tuple[Link, ...]]:
    chain: list[_Entry] = []  # an entry for each device
    for position, table in enumerate(file.device):
        entry = _entry(table, f"device[{position}]")
        check_count("the number of devices", len(chain) + entry.count)
        chain += [entry] * entry.count
    if not chain:
        raise HardwareError("device is an empty list; give at least one [[device]].")
    if file.devices_per_node is not None:
        check_count("devices_per_node", file.devices_per_node)
    between: dict[int, Link] = {}
    for position, exception in enumerate(file.link_between):
        first, where = exception.first, f"link_between[{position}]"
        if not 0 <= first < len(chain) - 1 or first in between:
            bound = f"0 to {len(chain) - 2}, each at most once"
            raise HardwareError(f"{where}.first is {shown(first)}; it must be {bound}.")
        with _located(where):
            between[first] = exception.build()
    return tuple(entry.device for entry in chain), tuple(_links(file, chain, between))


def _links(file: _ClusterFile, chain: list[_Entry], between: dict[int, Link]) -> Iterator[Link]:
    """The link of each two neighbours: their own, the file's, or the slower one of their types."""
    with _located("link"):
        link = file.link.build() if file.link else None
    with _located("network"):
        network = file.network.build() if file.network else None
    for first, crosses in enumerate(_crossings(file, chain)):
        left, right = chain[first], chain[first + 1]
        if first in between:
            yield between[first]
        elif crosses:
            yield network or _slower("network", first, left.network, right.network)
        else:
            yield link or _slower("link", first, left.link, right.link)


def _crossings(file: _ClusterFile, chain: list[_Entry]) -> Iterator[bool]:
    """Whether two neighbours are in different nodes, for each two."""
    size = file.devices_per_node
    if size is None and file.link and not file.network:
        size = len(chain)
    filled = 0
    for left, right in pairwise(chain):
        filled += 1
        by_type = filled == left.node_size or left.device != right.device
        crosses = by_type if size is None else filled == size
        filled = 0 if crosses else filled
        yield crosses


def _slower(what: str, first: int, left: Link | None, right: Link | None) -> Link:
    if left is None or right is None:
        remedy = f"add [{what}], or [[link_between]] with first = {first}"
        raise HardwareError(f"no {what} is known between devices {first} and {first + 1}; {remedy}.")
    return slower_link(left, right)


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except HardwareError as error:
        raise HardwareError(f"{where}: {error}") from error
