"""What if: plans over a grid of devices, contexts, batches and precisions; a row for each, also where nothing fits."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from lp_plugin.errors import HardwareError, InvalidInputError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints, Objective
from lp_plugin.plan import Plan
from lp_plugin.planner import best_plan, check_request
from lp_plugin.quantity import format_bytes, shown
from lp_plugin.solver.solve import emptiest, fits
from lp_plugin.why.feasible import Request
from lp_plugin.workload import Phase, Workload, micro_batch_candidates

__all__ = ["MOST_POINTS", "Grid", "Point", "parse_clusters", "parse_names", "parse_numbers", "sweep"]

MOST_POINTS = 10_000
"""Of one sweep; with 1 to 20 ms a point, some minutes."""
_LARGEST = 10**9  # as of every number of a `Workload`
_Item = TypeVar("_Item", int, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is varied; every value is combined with all values of the others."""

    clusters: Mapping[str, Cluster]
    """Name for tables, such as "h100-sxm:8" -> devices, of which all are used."""
    batches: tuple[int, ...]
    """Sequences in the whole batch."""
    sequences: tuple[int, ...]
    """Tokens of a sequence; when decoding, of its context."""
    dtypes: tuple[str | None, ...] = (None,)
    """Precisions; None for the model's own."""
    weight_dtypes: tuple[str | None, ...] = (None,)
    """How matrices are stored; None for as the model says."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not values or len(set(values)) < len(values):
                raise WorkloadError(f"{field.name} of a sweep are {shown([*values])}; give at least one, each once.")
        if self.num_points > MOST_POINTS:
            raise WorkloadError(
                f"the sweep has {self.num_points:,} points: {len(self.clusters)} clusters x {len(self.batches)} "
                f"batches x {len(self.sequences)} sequences x {len(self.dtypes)} dtypes x {len(self.weight_dtypes)} "
                f"weights; at most {MOST_POINTS:,} are planned. Vary less at once."
            )

    @property
    def num_points(self) -> int:
        """Points of the grid."""
        precisions = len(self.dtypes) * len(self.weight_dtypes)
        return len(self.clusters) * len(self.batches) * len(self.sequences) * precisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one combination gives. Without a plan all figures are None."""

    model: str
    """The profile's name."""
    phase: Phase
    """Of the workload."""
    objective: Objective
    """What was optimised."""
    constraints: str
    """What the plan had to keep to, in words; empty without constraints."""
    cluster: str
    """Its name in the grid."""
    device: str
    """Names of its devices, joined by " + "."""
    num_devices: int
    """In the cluster; with tensor parallelism more than stages."""
    num_stages: int
    """One for each device or group."""
    dtype: str
    """Precision."""
    weight_dtype: str
    """How matrices are stored."""
    batch: int
    """Sequences in the whole batch."""
    sequence: int
    """Tokens of a sequence; when decoding, of its context."""
    outcome: Literal["planned", "does not fit", "makes no sense"]
    """Whether there is a plan; if not, whether memory and constraints forbid it or the request itself is wrong."""
    micro_batch: int | None = None
    """Sequences of a micro-batch, as chosen or given."""
    tokens_per_second: float | None = None
    """Predicted over the whole batch."""
    bottleneck_seconds: float | None = None
    """Slowest stage, one micro-batch."""
    latency_seconds: float | None = None
    """One micro-batch through all stages; decoding: one token."""
    memory_share: float | None = None
    """Share of its usable memory that the fullest device needs."""
    max_sequences: int | None = None
    """Sequences whose KV cache fits on all stages; None also if none is kept."""
    bubble_fraction: float | None = None
    """Share of device time in which stages wait."""
    boundaries: tuple[int, ...] | None = None
    """`Plan.boundaries`."""
    reason: str = ""
    """Why there is no plan, in a few words."""


