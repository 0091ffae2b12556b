"""Devices, their memory tiers and the links between them; a catalogue of them; the user's cluster files."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lp_plugin.errors import HardwareError
from lp_plugin.quantity import parse_bytes, parse_flops, parse_rate, parse_seconds

__all__ = ["Cluster", "Device", "Link", "MemoryTier", "catalogue", "load_device", "load_link"]

_MAX_DEVICES = 65_536  # more is a slip of the keyboard


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTier:
    """One level of a device's memory hierarchy."""

    name: str
    """What it is called, such as "l2" or "hbm"."""

    capacity_bytes: int
    """Bytes in all, from the datasheet."""

    bandwidth_bytes_per_second: float
    """Nominal bytes per second, reads and writes together, from the datasheet or a microbenchmark."""

    usable_fraction: float = 1.0
    """Part of the capacity that a stage can count on, over 0 and at most 1; measured."""

    bandwidth_efficiency: float = 1.0
    """Achieved over nominal bandwidth, over 0 and at most 1; measured."""

    def __post_init__(self) -> None:
        _check(self, "capacity_bytes", "bandwidth_bytes_per_second", "usable_fraction", "bandwidth_efficiency")

    @property
    def usable_bytes(self) -> int:
        """Whole bytes a stage can count on: ``capacity_bytes * usable_fraction``."""
        return math.floor(self.capacity_bytes * self.usable_fraction)

    @property
    def achieved_bytes_per_second(self) -> float:
        """Bytes per second in practice: ``bandwidth_bytes_per_second * bandwidth_efficiency``."""
        return self.bandwidth_bytes_per_second * self.bandwidth_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one process of a CPU: what a stage runs on."""

    name: str
    """The catalogue's name, or the user's."""

    tiers: tuple[MemoryTier, ...]
    """From the smallest and fastest to the one that holds the weights."""

    peak_flops: tuple[tuple[str, float], ...]
    """Pairs of dtype and its dense peak in operations per second, from the datasheet."""

    compute_efficiency: float
    """Achieved over peak operations per second in a large layer, over 0 and at most 1; measured."""

    layer_overhead_seconds: float
    """Least seconds of an eagerly launched transformer layer, however small (launch overhead); measured."""

    def __post_init__(self) -> None:
        capacities = [tier.capacity_bytes for tier in self.tiers]
        if not capacities or sorted(set(capacities)) != capacities:
            bound = "at least one, from small to large"
            raise HardwareError(f"Device {self.name!r}: its tiers have {capacities} bytes; give {bound}.")
        for fast, slow in pairwise(self.tiers):
            slower = slow.achieved_bytes_per_second <= fast.achieved_bytes_per_second
            if not slower or slow.usable_bytes < fast.usable_bytes:
                bound = "the next tier must be no faster and hold no less"
                raise HardwareError(f"Device {self.name!r}: tiers {fast.name!r} and {slow.name!r}: {bound}.")
        peaks = dict(self.peak_flops)
        sound = all(0 < peak < math.inf for peak in peaks.values())
        if not sound or not peaks or len(peaks) != len(self.peak_flops):
            bound = "at least one dtype, each once, with a peak over 0 and finite"
            raise HardwareError(f"Device {self.name!r}: peak_flops is {self.peak_flops!r}; give {bound}.")
        _check(self, "compute_efficiency", "layer_overhead_seconds")

    @property
    def memory(self) -> MemoryTier:
        """The tier that holds the weights: the last one."""
        return self.tiers[-1]

    def flops(self, dtype: str) -> float:
        """Operations per second in practice, peak * efficiency; an unknown dtype raises HardwareError."""
        peaks = dict(self.peak_flops)
        if dtype not in peaks:
            raise HardwareError(f"{self.name} has no peak for dtype {dtype!r}; known: {', '.join(peaks)}.")
        return peaks[dtype] * self.compute_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins two neighbouring devices; the same in both directions."""

    name: str
    """What it is called, such as "NVLink 4"."""

    bandwidth_bytes_per_second: float
    """Nominal bytes per second in one direction, from the datasheet."""

    latency_seconds: float
    """Seconds a small tensor takes from one process to the other; measured."""

    bandwidth_efficiency: float = 1.0
    """Achieved over nominal bandwidth of large tensors, over 0 and at most 1; measured."""

    def __post_init__(self) -> None:
        _check(self, "bandwidth_bytes_per_second", "latency_seconds", "bandwidth_efficiency")

    def seconds(self, num_bytes: float) -> float:
        """Seconds to send ``num_bytes``: latency plus bytes over the achieved bandwidth."""
        return self.latency_seconds + num_bytes / (self.bandwidth_bytes_per_second * self.bandwidth_efficiency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A chain of devices, in the order of the pipeline.

    Example:
        >>> Cluster.parse("h100-sxm:16").subset(8).devices[7].name
        'h100-sxm'
    """

    devices: tuple[Device, ...]
    """One device per rank, in pipeline order."""

    links: tuple[Link, ...]
    """``links[i]`` joins ``devices[i]`` and ``devices[i + 1]``."""

    def __post_init__(self) -> None:
        if len(self.links) != len(self.devices) - 1:
            raise HardwareError(
                f"the cluster has {len(self.devices)} devices and {len(self.links)} links; "
                "give at least one device, and one link between each two neighbours."
            )

    @classmethod
    def homogeneous(cls, device: str | Device, count: int, link: Link | None = None) -> Cluster:
        """``count`` equal devices joined by equal links.

        Args:
            device: A device, or a name from the catalogue.
            count: How many.
            link: What joins neighbours; None takes the catalogue's link of the device's name.

        Raises:
            HardwareError: If the name is unknown, or the count is not 1 to 65,536.
        """
        _check_count("the cluster", count)
        chosen = load_device(device) if isinstance(device, str) else device
        if link is None and count > 1:
            link = load_link(chosen.name)
        return cls(devices=(chosen,) * count, links=() if link is None else (link,) * (count - 1))

    @classmethod
    def parse(cls, spec: str) -> Cluster:
        """The cluster written on the command line: "h100-sxm:16", or a path ending in .toml.

        Raises:
            HardwareError: If the text has neither form, the name is unknown, or the file is wrong.
        """
        if spec.endswith(".toml"):
            return cls.from_toml(spec)
        name, _, count = spec.partition(":")
        if not (count.isascii() and count.isdecimal() and len(count) < 10):
            forms = 'a device and how many, as in "h100-sxm:16", or the path of a .toml file'
            raise HardwareError(f"cluster {spec!r} is not understood; write {forms}.")
        return cls.homogeneous(name, int(count))

    @classmethod
    def from_toml(cls, path: str | Path) -> Cluster:
        """The cluster that a TOML file describes: ``[[device]]``, ``[link]`` and ``[[link_between]]``.

        Neighbours that neither ``[link]`` nor ``[[link_between]]`` covers use the catalogue's link of their
        type, and of unequal types the one that takes longer for 1 MiB.

        Raises:
            HardwareError: If the file can't be read, or a value is missing, unknown or out of bounds.
        """
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            return _build_cluster(_validated(_ClusterFile, tables))
        except HardwareError as error:
            raise HardwareError(f"cluster file {path}: {error}") from error
        except (OSError, ValueError) as error:  # no such file, no UTF-8, no TOML
            raise HardwareError(f"cluster file {path} can't be read: {error}.") from error

    @property
    def digest(self) -> str:
        """SHA-256 of all fields, in hexadecimal; 1 and 1.0 count as equal."""
        fields = json.loads(json.dumps(dataclasses.asdict(self)), parse_int=float)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def subset(self, num_devices: int) -> Cluster:
        """The first ``num_devices`` devices and the links between them; too many raise HardwareError."""
        if not 1 <= num_devices <= len(self.devices):
            raise HardwareError(f"{num_devices} devices were asked for; ask for 1 to {len(self.devices)}.")
        return Cluster(devices=self.devices[:num_devices], links=self.links[: num_devices - 1])


def catalogue() -> tuple[str, ...]:
    """The names of the devices that come with the package, sorted."""
    files = (resources.files("lp_plugin") / "hardware").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_device(name: str) -> Device:
    """The catalogue's device of that name; an unknown name raises HardwareError."""
    return _catalogue_file(name).build()


def load_link(name: str) -> Link:
    """The link between neighbours of that name in the catalogue; an unknown name raises HardwareError."""
    return _catalogue_file(name).link.build()


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

    def build(self) -> Link:
        return Link(**self.model_dump(exclude={"first"}))


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
    link: _LinkTable


class _OwnEntry(_DeviceTable):
    count: int


class _CatalogueEntry(_Table):
    type: str
    count: int


class _ClusterFile(_Table):
    device: list[dict[str, Any]]
    link: _LinkTable | None = None
    link_between: list[_LinkBetweenTable] = []


_INNER: dict[str, type[_Table]] = {"tier": _TierTable, "link": _LinkTable, "link_between": _LinkBetweenTable}
_TableT = TypeVar("_TableT", bound=_Table)


def _validated(model: type[_TableT], tables: object, prefix: str = "") -> _TableT:
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        problems = [_problem(model, prefix, dict(details)) for details in error.errors()]
        raise HardwareError("; ".join(problems) + ".") from error


def _problem(model: type[_Table], prefix: str, details: dict[str, Any]) -> str:
    """One of pydantic's problems in a line: the key's path, the value, what is allowed."""
    path = prefix
    for part in details["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if part != "[key]" else ""
    path = path.removeprefix(".")
    if details["type"] == "missing":
        return f"{path} is missing; add it"
    if details["type"] == "extra_forbidden":
        parents = [_INNER[part] for part in details["loc"][:-1] if part in _INNER]
        fields = (parents[-1] if parents else model).model_fields
        allowed = ", ".join(field.alias or name for name, field in fields.items())
        return f"{path} is not a known key; allowed here: {allowed}"
    message = details["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{path} is {details['input']!r}: {message}"


def _catalogue_file(name: str) -> _CatalogueFile:
    names = catalogue()
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise HardwareError(f"device {name!r} is not in the catalogue; {hint}known: {', '.join(names)}.")
    file = resources.files("lp_plugin") / "hardware" / f"{name}.toml"
    return _validated(_CatalogueFile, tomllib.loads(file.read_text(encoding="utf-8")))


def _device_entry(table: dict[str, Any], where: str) -> tuple[int, Device, Link | None]:
    if "type" in table:
        entry = _validated(_CatalogueEntry, table, where)
        return entry.count, load_device(entry.type), load_link(entry.type)
    own = _validated(_OwnEntry, table, where)
    return own.count, own.build(), None


def _build_cluster(tables: _ClusterFile) -> Cluster:
    devices: list[Device] = []
    own_links: list[Link | None] = []
    for position, table in enumerate(tables.device):
        count, device, link = _device_entry(table, f"device[{position}]")
        _check_count(f"device[{position}]", count)
        devices += [device] * count
        own_links += [link] * count
    between: dict[int, Link] = {}
    for position, exception in enumerate(tables.link_between):
        first = exception.first
        if not 0 <= first < len(devices) - 1 or first in between:
            bound = f"0 to {len(devices) - 2}, each at most once"
            raise HardwareError(f"link_between[{position}].first is {first}; it must be {bound}.")
        between[first] = exception.build()
    default = tables.link.build() if tables.link else None
    links = (between.get(i) or default or _slower_link(i, *pair) for i, pair in enumerate(pairwise(own_links)))
    return Cluster(devices=tuple(devices), links=tuple(links))


def _slower_link(first: int, left: Link | None, right: Link | None) -> Link:
    if left is None or right is None:
        remedy = f"add [link], or [[link_between]] with first = {first}"
        raise HardwareError(f"no link is known between devices {first} and {first + 1}; {remedy}.")
    return max(left, right, key=lambda link: link.seconds(2**20))


def _check_count(where: str, count: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MAX_DEVICES:
        raise HardwareError(f"{where}: count is {count!r}; it must be a whole number, 1 to {_MAX_DEVICES}.")


def _check(item: Device | MemoryTier | Link, *fields: str) -> None:
    """Fractions and efficiencies are over 0 and at most 1, seconds at least 0, all other fields over 0."""
    for field in fields:
        value = getattr(item, field)
        holds, bound = 0 < value < math.inf, "over 0 and finite"
        if field.endswith(("_fraction", "_efficiency")):
            holds, bound = 0 < value <= 1, "over 0 and at most 1"
        elif field.endswith("_seconds"):
            holds, bound = 0 <= value < math.inf, "at least 0 and finite"
        if not holds:
            where = f"{type(item).__name__} {item.name!r}: {field}"
            raise HardwareError(f"{where} is {value!r}; it must be {bound}.")
