"""What is checked in one process before a job's ranks start, so that nothing starts in vain."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lp_plugin.errors import (
    DocumentError,
    HardwareError,
    LpPluginError,
    ModelConfigError,
    PlanFileError,
    RuntimeEnvironmentError,
    WorkloadError,
)
from lp_plugin.files import real_path
from lp_plugin.hardware import Cluster
from lp_plugin.job.layout import Layout
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import Architecture, read_config
from lp_plugin.plan import Plan
from lp_plugin.planfile import check_model, load_plan
from lp_plugin.quantity import said
from lp_plugin.workload import Phase

__all__ = [
    "check_at_least_one",
    "check_buildable",
    "check_replicas",
    "check_writable",
    "checked_architecture",
    "checked_cluster",
    "checked_layout",
    "checked_plan",
    "model_fingerprint",
]


def checked_architecture(directory: str | Path, profile: ModelProfile) -> Architecture:
    """What the model's config says, of a family that stages can be built of.

    Raises:
        UnsupportedModelError: If stages can't be built of it.
    """
    from lp_plugin.integrations.transformers.runnable import check_runnable  # noqa: PLC0415 - looks for torch

    check_runnable(read_config(directory))
    if profile.architecture is None:
        raise ModelConfigError(f"{directory} has no architecture; give a directory with a config.json.")
    return profile.architecture


def checked_plan(
    path: str | Path | None, directory: str | Path, *, dtype: str, tensor_parallel: int | None, phase: Phase
) -> Plan | None:
    """The plan in a file, if there is one, made for this model, precision and phase.

    Args:
        path: The file; None if none was given.
        directory: The model directory.
        dtype: Precision that the job runs in.
        tensor_parallel: What ``--tensor-parallel`` says; None if it was left out.
        phase: What the job does.

    Raises:
        PlanFileError: If it is broken, or made for something else.
    """
    if path is None:
        return None
    plan = load_plan(path)
    if plan.weight_dtype is not None:
        raise PlanFileError(
            f"{path} was made with --weights, which a run can't carry out; make a plan without it, "
            "or export it to an engine that can."
        )
    profile = ModelProfile.from_config(directory, dtype=plan.dtype, granularity=plan.granularity)
    check_model(plan, profile.sharded(plan.tensor_parallel), path)
    if plan.dtype != dtype:
        raise PlanFileError(
            f"{path} was made for {plan.dtype}, but the job runs in {dtype}; "
            f"add --dtype {plan.dtype}, or make a plan for {dtype}."
        )
    if tensor_parallel is not None and tensor_parallel != plan.tensor_parallel:
        raise PlanFileError(
            f"{path} was made for --tensor-parallel {plan.tensor_parallel}, but it is {tensor_parallel} here; "
            f"leave it out, or make a plan with --tensor-parallel {tensor_parallel}."
        )
    if plan.workload.phase != phase:
        raise PlanFileError(
            f"{path} was made for {plan.workload.phase}, but the job is {phase}; make a plan with --phase {phase}."
        )
    return plan


def checked_layout(
    plan: Plan | None,
    profile: ModelProfile,
    *,
    num_stages: int | None,
    tensor_parallel: int | None = None,
    data_parallel: int = 1,
) -> Layout:
    """Numbers of processes, from the plan where the user leaves them out.

    Raises:
        WorkloadError: If the number of stages is not known, or a number is not possible.
        PlanFileError: If the plan has another number of stages.
    """
    if plan is not None and num_stages is not None and num_stages != plan.num_stages:
        raise PlanFileError(
            f"the plan has {plan.num_stages} stages, but --stages is {num_stages}; leave --stages out, "
            f"or make a plan with --stages {num_stages}."
        )
    stages = num_stages if plan is None else plan.num_stages
    if stages is None:
        raise WorkloadError("neither --stages nor --plan is given; say how many stages the pipeline has.")
    most = profile.num_layers if plan is None else len(plan.layers)
    if not 1 <= stages <= most:
        raise WorkloadError(
            f"--stages is {stages}, but {profile.name} has {most} layers (embedding, norm and head "
            f"included) and each stage needs at least one; give 1 to {most}."
        )
    if tensor_parallel is None:
        tensor_parallel = 1 if plan is None else plan.tensor_parallel
    check_at_least_one("--tensor-parallel", tensor_parallel)
    check_at_least_one("--data-parallel", data_parallel)
    profile.sharded(tensor_parallel)  # refuses heads that can't be divided so
    return Layout(num_stages=stages, tensor_parallel=tensor_parallel, data_parallel=data_parallel)


def checked_cluster(spec: str | None, layout: Layout) -> Cluster | None:
    """The user's devices for one pipeline, a tensor-parallel group per stage; None leaves it to the driver.

    Raises:
        HardwareError: If the description is wrong, or has too few devices.
    """
    if spec is None:
        return None
    cluster, needed = Cluster.parse(spec), layout.num_stages * layout.tensor_parallel
    if len(cluster.devices) < needed:
        raise HardwareError(
            f"--cluster {spec} names {len(cluster.devices)} of the {needed} devices that one pipeline takes "
            f"({layout.num_stages} stages x {layout.tensor_parallel} tensor-parallel); name more, or lower --stages."
        )
    return cluster.subset(needed).grouped(layout.tensor_parallel)


def check_replicas(layout: Layout, count: int, what: str) -> None:
    """Refuses replicas that would have nothing to do.

    Args:
        layout: Processes.
        count: Texts of the job.
        what: What they are called, in the plural.

    Raises:
        WorkloadError: Naming both numbers.
    """
    if layout.data_parallel > count:
        raise WorkloadError(
            f"--data-parallel is {layout.data_parallel}, but there are {count} {what} to share out; "
            f"give at most {count}."
        )


def check_at_least_one(option: str, value: int | None) -> None:
    """Refuses a count below 1; None stands for an option left out.

    Raises:
        WorkloadError: Naming the option.
    """
    if value is not None and value < 1:
        raise WorkloadError(f"{option} is {value}; it must be at least 1.")


def check_buildable(
    directory: str | Path, dtype: str, *, halves: bool = False, head: bool = True, tensor_parallel: int = 1
) -> None:
    """Lets transformers build one block without memory, and compares the weights' names and shapes with the model.

    What is wrong with these, the ranks need not find out.

    Args:
        directory: The model directory.
        dtype: Precision that the job runs in.
        halves: Whether blocks are cut between attention and MLP.
        head: Whether the model is to have its head.
        tensor_parallel: Processes that are to share each stage.

    Raises:
        RuntimeEnvironmentError: If this machine can't run the precision.
        ModelConfigError: If transformers can't build the model.
        UnsupportedModelError: If its layers can't be shared by several processes.
        WorkloadError: If they can't be by so many.
        WeightsError: If the weights don't fill it.
    """
    import torch  # noqa: PLC0415 - seconds to import
    from transformers import AutoConfig  # noqa: PLC0415

    from lp_plugin.integrations.transformers.decoder import DecoderStage  # noqa: PLC0415
    from lp_plugin.integrations.transformers.tensor_parallel import check_shardable  # noqa: PLC0415
    from lp_plugin.integrations.transformers.weights import check_checkpoint  # noqa: PLC0415

    if dtype == "float16" and not torch.cuda.device_count():
        raise RuntimeEnvironmentError("float16 needs a GPU: CPUs compute it too slowly to use; add --dtype float32.")
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        check_shardable(DecoderStage(config, 0, 2, halves=halves), tensor_parallel)
    except LpPluginError:
        raise
    except Exception as error:  # noqa: BLE001 - a value that a config class or a layer can't use raises anything
        raise ModelConfigError(
            f"transformers can't build the model in {directory}: {type(error).__name__}: {said(error)} "
            "Correct its config."
        ) from None
    check_checkpoint(config, directory, head=head)


def check_writable(input_path: str | Path, output: str | Path, *others: str | Path | None) -> None:
    """Refuses files that could not be written when the work is done, or would replace the input or one another.

    Raises:
        DocumentError: Naming the file.
    """
    for path in (output, *others):
        if path is not None and not real_path(path).parent.is_dir():
            raise DocumentError(f"{path} can't be written: folder {Path(path).parent} does not exist.")
        if path is not None and Path(path).exists() and not Path(path).is_file():
            kind = "folder" if Path(path).is_dir() else "special file"
            raise DocumentError(f"{path} can't be written: it is a {kind}; give the name of a regular file.")
    taken = {real_path(input_path): "the input"}
    for path in (output, *others):
        if path is None:
            continue
        place = real_path(path)
        if place in taken:
            raise DocumentError(f"{path} would replace {taken[place]}; give another name.")
        taken[place] = "another file of this command"


def model_fingerprint(directory: str | Path, dtype: str) -> str:
    """A digest of config, precision, and the weight files' names, sizes and times: it changes if they are replaced.

    Raises:
        WeightsError: If there are no weights, or they can't be read.
    """
    from lp_plugin.integrations.transformers.checkpoint import weight_files  # noqa: PLC0415 - imports torch

    files = sorted(set(weight_files(directory).values()))
    listed = [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    config = json.dumps(read_config(directory), sort_keys=True)
    return hashlib.sha256("|".join([config, dtype, *listed]).encode()).hexdigest()