def sweep(
    profile_of: Callable[[str | None, str | None], ModelProfile],
    grid: Grid,
    workload: Workload,
    *,
    objective: Objective = "throughput",
    constraints: Constraints | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> tuple[Point, ...]:
    """Plans every combination of a grid, as `make_plan` would.

    Args:
        profile_of: The model in a dtype and a weight_dtype, either None for the model's own; called once for each
            pair.
        grid: What is varied.
        workload: Everything else that is asked; its batch and sequence are replaced by the grid's.
        objective: Of every plan.
        constraints: Of every plan.
        on_point: Told every point as soon as it is planned.

    Returns:
        A point for each combination: by cluster, then dtype, weights, sequence, batch, as they come in the grid.

    Raises:
        WorkloadError: If two precisions are one and the same, or no point at all makes sense (the first one's error).
        InvalidInputError: If the model can't be described in one of the precisions, or no point makes sense.

    Example:
        >>> profile = ModelProfile.from_costs([4, 18, 2, 5, 12, 11])
        >>> clusters = {spec: Cluster.parse(spec) for spec in ("h200:2", "h200:4", "h200:8")}
        >>> grid = Grid(clusters=clusters, batches=(8,), sequences=(1,))
        >>> points = sweep(lambda dtype, weight_dtype: profile, grid, Workload(batch=1, sequence=1))
        >>> [(point.boundaries, point.outcome) for point in points]  # doctest: +NORMALIZE_WHITESPACE
        [((0, 3, 6), 'planned'), ((0, 1, 2, 5, 6), 'planned'), (None, 'makes no sense')]
    """
    bounds = constraints or Constraints()
    profiles: dict[tuple[str, str], ModelProfile] = {}
    for pair in itertools.product(grid.dtypes, grid.weight_dtypes):
        profile = profile_of(*pair)
        key = (profile.dtype, profile.weight_dtype or profile.dtype)
        if key in profiles:
            raise WorkloadError(
                f"dtype {pair[0]} with weights {pair[1]} comes to {key[0]} with {key[1]} weights, which the sweep has "
                "already; leave one of them out."
            )
        profiles[key] = profile
    points: list[Point] = []
    first_error: InvalidInputError | None = None
    combinations = itertools.product(grid.clusters, profiles.values(), grid.sequences, grid.batches)
    for name, profile, sequence, batch in combinations:
        asked = _Asked(profile, grid.clusters[name], workload, batch, sequence, objective, bounds)
        point, error = asked.point(name)
        first_error = first_error or error
        points.append(point)
        if on_point is not None:
            on_point(point)
    if first_error is not None and all(point.outcome == "makes no sense" for point in points):
        raise first_error
    return tuple(points)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One combination."""

    profile: ModelProfile
    cluster: Cluster
    workload: Workload
    batch: int
    sequence: int
    objective: Objective
    constraints: Constraints

    def point(self, name: str) -> tuple[Point, InvalidInputError | None]:
        """The row, and the error if the request is wrong."""
        blank = Point(
            model=self.profile.name,
            phase=self.workload.phase,
            objective=self.objective,
            constraints=self.constraints.as_text(),
            cluster=name,
            device=" + ".join(dict.fromkeys(device.name for device in self.cluster.devices)),
            num_devices=len(self.cluster.devices) * self.cluster.group_size,
            num_stages=len(self.cluster.devices),
            dtype=self.profile.dtype,
            weight_dtype=self.profile.weight_dtype or self.profile.dtype,
            batch=self.batch,
            sequence=self.sequence,
            outcome="makes no sense",
        )
        try:
            workload = dataclasses.replace(self.workload, batch=self.batch, sequence=self.sequence)
            check_request(self.profile, self.cluster, workload, None, self.objective, self.constraints)
            request = Request(
                profile=self.profile, cluster=self.cluster, workload=workload, constraints=self.constraints
            )
            plan = None
            if request.is_feasible:  # quickly tried
                plan = best_plan(self.profile, self.cluster, workload, self.objective, self.constraints)
        except InvalidInputError as error:
            return dataclasses.replace(blank, reason=re.split("[:;] ", str(error))[0]), error
        if plan is None:
            return dataclasses.replace(blank, outcome="does not fit", reason=self._misfit(workload)), None
        return _planned(blank, plan), None

    def _misfit(self, workload: Workload) -> str:
        """Why there is no plan, of the emptiest partition with the smallest micro-batch."""
        plan = emptiest(self.profile, self.cluster, workload.with_micro_batch(micro_batch_candidates(workload)[0]))
        if fits(plan):
            return f"no partition keeps to {self.constraints.as_text()}"
        worst = max(range(plan.num_stages), key=lambda index: _share(plan, index))
        stage = plan.stages[worst]
        kinds = {
            "weights": stage.weight_bytes,
            "KV cache": stage.kv_bytes,
            "activations": stage.activation_bytes,
            "buffers": stage.buffer_bytes,
            "training state": stage.training_bytes,
        }
        return (
            f"stage {worst} needs {format_bytes(stage.memory_bytes)} of {format_bytes(stage.capacity_bytes)}, "
            f"mostly {max(kinds, key=lambda kind: kinds[kind])}"
        )


def _share(plan: Plan, index: int) -> float:
    return plan.stages[index].memory_bytes / plan.stages[index].capacity_bytes


def _planned(blank: Point, plan: Plan) -> Point:
    return dataclasses.replace(
        blank,
        outcome="planned",
        micro_batch=plan.workload.chosen_micro_batch,
        tokens_per_second=plan.tokens_per_second,
        bottleneck_seconds=plan.bottleneck_seconds,
        latency_seconds=plan.latency_seconds,
        memory_share=plan.memory_share,
        max_sequences=plan.max_sequences,
        bubble_fraction=plan.bubble_fraction,
        boundaries=plan.boundaries,
    )


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from a list such as "256,1024".

    Args:
        option: Its name on the command line, for messages.
        text: The list.

    Raises:
        WorkloadError: If an item is empty, comes twice, or is no whole number of 1 to 1,000,000,000.

    Example:
        >>> parse_numbers("--batch", "256, 1024")
        (256, 1024)
    """
    numbers = []
    for place, item in enumerate(_items(option, text), 1):
        if not re.fullmatch("[0-9]{1,10}", item) or not 1 <= int(item) <= _LARGEST:
            bound = f"it must be a whole number of 1 to {_LARGEST:,}"
            raise WorkloadError(f"{option}: item {place} is {shown(item)}; {bound}.")
        numbers.append(int(item))
    return tuple(_each_once(option, numbers))


def parse_names(option: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """Names from a list such as "float16,bfloat16".

    Args:
        option: Its name on the command line, for messages.
        text: The list.
        known: All names that are allowed.

    Raises:
        WorkloadError: If an item is empty, comes twice, or is not known.
    """
    names = _items(option, text)
    for place, name in enumerate(names, 1):
        if name not in known:
            raise WorkloadError(f"{option}: item {place} is {shown(name)}; known are {', '.join(known)}.")
    return tuple(_each_once(option, names))


def parse_clusters(option: str, text: str) -> dict[str, Cluster]:
    """Clusters by their names from a list such as "h100-sxm:4,h200:2x8,mine.toml".

    Args:
        option: Its name on the command line, for messages.
        text: The list.

    Raises:
        WorkloadError: If an item is empty or comes twice.
        HardwareError: If an item is no cluster.
    """
    clusters = {}
    for place, spec in enumerate(_each_once(option, _items(option, text)), 1):
        try:
            clusters[spec] = Cluster.parse(spec)
        except HardwareError as error:
            raise HardwareError(f"{option}: item {place}: {error}") from error
    return clusters


def _items(option: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        remedy = "write values separated by single commas"
        raise WorkloadError(f"{option}: item {items.index('') + 1} of {shown(text)} is empty; {remedy}.")
    if len(items) > MOST_POINTS:
        raise WorkloadError(f"{option} has {len(items):,} items; a sweep has at most {MOST_POINTS:,} points.")
    return items


def _each_once(option: str, items: list[_Item]) -> list[_Item]:
    seen = set()
    for place, item in enumerate(items, 1):
        if item in seen:
            raise WorkloadError(f"{option}: item {place}, {shown(item)}, is there already; give each value once.")
        seen.add(item)
    return items
