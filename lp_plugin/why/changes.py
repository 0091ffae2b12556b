"""Single changes that make an infeasible request feasible, each checked by solving again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from functools import partial

from lp_plugin.errors import HardwareError, LpPluginError
from lp_plugin.hardware import Cluster, Link
from lp_plugin.model import ModelProfile
from lp_plugin.model.layers import count_layers
from lp_plugin.quantity import format_bytes, format_seconds, parse_bytes, parse_seconds
from lp_plugin.why.feasible import Request, attainable, largest_integer
from lp_plugin.why.margins import grown
from lp_plugin.wiring import kinds_of

__all__ = ["Relaxation", "relaxations", "remedies", "smallest_layers", "tier_remedies"]

_OPTIONS = {
    "max_latency_seconds": "--max-latency",
    "min_tokens_per_second": "--min-tokens-per-second",
    "min_sequences": "--min-sequences",
    "max_memory_bytes": "--max-memory",
    "tier": "--tier",
}
"""Field of `Constraints` -> option of ``lp-plugin plan``."""

_MOST_LAYERS = 1_000
"""Of a chain that changes are sought for."""
_TRIED_IN_TURN = 8
"""More devices tried one by one, before their number is doubled: in training, more may be worse."""
_BITS = {"float8": 8, "int8": 8, "int4": 4}
"""Stored weights, in the order in which they are tried."""
_SECONDS = {"ns": -9, "us": -6, "ms": -3, "s": 0}
_BYTES = {"B": 0, "kB": 3, "MB": 6, "GB": 9, "TB": 12}
"""Units and their powers of ten."""
_Change = tuple[str, Request]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """How far one constraint would have to give for the others to be kept."""

    name: str
    """Field of `Constraints`."""
    value: float | None
    """The closest that can be had, unrounded; None if there is none, or for the tier."""
    remedy: str
    """The option with a value that can be had, or without it."""


def relaxations(request: Request) -> tuple[Relaxation, ...]:
    """The constraints that alone stand in the way."""
    names = [name for name in request.constraints.given if request.without(name).is_feasible]
    return tuple(_relaxation(request, name) for name in names)


def _relaxation(request: Request, name: str) -> Relaxation:
    value = None if name == "tier" else attainable(request, name)
    remedy = _slower_tier(request) if name == "tier" else None
    if value is not None:
        remedy = _relaxed(request, name, value)
    return Relaxation(name=name, value=value, remedy=remedy or f"without {_OPTIONS[name]}")


def remedies(request: Request) -> tuple[str, ...]:
    """Single changes to the request that make it feasible, the least intrusive first.

    None for chains so long that each of the hundreds of trials would take a second.
    """
    if request.profile.num_layers > _MOST_LAYERS:
        return ()
    searches = (_micro_batch, _training, _last_device, _granularity, _devices, _weights, _dtype, _batch, _sequence)
    return tuple(text for search in searches for text, _ in search(request))


def tier_remedies(request: Request) -> tuple[str, ...]:
    """As `remedies`; if no single change helps, the first of finer cuts and stored weights, with more devices."""
    single = remedies(request)
    if single:
        return single
    for text, changed in _smaller_layers(request):
        if changed.is_feasible:
            return (text,)
        for devices, _ in _devices(changed):
            return (f"{text} and {devices}",)
    return ()


def smallest_layers(request: Request) -> _Change:
    """The finest cut with the fewest bits per weight, and its options; no text if there is neither."""
    return [("", request), *_smaller_layers(request)][-1]


def _smaller_layers(request: Request) -> Iterator[_Change]:
    """Stored weights, finer cuts, and both."""
    yield from _stored(request)
    for cut, finer in _finer(request):
        yield cut, finer
        for weights, changed in _stored(finer):
            yield f"{cut} and {weights}", changed


def _slower_tier(request: Request) -> str | None:
    asked = request.constraints.tier or ""
    names = [tier.name for tier in request.cluster.devices[0].tiers]
    slower = names[names.index(asked) + 1 : -1]
    return next((f"--tier {tier} instead of {asked}" for tier in slower if _holds(request, "tier", tier)), None)


def _relaxed(request: Request, name: str, value: float) -> str | None:
    """The option with the value, rounded so that it can be typed and still be had."""
    option, asked = _OPTIONS[name], getattr(request.constraints, name)
    if name == "min_sequences":
        return f"{option} {value:.0f} instead of {asked}"
    for rounding in (ROUND_HALF_EVEN, ROUND_FLOOR if name == "min_tokens_per_second" else ROUND_CEILING):
        rounded = Context(prec=3, rounding=rounding).create_decimal(Decimal(value))
        if name == "min_tokens_per_second":
            text, old, bound = f"{rounded:f}", f"{asked:.0f}" if asked >= 100 else f"{asked:g}", float(rounded)
        elif name == "max_latency_seconds":
            text, old = f'"{_in_units(rounded, _SECONDS)}"', f'"{format_seconds(asked)}"'
            bound = parse_seconds(text.strip('"'))
        else:
            text, old = f'"{_in_units(rounded, _BYTES)}"', f'"{format_bytes(asked)}"'
            bound = parse_bytes(text.strip('"'))
        if bound > 0 and _holds(request, name, bound):
            return f"{option} {text} instead of {old}"
    return None


def _holds(request: Request, name: str, value: float | str) -> bool:
    return request.bound_to(name, value).is_feasible


def _in_units(value: Decimal, units: dict[str, int]) -> str:
    """The value in the largest unit that it reaches, as `lp_plugin.quantity` reads it."""
    unit = next((unit for unit in reversed(units) if value >= Decimal(1).scaleb(units[unit])), next(iter(units)))
    return f"{value.scaleb(-units[unit]):f} {unit}"


def _micro_batch(request: Request) -> Iterator[_Change]:
    workload = request.workload
    if workload.micro_batch is None:
        return

    def changed(size: int) -> Request:
        return dataclasses.replace(request, workload=workload.with_micro_batch(size))

    top = workload.micro_batch - 1
    while top >= 1:
        lowest = _same_in_flight(request, top)
        size = largest_integer(lowest, top, lambda value: changed(value).is_feasible)
        if size is not None:
            yield f"--micro-batch {size} instead of {workload.micro_batch}", changed(size)
            return
        top = lowest - 1


def _same_in_flight(request: Request, size: int) -> int:
    """Smallest micro-batch with as many in flight: down to there, less is easier.

    In training, smaller micro-batches can mean more that wait for their backward pass, and so more memory.
    """
    workload, stages = request.workload, len(request.cluster.devices)
    count = -(-workload.batch // size)
    if workload.phase != "train" or count >= stages:
        return 1
    return -(-workload.batch // count)


def _training(request: Request) -> Iterator[_Change]:
    workload = request.workload
    if workload.phase != "train":
        return
    changes = []
    if not workload.checkpointing:
        changes.append(("--checkpointing", dataclasses.replace(workload, checkpointing=True)))
    if not workload.zero_stage:  # helps replicas alone
        changes.append(("--zero-stage 1 instead of 0", dataclasses.replace(workload, zero_stage=1)))
    yield from _fitting((text, dataclasses.replace(request, workload=changed)) for text, changed in changes)


def _last_device(request: Request) -> Iterator[_Change]:
    """Another device last, where the head is."""
    cluster = request.cluster
    others = {device: position for position, device in enumerate(cluster.devices) if device != cluster.devices[-1]}
    if cluster.group_size > 1 or not others:
        return
    try:
        kinds = kinds_of(cluster)
    except HardwareError:  # its links are of these places, not of these devices
        return
    for device, position in others.items():
        order = (*kinds.order[:position], *kinds.order[position + 1 :], kinds.order[position])
        moved = dataclasses.replace(request, cluster=kinds.arranged(cluster, order))
        if moved.is_feasible:
            yield f"device {position} ({device.name}) last instead of {cluster.devices[-1].name}", moved
            return


def _granularity(request: Request) -> Iterator[_Change]:
    yield from _fitting(_finer(request))


def _finer(request: Request) -> Iterator[_Change]:
    """With blocks cut into attention and MLP."""
    profile = request.profile
    if profile.architecture is None or profile.granularity == "sublayer" or _is_measured(profile):
        return
    layers = count_layers(profile.architecture, granularity="sublayer", tensor_parallel=profile.tensor_parallel)
    if len(layers) > profile.num_layers:
        cut = dataclasses.replace(profile, layers=layers, granularity="sublayer")
        yield "--granularity sublayer instead of layer", dataclasses.replace(request, profile=cut)


def _weights(request: Request) -> Iterator[_Change]:
    yield from next(([change] for change in _fitting(_stored(request))), [])


def _stored(request: Request) -> Iterator[_Change]:
    """With weights stored in fewer bits; not for training, which needs them whole."""
    profile = request.profile
    now = profile.weight_dtype
    if request.workload.phase == "train":
        return
    for name, bits in _BITS.items():
        if now is None or bits < _BITS.get(now, 0):
            text = f"--weights {name} instead of {now or profile.dtype}"
            yield from _converted(request, text, partial(profile.stored_as, name))


def _dtype(request: Request) -> Iterator[_Change]:
    profile = request.profile
    if profile.dtype == "float32":
        text = "--dtype bfloat16 instead of float32"
        yield from _fitting(_converted(request, text, partial(profile.in_dtype, "bfloat16")))


def _converted(request: Request, text: str, convert: Callable[[], ModelProfile]) -> Iterator[_Change]:
    """The request with another precision, if the model can be had in it and every device computes in it."""
    if request.profile.architecture is None or _is_measured(request.profile):
        return
    try:
        changed = dataclasses.replace(request, profile=convert())
        for device in request.cluster.devices:
            device.flops(changed.profile.dtype)
    except LpPluginError:
        return
    yield text, changed


def _is_measured(profile: ModelProfile) -> bool:
    return any(layer.seconds is not None for layer in profile.layers)


def _devices(request: Request) -> Iterator[_Change]:
    """Fewest devices that fit, more of the last kind added."""
    count, most, size = len(request.cluster.devices), request.profile.num_layers, request.cluster.group_size

    def changed(stages: int) -> Request | None:
        cluster = _larger(request, stages)
        return None if cluster is None else dataclasses.replace(request, cluster=cluster)

    def feasible(stages: int) -> bool:
        larger = changed(stages)
        return larger is not None and larger.is_feasible

    most_added = most - count
    in_turn = range(1, min(_TRIED_IN_TURN, most_added) + 1)
    doubled = [
        _TRIED_IN_TURN << step for step in range(1, most_added.bit_length()) if _TRIED_IN_TURN << step < most_added
    ]
    steps = [*in_turn, *doubled, most_added] if most_added > _TRIED_IN_TURN else [*in_turn]
    enough = next((position for position, added in enumerate(steps) if feasible(count + added)), None)
    if enough is None:
        return
    known, over = steps[enough], steps[enough - 1] if enough else 0
    saved = largest_integer(0, known - over - 1, lambda less: less == 0 or feasible(count + known - less)) or 0
    fewest = count + known - saved
    larger = changed(fewest)
    if larger is not None:
        yield f"{fewest * size} devices instead of {count * size}", larger


def _larger(request: Request, stages: int) -> Cluster | None:
    """The cluster with more devices; without limits on seconds any link will do where none is known."""
    larger = grown(request.cluster, stages)
    bounds = request.constraints
    if larger is not None or bounds.max_latency_seconds or bounds.min_tokens_per_second:
        return larger
    any_link = Link(name="any", bandwidth_bytes_per_second=1.0, latency_seconds=0.0)
    cluster = request.cluster
    return dataclasses.replace(
        cluster,
        devices=cluster.devices * stages,
        links=(any_link,) * (stages - 1),
        group_links=cluster.group_links * stages,
    )


def _batch(request: Request) -> Iterator[_Change]:
    workload = request.workload
    if workload.phase != "decode":  # elsewhere only the micro-batch takes memory
        return

    def changed(batch: int) -> Request:
        return dataclasses.replace(request, workload=dataclasses.replace(workload, batch=batch))

    lowest = workload.micro_batch or 1
    batch = largest_integer(lowest, workload.batch - 1, lambda value: changed(value).is_feasible)
    if batch is not None:
        yield f"--batch {batch} instead of {workload.batch}", changed(batch)


def _sequence(request: Request) -> Iterator[_Change]:
    workload = request.workload

    def changed(sequence: int) -> Request:
        return dataclasses.replace(request, workload=dataclasses.replace(workload, sequence=sequence))

    sequence = largest_integer(1, workload.sequence - 1, lambda value: changed(value).is_feasible)
    if sequence is not None:
        yield f"--sequence {sequence} instead of {workload.sequence}", changed(sequence)


def _fitting(changes: Iterator[_Change]) -> Iterator[_Change]:
    for text, changed in changes:
        if changed.is_feasible:
            yield text, changed
