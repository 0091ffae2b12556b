"""From `load`'s arguments to a pipelined model: precision, plan or workload, processes, module, engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deepspeed import comm as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from lp_plugin.errors import DeepSpeedConfigError, PlanFileError, WorkloadError, WorldSizeError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.config import Section, Settings, read_config, read_settings
from lp_plugin.integrations.deepspeed.engine import build_engine, join_or_start, quiet
from lp_plugin.integrations.deepspeed.methods import detected_cluster
from lp_plugin.integrations.transformers.model import PipelinedModel
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.integrations.transformers.runnable import check_runnable
from lp_plugin.job.checks import check_buildable
from lp_plugin.job.layout import Layout
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import read_config as read_model_config
from lp_plugin.plan import Plan
from lp_plugin.planfile import check_model, load_plan
from lp_plugin.workload import Workload

__all__ = ["load_model"]

_ROWS, _TOKENS, _MICRO_BATCHES_PER_STAGE = 8, 1024, 4
"""What is planned for where the user says nothing: rows of a micro-batch and their length, micro-batches in flight."""


def load_model(
    directory: Path,
    plan: Plan | str | Path | None,
    config: str | Path | Mapping[str, Any] | None,
    *,
    num_stages: int | None,
    tensor_parallel: int,
    data_parallel: int,
    dtype: str | None,
) -> PipelinedModel:
    """As `lp_plugin.integrations.transformers.load`, which see."""
    settings = Settings(section=Section()) if config is None else read_settings(config)
    model_config = read_model_config(directory)
    check_runnable(model_config, encodes=True)
    head = _has_head(model_config)
    if dtype is None and settings.dtype != "float32":
        dtype = settings.dtype
    chosen = _plan(plan, settings, directory, dtype)
    granularity = "layer" if chosen is None else chosen.granularity
    profile = ModelProfile.from_config(directory, dtype=dtype, granularity=granularity)
    check_buildable(directory, profile.dtype, halves=granularity == "sublayer", head=head)
    join_or_start()
    layout = _layout(chosen, num_stages, tensor_parallel, data_parallel)
    workload = _workload(profile, settings, layout, given=config is not None) if chosen is None else chosen.workload
    with quiet():
        module = HFPipelineModule(
            directory,
            num_stages=layout.num_stages,
            workload=workload,
            plan=chosen,
            partition_method=_method(settings),
            objective=settings.section.objective,
            dtype=profile.dtype,
            cluster=_cluster(settings, layout),
            tensor_parallel=layout.tensor_parallel,
            data_parallel=layout.data_parallel,
            head=head,
        )
    engine = build_engine(
        module,
        micro_batch=module.lp_workload.chosen_micro_batch,
        num_micro_batches=settings.num_micro_batches,
        dtype=profile.dtype,
        config={} if config is None else read_config(config),
    )
    engine.module.eval()
    return PipelinedModel(engine)


def _plan(plan: Plan | str | Path | None, settings: Settings, directory: Path, dtype: str | None) -> Plan | None:
    """The caller's plan or that of the section, made for this model."""
    method = settings.method or ""
    if plan is None and method.lower().startswith("plan:"):
        plan = method[len("plan:") :]
    if plan is None:
        return None
    found = plan if isinstance(plan, Plan) else load_plan(plan)
    where = "the plan" if isinstance(plan, Plan) else plan
    if found.weight_dtype is not None or found.workload.phase == "train":
        what = "training" if found.weight_dtype is None else f"weights in {found.weight_dtype}"
        raise PlanFileError(f"{where} was made for {what}, which is not run here; make a plan without, for prefill.")
    profile = ModelProfile.from_config(directory, dtype=dtype, granularity=found.granularity)
    if found.dtype != profile.dtype:
        raise PlanFileError(
            f"{where} was made for {found.dtype}, but the model is to run in {profile.dtype}; "
            f"pass dtype={found.dtype!r}, or make a plan for {profile.dtype}."
        )
    check_model(found, profile.sharded(found.tensor_parallel), where)
    return found


def _method(settings: Settings) -> Literal["profile", "cache-aware"]:
    method = (settings.method or "cache-aware").lower()
    if method == "profile":
        return "profile"
    if method == "cache-aware" or method.startswith("plan:"):
        return "cache-aware"
    raise DeepSpeedConfigError(
        f"lp_plugin.method is {settings.method!r}, which counts layers or parameters; a model from a directory takes "
        '"cache-aware", "profile" or "plan:PATH".'
    )


def _layout(plan: Plan | None, num_stages: int | None, tensor_parallel: int, data_parallel: int) -> Layout:
    """Processes; as many stages as there are processes for, unless something says how many."""
    for name, value in (("num_stages", num_stages), ("tensor_parallel", tensor_parallel)):
        if value is not None and value < 1:
            raise WorkloadError(f"{name} is {value}; it must be at least 1.")
    if data_parallel < 1:
        raise WorkloadError(f"data_parallel is {data_parallel}; it must be at least 1.")
    if plan is not None:
        if num_stages not in {None, plan.num_stages}:
            raise PlanFileError(f"the plan has {plan.num_stages} stages, but num_stages is {num_stages}; leave it out.")
        num_stages = plan.num_stages
        tensor_parallel = plan.tensor_parallel if tensor_parallel == 1 else tensor_parallel
    world = dist.get_world_size()
    if num_stages is None:
        num_stages, rest = divmod(world, tensor_parallel * data_parallel)
        if rest or not num_stages:
            raise WorldSizeError(
                f"{world} processes can't be divided into {data_parallel} replicas of stages of {tensor_parallel} "
                f"processes; start a multiple of {tensor_parallel * data_parallel}."
            )
    return Layout(num_stages=num_stages, tensor_parallel=tensor_parallel, data_parallel=data_parallel)


def _workload(profile: ModelProfile, settings: Settings, layout: Layout, *, given: bool) -> Workload:
    """What to plan for if there is no plan: as configured, else rows of a length that many texts have."""
    section = settings.section
    if section.phase == "train":
        raise DeepSpeedConfigError('lp_plugin.phase is "train"; a loaded model doesn\'t train: prefill or decode.')
    longest = profile.max_positions or _TOKENS
    rows = settings.micro_batch if given else _ROWS
    return Workload(
        phase=section.phase or "prefill",
        batch=rows * _MICRO_BATCHES_PER_STAGE * layout.num_stages,
        sequence=section.sequence if "sequence" in section.model_fields_set else min(longest, _TOKENS),
        micro_batch=rows,
    )


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model was saved with its head: as another class than its family's base model."""
    return MODEL_MAPPING_NAMES.get(config["model_type"]) not in (config.get("architectures") or [])


def _cluster(settings: Settings, layout: Layout) -> Cluster | None:
    """The section's devices; None asks the driver."""
    device = settings.section.device
    if device == "auto":
        return None
    topology = PipeModelDataParallelTopology(
        num_pp=layout.num_stages, num_mp=layout.tensor_parallel, num_dp=layout.data_parallel
    )
    return detected_cluster(topology, device, tensor_parallel=layout.tensor_parallel)
