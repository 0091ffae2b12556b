"""Partition methods ``cache-aware``, ``profile`` and ``plan:PATH`` for every PipelineModule.

DeepSpeed has no registry for partition methods, and the partition is made in the module's constructor, before
``deepspeed.initialize`` sees the configuration. So importing ``lp_plugin.integrations.deepspeed`` wraps
``PipelineModule._partition_layers``, which all subclasses share; methods that are not ours go on to DeepSpeed.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from deepspeed.utils import logger

from lp_plugin.errors import DeepSpeedConfigError, PlanFileError, RuntimeEnvironmentError
from lp_plugin.hardware import Cluster
from lp_plugin.hardware.catalogue import load_link, load_network
from lp_plugin.hardware.device import Device, slower_link
from lp_plugin.integrations.deepspeed.agreement import check_same, plan_digest
from lp_plugin.integrations.deepspeed.config import Settings
from lp_plugin.integrations.deepspeed.layers import build_layer, distinct_numbers, profile_layers, undisturbed_random
from lp_plugin.integrations.deepspeed.sample import sample_input
from lp_plugin.job.memory import expect
from lp_plugin.measure.device import detect_device
from lp_plugin.measure.layers import LayerFailedError, LayerSeconds, time_layers
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.planfile import load_plan
from lp_plugin.planner import make_plan

__all__ = ["decide", "detected_cluster", "install", "timed_profile", "timing_share"]


def install(settings_of: Callable[[PipelineModule], Settings]) -> None:
    """Makes the methods known to PipelineModule and its subclasses; a second call changes nothing.

    Args:
        settings_of: The settings that apply to a module.
    """
    original = PipelineModule._partition_layers
    if hasattr(original, "of_lp_plugin"):
        return

    @functools.wraps(original)
    def _partition_layers(self: PipelineModule, method: str = "uniform") -> None:
        settings = settings_of(self)
        chosen = settings.method or method
        plan = decide(self, chosen, settings)
        if plan is None:
            original(self, method=chosen)
            return
        check_same({"plan": plan_digest(plan)}, "give all hosts the same configuration and plan file.")
        self.lp_plan = plan
        self.parts = list(plan.boundaries)
        if self.global_rank == 0:
            logger.info(f"lp_plugin: method {chosen}, boundaries {self.parts}")
            for note in plan.notes:
                logger.info(f"lp_plugin: {note}")
        stage = self._topo.get_coord(self.global_rank).pipe
        expect(plan, stage)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    _partition_layers.of_lp_plugin = True  # type: ignore[attr-defined]
    PipelineModule._partition_layers = _partition_layers


def decide(module: PipelineModule, method: str, settings: Settings) -> Plan | None:
    """The plan that a method asks for; None if the method is DeepSpeed's own.

    Raises:
        PlanFileError: If a plan file does not fit the module.
        InfeasibleError, WorkloadError, HardwareError: From the planner.
        DeepSpeedConfigError: If ``profile`` can't tell what the first layer takes; if ZeRO is above stage 1.
    """
    if method.lower().startswith("plan:"):
        return _plan_from_file(method[len("plan:") :], module)
    if method.lower() not in {"cache-aware", "profile"}:
        return None
    has_loss = settings.section.phase is None and module.loss_fn is not None
    workload = settings.workload(
        "train" if has_loss else settings.phase, data_parallel=module._topo.get_dim("data") or 1
    )
    profile = profile_layers(module._layer_specs, settings.dtype)
    if module.global_rank == 0:
        logger.info(f"lp_plugin: planning for {workload.phase} in {settings.dtype}, micro-batch {settings.micro_batch}")
    cluster = detected_cluster(module._topo, settings.section.device)
    if method.lower() == "profile":
        profile = _timed(module, profile, cluster, settings, training=workload.phase == "train")
    return make_plan(profile, cluster, workload, module.num_stages, objective=settings.section.objective)


def _timed(
    module: PipelineModule, profile: ModelProfile, cluster: Cluster, settings: Settings, *, training: bool
) -> ModelProfile:
    specs, dtype = module._layer_specs, getattr(torch, settings.dtype)
    try:
        return timed_profile(
            profile,
            distinct_numbers(specs),
            lambda index: build_layer(specs[index], _device_name(), dtype),
            sample_input(specs, settings, _device_name()),
            training=training,
            measured_on=cluster.devices[0],
            share=timing_share(module, cluster),
        )
    except RuntimeEnvironmentError as error:
        raise DeepSpeedConfigError(
            f'partition_method "profile": {error} Describe the first layer\'s input under '
            '"lp_plugin": {"input": {"shape": [...], "dtype": ...}}.'
        ) from None


def timing_share(module: PipelineModule, cluster: Cluster) -> tuple[int, int]:
    """(turn, processes) of this rank among those whose device is of the first stage's kind; no turn for others.

    Ranks that share every layer, neighbours each, count as one and have the same turn.
    """
    kind, size = cluster.devices[0].name, cluster.group_size
    groups = range(dist.get_world_size() // size)
    alike = [group for group in groups if cluster.devices[module._topo.get_coord(group * size).pipe].name == kind]
    mine = dist.get_rank() // size
    return (alike.index(mine) if mine in alike else len(alike)), len(alike)


def timed_profile(
    profile: ModelProfile,
    numbers: list[int],
    build: Callable[[int], Callable[[Any], Any]],
    sample: Any,
    *,
    training: bool,
    measured_on: Device,
    share: tuple[int, int],
) -> ModelProfile:
    """The profile with seconds measured on the real devices; ranks share the distinct layers and the results.

    Collective: every rank of the job calls it.

    Args:
        profile: Counted, not timed.
        numbers: One per layer; equal numbers promise equal cost.
        build: Makes layer ``i`` on this rank's device.
        sample: What the first layer takes.
        training: Whether to time a backward pass too.
        measured_on: The device of the ranks that have a turn.
        share: This rank's (turn, processes), from `timing_share`.

    Raises:
        RuntimeEnvironmentError: If a layer can't be built, or can't take what the one before hands on.
    """
    failure: str | None = None
    mine: dict[int, LayerSeconds] = {}
    with undisturbed_random():
        try:
            mine = time_layers(numbers, build, sample, training=training, share=share)
        except LayerFailedError as error:
            failure = f"{profile.layers[error.position].name}: {error}"
    gathered: list[tuple[dict[int, LayerSeconds], str | None]] = [({}, None)] * dist.get_world_size()
    torch.distributed.all_gather_object(gathered, (mine, failure))
    for _, message in gathered:
        if message is not None:
            raise RuntimeEnvironmentError(f"layers could not be timed: {message}.")
    seconds = {position: value for part, _ in gathered for position, value in part.items()}
    ordered = [seconds[position] for position in range(profile.num_layers)]
    backward = [each.backward for each in ordered] if training else None
    return profile.with_seconds([each.forward for each in ordered], backward, measured_on=measured_on)


def detected_cluster(topology: ProcessTopology, device: str, *, tensor_parallel: int = 1) -> Cluster:
    """One device, or group of devices, per stage: as each rank finds its own, or as the user names them.

    Collective if ``device`` is ``auto``: stages may run on unequal devices.

    Args:
        topology: Which rank is which stage.
        device: ``auto``, a name of the catalogue, or a cluster file.
        tensor_parallel: Neighbouring ranks that share each stage's layers.
    """
    num_stages = topology.get_dim("pipe")
    count = num_stages * tensor_parallel
    if device != "auto":
        named = Path(device).suffix == ".toml"
        whole = Cluster.from_toml(device).subset(count) if named else Cluster.homogeneous(device, count)
        return whole.grouped(tensor_parallel)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    mine = (detect_device(int(os.environ.get("LOCAL_RANK", "0")), local_processes), socket.gethostname())
    found: list[tuple[Device, str]] = [mine] * dist.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    pipeline = [
        found[rank]
        for stage in range(num_stages)
        for rank in sorted(topology.filter_match(pipe=stage))[:tensor_parallel]
    ]
    links = tuple(
        slower_link(load_link(left.name), load_link(right.name))
        if host == other
        else slower_link(load_network(left.name), load_network(right.name))
        for (left, host), (right, other) in pairwise(pipeline)
    )
    return Cluster(devices=tuple(device for device, _ in pipeline), links=links).grouped(tensor_parallel)


def _plan_from_file(path: str, module: PipelineModule) -> Plan:
    plan = load_plan(path)
    if len(plan.layers) != len(module._layer_specs):
        raise PlanFileError(
            f"{path} places {len(plan.layers)} layers of {plan.model_name}, but this PipelineModule has "
            f"{len(module._layer_specs)}. Make a plan for this model."
        )
    if plan.num_stages != module.num_stages:
        raise PlanFileError(
            f"{path} has {plan.num_stages} stages, but this PipelineModule has {module.num_stages}. "
            f"Make a plan with --stages {module.num_stages}, or start the job with {plan.num_stages} stages."
        )
    return plan


def _device_name() -> str:
    return str(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", "0"))))
