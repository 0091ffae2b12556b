"""``lp-plugin calibrate``: every device of the host measures itself, all at the same time, for a cluster file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from rich.console import Console

from lp_plugin.errors import HardwareError
from lp_plugin.files import check_output
from lp_plugin.hardware.catalogue import catalogue, load_device, load_link
from lp_plugin.hardware.writing import write_cluster
from lp_plugin.integrations.deepspeed.alone.layer_times import time_model_layers
from lp_plugin.integrations.deepspeed.engine import init_distributed
from lp_plugin.job.launch import launch_local
from lp_plugin.job.ranks import gather
from lp_plugin.measure.bandwidth import copy_rates, find_caches
from lp_plugin.measure.calibration import Calibration, LayerRate, calibrated_cluster, notes_of
from lp_plugin.measure.calibration_tables import calibration_picture, calibration_report
from lp_plugin.measure.device import catalogue_name, device_name
from lp_plugin.measure.launches import launch_seconds
from lp_plugin.measure.links import time_links
from lp_plugin.measure.matmul import matmul_rates
from lp_plugin.measured import LayerTimes
from lp_plugin.model import ModelProfile
from lp_plugin.picture import check_picture
from lp_plugin.report import console
from lp_plugin.solver.layer_table import LayerTable
from lp_plugin.workload import Workload

__all__ = ["calibrate_host", "calibrate_rank"]

_FAMILY: dict[str, Any] = {"model_type": "llama", "vocab_size": 256, "num_hidden_layers": 1}
_TINY = _FAMILY | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_LARGE: Mapping[str, tuple[dict[str, Any], str, int]] = {
    "cuda": ({"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}, "bfloat16", 2048),
    "cpu": ({"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}, "float32", 128),
}
"""A layer that arithmetic bounds, its precision and its tokens, by type of device."""
_BLOCK = 1
"""The first layer after the embedding."""
_CPU_PROCESSES = 2


def calibrate_host(console: Console, *, output: Path, processes: int | None, picture: Path | None) -> None:
    """Measures, prints tables, writes the file.

    Args:
        console: For progress and tables.
        output: Cluster file.
        processes: GPUs or processes; None for all, or 2 on a CPU.
        picture: Where to draw; None for nowhere.

    Raises:
        InvalidInputError: If the file or the picture can't be written.
        HardwareError: If the file's name has another ending, the host has fewer GPUs, or unequal ones, or is too busy.
    """
    gpus = torch.cuda.device_count()
    count = processes or gpus or _CPU_PROCESSES
    if gpus and count > gpus:
        raise HardwareError(f"{count} GPUs were asked for, but this host shows {gpus}; ask for 1 to {gpus}.")
    if output.suffix != ".toml":
        raise HardwareError(f"the cluster file can't be written to {output}: give a name that ends in .toml.")
    check_output(output, "the cluster file")
    if picture is not None:
        check_picture(picture)
    calibration: Calibration = launch_local(count, calibrate_rank)
    if not calibration.layer.seconds:
        raise HardwareError(
            "a stage of several large layers took no longer than one of few: other programs use the machine; "
            "measure again when nothing else runs."
        )
    is_known = gpus > 0 and calibration.name in catalogue()
    known = load_device(calibration.name) if is_known else None
    cluster = calibrated_cluster(calibration, known, load_link(calibration.name) if is_known else None)
    console.print(calibration_report(calibration, cluster))
    title = f"{calibration.count} x {calibration.hardware}, measured by lp-plugin calibrate"
    write_cluster(cluster, output, title=title, notes=notes_of(calibration, cluster, known))
    console.print(f"written: {output}; plan with --cluster {output}")
    if picture is not None:
        calibration_picture(calibration, picture)
        console.print(f"drawn: {picture}")


def calibrate_rank() -> Calibration | None:
    """Measures this rank's device; collective over the ranks of the host.

    Returns:
        Rank 0's figures on rank 0; None elsewhere.

    Raises:
        HardwareError: If the host has fewer GPUs than processes, or unequal ones.
    """
    init_distributed()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    hardware = device_name()
    others = gather(hardware)
    if len(set(others)) > 1:
        raise HardwareError(
            f"the GPUs of this host are not of one kind ({', '.join(sorted(set(others)))}); "
            "calibrate one kind at a time: choose them by CUDA_VISIBLE_DEVICES."
        )
    figures = _measured(device, hardware)
    dist.barrier()
    torch.distributed.destroy_process_group()
    return figures


def _measured(device: torch.device, hardware: str) -> Calibration | None:
    """Everything, step by step together with the other ranks."""
    _say("matrix products")
    matmul = matmul_rates(device)
    _say("bandwidth by working set")
    caches = find_caches(device)
    copies = copy_rates(device, caches)
    _say("launches and a tiny layer")
    launches = launch_seconds(device)
    eager = _tiny_layer(device, replayed=False)
    replayed = _tiny_layer(device, replayed=True) if device.type == "cuda" else None
    _say("a large layer")
    layer = _large_layer(device)
    _say("messages")
    links = time_links(device)
    if dist.get_rank() != 0:
        return None
    count = dist.get_world_size()
    name = hardware if device.type == "cuda" else "cpu"
    return Calibration(
        name=catalogue_name(name) or name,
        hardware=hardware,
        count=count,
        torch_version=torch.__version__,
        memory_bytes=_memory_bytes(device, count),
        caches=caches,
        matmul=matmul,
        copies=copies,
        launches=launches,
        layer=layer,
        eager_layer_seconds=eager.seconds[_BLOCK],
        replayed_layer_seconds=None if replayed is None else replayed.seconds[_BLOCK],
        layer_spread=max(each.spread for each in (eager, replayed) if each is not None),
        links=links,
    )


def _say(step: str) -> None:
    """Tells what comes next once all ranks are there."""
    dist.barrier()
    if dist.get_rank() == 0:
        console().print(f"measuring {step} ...")


def _tiny_layer(device: torch.device, *, replayed: bool) -> LayerTimes:
    return time_model_layers(
        _TINY,
        dtype=_LARGE[device.type][1],
        device=device,
        rows=1,
        tokens=1,
        execution="graphs" if replayed else "eager",
        first_tier_bytes=0,
    )


def _large_layer(device: torch.device) -> LayerRate:
    shape, dtype, tokens = _LARGE[device.type]
    config = {**_FAMILY, **shape}
    times = time_model_layers(
        config, dtype=dtype, device=device, rows=1, tokens=tokens, execution="eager", first_tier_bytes=0
    )
    table = LayerTable(
        ModelProfile.from_config(config, dtype=dtype),
        Workload(phase="prefill", batch=1, sequence=tokens, micro_batch=1),
    )
    return LayerRate(
        dtype=dtype,
        flops=float(table.flops[_BLOCK]),
        seconds=times.seconds[_BLOCK],
        spread=times.spread,
        shape=f"llama layer of hidden size {shape['hidden_size']}, {tokens} tokens, {dtype}",
    )


def _memory_bytes(device: torch.device, processes: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
