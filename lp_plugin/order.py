"""Unequal devices: the order along the pipeline whose best partition has the least bottleneck.

Exact over all distinct orders of up to `MOST_KINDS` kinds: a dynamic program from the last device to the first over
(devices of each kind used so far, kind of the next one, the link it receives over, the layer it starts with). Devices
of one kind are interchangeable, so the number of states is the product of (count + 1), not the number of orders.
Costs are those of `lp_plugin.solver.cost`: memory tiers, capacities, both links of a stage, and in training the
micro-batches in flight at its place.

Source:
    Held and Karp, A dynamic programming approach to sequencing problems, 1962 (sets instead of sequences).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lp_plugin.errors import WorkloadError
from lp_plugin.hardware import Cluster, Link
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Constraints
from lp_plugin.planner import best_plan, check_request
from lp_plugin.solver.cost import StageTable, grid_quantum
from lp_plugin.solver.criteria import Seconds, StageLimits
from lp_plugin.solver.layer_table import FloatArray, IntArray, LayerTable
from lp_plugin.solver.solve import solve
from lp_plugin.wiring import MOST_KINDS, Kinds, kinds_of
from lp_plugin.workload import Workload, micro_batch_candidates

__all__ = ["MOST_KINDS", "best_order"]

_MOST_STEPS = 4_000_000_000
"""Costs compared, at most: about ten seconds on one core."""
_CALL_STEPS = 5_000
"""What calling NumPy takes, in costs compared."""
_MOST_KEPT = 16_000_000
"""Numbers kept at once of the stages' costs, and of the states' values."""


def best_order(profile: ModelProfile, cluster: Cluster, workload: Workload) -> Cluster:
    """The cluster with its devices in the order whose best partition has the least bottleneck.

    Exact for a given micro-batch. If it is left open, every candidate is tried with its own best order, and the
    order of the candidate with the most tokens per second is taken, as `make_plan` would. Where neighbours' links
    come from is said in `lp_plugin.wiring`. Which devices share a tensor-parallel group stays as it is.

    Args:
        profile: The layers.
        cluster: The devices (or groups), in any order; all of them are used.
        workload: What is asked.

    Returns:
        The given cluster if no order is faster, or if nothing fits in any order (`make_plan` says why). Else the
        best order; of several the lexicographically first, kinds compared by where they first appear.

    Raises:
        HardwareError: If there are more than `MOST_KINDS` kinds, or links depend on more than the kinds they join.
        WorkloadError: If devices outnumber layers, a sequence is too long, or the search would take too long.

    Example:
        >>> from lp_plugin.hardware import Link
        >>> wire = Link(name="wire", bandwidth_bytes_per_second=1e9, latency_seconds=0.0)
        >>> fast, slow = (Cluster.homogeneous(name, 1).devices[0] for name in ("h200", "l40s"))
        >>> profile = ModelProfile.from_costs([3, 1, 1], weight_bytes=[1, 1, 10**11])
        >>> given = Cluster(devices=(fast, slow), links=(wire,))  # only an H200 can hold the last layer
        >>> [device.name for device in best_order(profile, given, Workload(batch=1, sequence=1)).devices]
        ['l40s', 'h200']
    """
    check_request(profile, cluster, workload, None, "throughput", Constraints())
    kinds = kinds_of(cluster)
    if len(kinds.devices) == 1:
        return cluster
    candidates = micro_batch_candidates(workload)
    if len(candidates) == 1:
        return _least(profile, cluster, workload.with_micro_batch(candidates[0]), kinds, 1) or cluster
    given = best_plan(profile, cluster, workload, "throughput", Constraints())
    best, rate = cluster, given.tokens_per_second if given else 0.0
    for micro_batch in candidates:
        cut = workload.with_micro_batch(micro_batch)
        found = _least(profile, cluster, cut, kinds, len(candidates))
        plan = None if found is None else solve(profile, found, cut)
        if found is not None and plan is not None and plan.tokens_per_second > rate:
            best, rate = found, plan.tokens_per_second
    return best


def _least(
    profile: ModelProfile, cluster: Cluster, workload: Workload, kinds: Kinds, num_searches: int
) -> Cluster | None:
    """The best order for a chosen micro-batch: the given one if none is better; None if nothing fits."""
    search = _Search(profile, workload, kinds)
    given = solve(profile, cluster, workload)
    if given is not None:
        search.keep_below(given.boundaries)
    search.check_steps(profile, num_searches)
    order = search.best()
    return None if order is None else kinds.arranged(cluster, order)


class _Search:
    """The program for one micro-batch.

    Links are numbers: 0 is none (at the ends), ``i`` is ``links[i - 1]``. A number of devices used of each kind is
    one number too, with the digits ``used[kind]`` to the bases ``counts[kind] + 1``.
    """

    def __init__(self, profile: ModelProfile, workload: Workload, kinds: Kinds) -> None:
        self._kinds = kinds
        self._num_layers = profile.num_layers
        self._num_devices = len(kinds.order)
        self._workload = workload
        self._table = LayerTable(profile, workload)
        self._joined = [[0] * len(kinds.devices) for _ in kinds.devices]
        links: list[Link] = []
        for left, row in enumerate(kinds.links):
            for right, link in enumerate(row):
                if link is not None:
                    if link not in links:
                        links.append(link)
                    self._joined[left][right] = links.index(link) + 1
        slowest = max(links, key=lambda link: link.seconds(float(np.max(self._table.cuts))))
        places = list(zip(kinds.devices, kinds.groups, strict=True))
        self._quantum = grid_quantum(self._table, places, [slowest] * self._num_devices)  # whatever the order
        self._transfers = [self._stage_table(0, link, 0) for link in (None, *links)]
        self._known: dict[tuple[int, int], FloatArray] = {}
        self._bound = math.inf
        self._check_size(profile)
        self._bases = np.array(kinds.counts) + 1
        self._strides = np.concatenate([[1], np.cumprod(self._bases[:-1])])
        self._levels = self._states_by_level()

    def _stage_table(self, kind: int, link: Link | None, in_flight: int) -> StageTable:
        return StageTable(
            self._table,
            self._kinds.devices[kind],
            receive=link,
            send=link,
            group=self._kinds.groups[kind],
            in_flight=in_flight,
            quantum=self._quantum,
        )

    def _in_flight(self, position: int) -> int:
        stages_left = self._num_devices - position
        return min(stages_left, self._workload.num_micro_batches) if self._table.is_training else 0

    def _inner(self, kind: int, position: int) -> FloatArray:
        """Seconds without transfers; [k, start] is the run of ``k + 1`` layers, inf if it can't matter."""
        key = (kind, self._in_flight(position))
        if key not in self._known:
            starts = np.arange(self._num_layers)[None, :]
            stops = starts + np.arange(1, self._num_layers + 1)[:, None]
            seconds = Seconds(self._stage_table(kind, None, key[1]), StageLimits())
            wide = np.broadcast_to(starts, stops.shape)
            costs = np.where(
                stops <= self._num_layers, seconds.inner(wide, np.minimum(stops, self._num_layers)), np.inf
            )
            within = np.any((costs <= self._bound) & (costs < np.inf), axis=1)
            self._known[key] = np.ascontiguousarray(costs[: int(np.sum(within))])  # inner rises with the run
        return self._known[key]

    def _runs(self, kind: int, position: int, receive: int, send: int) -> Iterator[tuple[slice, slice, FloatArray]]:
        """Starts, stops and costs of all runs of one length, for each length that fits the place."""
        low, high = position, self._num_layers - (self._num_devices - 1 - position)
        inner = self._inner(kind, position)
        entry, leave = self._transfers[receive].entry, self._transfers[send].exit
        for more in range(min(len(inner), high - low)):
            starts, stops = slice(low, high - more), slice(low + 1 + more, high + 1)
            costs = entry[starts] + inner[more, starts] + leave[stops]
            yield starts, stops, np.where(costs <= self._bound, costs, np.inf)

    def keep_below(self, boundaries: Sequence[int]) -> None:
        """Leaves out what is slower than the given order with these boundaries."""
        slowest, order = 0.0, self._kinds.order
        for position, (start, stop) in enumerate(pairwise(boundaries)):
            kind = order[position]
            receive = self._joined[order[position - 1]][kind] if position else 0
            send = self._joined[kind][order[position + 1]] if position + 1 < len(order) else 0
            entry, leave = self._transfers[receive].entry, self._transfers[send].exit
            inner = self._inner(kind, position)[stop - start - 1, start]
            slowest = max(slowest, float(entry[start] + inner + leave[stop]))
        self._bound = slowest
        self._known.clear()

    def _receives(self, kind: int, position: int) -> list[int]:
        if position == 0:
            return [0]
        return sorted({row[kind] for row in self._joined} - {0})

    def _sends(self, kind: int, position: int) -> list[int]:
        if position == self._num_devices - 1:
            return [0]
        return sorted({*self._joined[kind]} - {0})

    def _states_by_level(self) -> list[IntArray]:
        """The states by number of devices used; a state's place within its level is `_place`."""
        codes = np.arange(math.prod(self._bases))
        used = np.sum(codes // self._strides[:, None] % self._bases[:, None], axis=0)
        levels = np.split(np.argsort(used, kind="stable"), np.cumsum(np.bincount(used))[:-1])
        self._place = np.zeros(len(codes), dtype=np.int64)
        for level in levels:
            self._place[level] = np.arange(len(level))
        return levels

    def _with_room(self, kind: int, codes: IntArray) -> NDArray[np.bool_]:
        return np.asarray(codes // self._strides[kind] % self._bases[kind] < self._kinds.counts[kind])

    def _check_size(self, profile: ModelProfile) -> None:
        """Refuses what would take too much memory, before anything large is made."""
        states = math.prod(count + 1 for count in self._kinds.counts)
        kinds, layers = len(self._kinds.counts), self._num_layers
        places = len({self._in_flight(position) for position in range(self._num_devices)})
        kept = max(places * kinds * layers**2, states * kinds * len(self._transfers) * (layers + 1))
        if kept > _MOST_KEPT:
            raise self._too_large(profile, f"keeps {kept:,} numbers; at most {_MOST_KEPT:,} are kept")

    def check_steps(self, profile: ModelProfile, num_searches: int) -> None:
        """Refuses what would take too long.

        Args:
            profile: For the message.
            num_searches: Searches of this size, one for each micro-batch that is tried.

        Raises:
            WorkloadError: If they would take more than `_MOST_STEPS` together.
        """
        steps = 0
        for position, codes in enumerate(self._levels[:-1]):
            widest = self._num_layers - self._num_devices + 1
            for kind in range(len(self._kinds.counts)):
                rows = int(np.count_nonzero(self._with_room(kind, codes)))
                pairs = len(self._receives(kind, position)) * len(self._sends(kind, position))
                lengths = min(len(self._inner(kind, position)), widest)
                runs = lengths * widest - lengths * (lengths - 1) // 2
                steps += pairs * (rows * runs + lengths * _CALL_STEPS) if rows else 0
        if steps * num_searches > _MOST_STEPS:
            what = f"takes {steps * num_searches:,} steps; at most {_MOST_STEPS:,} are taken"
            raise self._too_large(
                profile, what, "Give the micro-batch, of which each is tried. " if num_searches > 1 else ""
            )

    def _too_large(self, profile: ModelProfile, what: str, remedy: str = "") -> WorkloadError:
        pairs = zip(self._kinds.counts, self._kinds.devices, strict=True)
        counts = " + ".join(f"{count} x {device.name}" for count, device in pairs)
        return WorkloadError(
            f"finding the best order of {counts} for {profile.name} with {profile.num_layers} layers {what}. {remedy}"
            "Join devices to tensor-parallel groups, or give them in the order to be used."
        )

    def best(self) -> tuple[int, ...] | None:
        """The kind at each place; the given order if it is among the best; None if no order has a partition."""
        values = self._sweep()
        least = float(np.min(values[0][0, :, 0, 0]))
        if least == math.inf:
            return None
        return self._kinds.order if least == self._bound else self._first(values, least)

    def _sweep(self) -> list[FloatArray]:
        """Least bottleneck of what is still to place; for each position [state, kind, receive, start]."""
        values: list[FloatArray] = [np.zeros(0)] * self._num_devices
        for position in range(self._num_devices - 1, -1, -1):
            codes = self._levels[position]
            shape = (len(codes), len(self._bases), len(self._transfers), self._num_layers + 1)
            values[position] = np.full(shape, np.inf)
            for kind in range(len(self._bases)):
                rows = np.flatnonzero(self._with_room(kind, codes))
                after = self._place[codes[rows] + self._strides[kind]]
                for send in self._sends(kind, position):
                    ahead = self._ahead(values, position, kind, send, after)
                    for receive in self._receives(kind, position):
                        found = np.full((len(rows), self._num_layers + 1), np.inf)
                        for starts, stops, costs in self._runs(kind, position, receive, send):
                            reached = np.maximum(ahead[:, stops], costs)
                            np.minimum(found[:, starts], reached, out=found[:, starts])
                        known = values[position][rows, kind, receive]
                        values[position][rows, kind, receive] = np.minimum(known, found)
        return values

    def _ahead(self, values: Sequence[FloatArray], position: int, kind: int, send: int, after: IntArray) -> FloatArray:
        """Least bottleneck behind a stage of ``kind`` that sends over ``send``; [state, layer it stops before]."""
        if position == self._num_devices - 1:
            ahead = np.full((len(after), self._num_layers + 1), np.inf)
            ahead[:, -1] = 0.0
            return ahead
        following = [other for other, link in enumerate(self._joined[kind]) if link == send]
        return np.asarray(np.min(values[position + 1][after[:, None], following, send], axis=1))

    def _first(self, values: Sequence[FloatArray], least: float) -> tuple[int, ...]:
        """The lexicographically first order with the bottleneck ``least``."""
        order: list[int] = []
        state, receive = 0, 0
        starts = np.zeros(self._num_layers + 1, dtype=np.bool_)  # that the last device of the order may have
        starts[0] = True
        for position in range(self._num_devices):
            for kind in range(len(self._bases)):
                link = self._joined[order[-1]][kind] if order else 0
                stops = self._stops(starts, order[-1], position - 1, receive, link, least) if order else starts
                if np.any(values[position][self._place[state], kind, link][stops] <= least):
                    break
            order.append(kind)
            starts, receive = stops, link
            state += int(self._strides[kind])
        return tuple(order)

    def _stops(
        self, starts: NDArray[np.bool_], kind: int, position: int, receive: int, send: int, least: float
    ) -> NDArray[np.bool_]:
        """Where a stage that starts at one of ``starts`` may stop."""
        stops = np.zeros_like(starts)
        for where, reached, costs in self._runs(kind, position, receive, send):
            stops[reached] |= starts[where] & (costs <= least)
        return stops
