"""`Plan` <-> JSON: a schema version, digests, every invariant checked on the way in."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError

from lp_plugin.errors import PlanFileError, WorkloadError
from lp_plugin.files import parse_json, read_text, write_atomically
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import DTYPE_BYTES
from lp_plugin.objective import Constraints, Objective
from lp_plugin.plan import LayerFootprint, Plan, Stage
from lp_plugin.quantity import is_plain, shown
from lp_plugin.workload import Workload

__all__ = ["SCHEMA_VERSION", "check_model", "load_plan", "save_plan"]

SCHEMA_VERSION = 2
"""Raised when a field changes its meaning."""

_MOST_BYTES = 16 * 2**20  # of a file; a plan of 10,000 layers in 1,000 stages has 5 MB
_MOST_VALUES = 300_000  # in it; of that plan 120,000
_MOST_PROBLEMS = 1000  # that are made into messages, of which one is shown


def _writable(text: str) -> str:
    if not is_plain(text):
        raise PlanFileError("control characters and half characters can't be shown")  # pydantic adds the field
    return text


Text = Annotated[str, AfterValidator(_writable)]
Count = Annotated[int, Field(ge=0, le=10**30)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Layer(_Strict):
    name: Text
    kind: Text
    block: Count | None
    weight_bytes: Count
    activation_bytes: Count
    kv_bytes: Count
    buffer_bytes: Count


class _Stage(_Strict):
    start: Count
    stop: Count
    layers: Annotated[list[Text], FailFast()]
    device: Text
    tier: Text
    weight_bytes: Count
    kv_bytes: Count
    activation_bytes: Count
    buffer_bytes: Count
    training_bytes: Count
    working_set_bytes: Count
    capacity_bytes: Annotated[Count, Field(ge=1)]
    reserved_bytes: Count
    max_sequences: Count | None
    hit_fraction: Annotated[float, Field(ge=0, le=1)]
    traffic_bytes: Count
    compute_seconds: Seconds
    resident_seconds: Seconds
    transfer_seconds: Seconds


class _Workload(_Strict):
    phase: Literal["prefill", "decode", "train"]
    batch: int
    sequence: int
    micro_batch: int
    checkpointing: bool
    zero_stage: int
    data_parallel: int
    float32_gradients: bool = False


class _Constraints(_Strict):
    max_latency_seconds: float | None
    min_tokens_per_second: float | None
    min_sequences: int | None
    max_memory_bytes: int | None
    tier: Text | None


class _PlanFile(_Strict):
    schema_version: int
    model_name: Text
    model_type: Text | None
    dtype: Text
    weight_dtype: Text | None
    workload: _Workload
    objective: Objective | None
    constraints: _Constraints
    tensor_parallel: Annotated[Count, Field(ge=1)]
    boundaries: Annotated[list[Count], FailFast()]
    stages: Annotated[list[_Stage], FailFast()]
    layers: Annotated[list[_Layer], FailFast()]
    lower_bound_seconds: Seconds
    uniform_seconds: Seconds | None
    notes: Annotated[list[Text], FailFast(), Field(max_length=1000)]
    model_digest: Digest
    cluster_digest: Digest
    workload_digest: Digest


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan as JSON; the file appears whole or not at all.

    Raises:
        PlanFileError: If the file can't be written.
    """
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(plan)}
    try:
        write_atomically(Path(path), json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise PlanFileError(f"the plan can't be written to {path}: {error.strerror or error}.") from None


def load_plan(path: str | Path) -> Plan:
    """Reads a plan and checks everything that can be checked without the model.

    Raises:
        PlanFileError: If it is missing, truncated, of another schema, or contradicts itself.
    """
    file = Path(path)
    raw = _read(file)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise PlanFileError(
            f"{file} has schema version {shown(version)}; this lp_plugin reads {SCHEMA_VERSION}. Make the plan again."
        )
    try:
        parsed = _PlanFile.model_validate(raw)
    except ValidationError as error:
        if error.error_count() > _MOST_PROBLEMS:
            raise PlanFileError(f"{file}: {error.error_count():,} values are wrong. Make the plan again.") from None
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "a key"
        where = where if where.isprintable() and len(where) <= 80 else shown(where)
        raise PlanFileError(f"{file}: {where}: {first['msg'].lower()}. Make the plan again.") from None
    plan = _to_plan(parsed, file)
    _check_consistency(plan, file)
    return plan


def _read(file: Path) -> Any:
    """What the JSON holds."""
    try:
        text = read_text(file, _MOST_BYTES, "make the plan again")
    except FileNotFoundError:
        raise PlanFileError(f"{file} does not exist; make it with 'lp-plugin plan MODEL -o {file}'.") from None
    except (OSError, ValueError) as error:  # no UTF-8, or no path at all
        raise PlanFileError(f"{file} can't be read: {error}.") from None
    try:
        return parse_json(text, _MOST_VALUES)
    except ValueError as error:
        raise PlanFileError(f"{file} is not valid JSON ({error}); is it truncated? Make the plan again.") from None


def check_model(plan: Plan, profile: ModelProfile, path: str | Path) -> None:
    """Refuses a plan that was made for another model.

    Raises:
        PlanFileError: Naming both models.
    """
    if plan.model_digest != profile.digest:
        raise PlanFileError(
            f"{path} was made for {plan.model_name} ({len(plan.layers)} layers, model digest "
            f"{plan.model_digest[:12]}), not for {profile.name} ({profile.num_layers} layers, "
            f"{profile.digest[:12]}). Make a plan for this model."
        )


def _to_plan(parsed: _PlanFile, file: Path) -> Plan:
    fields: dict[str, Any] = parsed.model_dump(exclude={"schema_version"})
    try:
        workload = Workload(**fields.pop("workload"))
        constraints = Constraints(**fields.pop("constraints"))
    except WorkloadError as error:
        raise PlanFileError(f"{file}: workload or constraints: {error}") from None
    stages = tuple(Stage(**{**stage, "layers": tuple(stage["layers"])}) for stage in fields.pop("stages"))
    layers = tuple(LayerFootprint(**layer) for layer in fields.pop("layers"))
    boundaries, notes = tuple(fields.pop("boundaries")), tuple(fields.pop("notes"))
    return Plan(
        workload=workload,
        constraints=constraints,
        stages=stages,
        layers=layers,
        boundaries=boundaries,
        notes=notes,
        **fields,
    )


def _check_consistency(plan: Plan, file: Path) -> None:
    count = len(plan.layers)
    bounds = plan.boundaries
    rising = all(low < high for low, high in itertools.pairwise(bounds))
    if len(bounds) < 2 or not rising or bounds[0] != 0 or bounds[-1] != count:
        raise PlanFileError(
            f"{file}: boundaries {shown(list(bounds))} must rise from 0 to {count}, the number of layers."
        )
    spans = tuple((stage.start, stage.stop) for stage in plan.stages)
    if spans != tuple(itertools.pairwise(bounds)):
        raise PlanFileError(
            f"{file}: stages cover {shown(list(spans))}, which contradicts boundaries {shown(list(bounds))}."
        )
    if not math.isfinite(plan.makespan_seconds):
        raise PlanFileError(f"{file}: the stages' seconds add up to no finite number. Make the plan again.")
    for index, stage in enumerate(plan.stages):
        names = tuple(layer.name for layer in plan.layers[stage.start : stage.stop])
        if stage.layers != names:
            raise PlanFileError(
                f"{file}: stages.{index}.layers are {shown(list(stage.layers))}, which contradicts layers: "
                f"{shown(list(names))}. Make the plan again."
            )
    if plan.lower_bound_seconds > plan.bottleneck_seconds:
        raise PlanFileError(
            f"{file}: lower_bound_seconds is {plan.lower_bound_seconds}, more than the slowest stage's "
            f"{plan.bottleneck_seconds}. Make the plan again."
        )
    if plan.workload.digest != plan.workload_digest:
        raise PlanFileError(f"{file}: the workload was edited (workload_digest differs). Make the plan again.")
    if plan.dtype not in DTYPE_BYTES:
        raise PlanFileError(f"{file}: dtype is {shown(plan.dtype)}; known are {', '.join(sorted(DTYPE_BYTES))}.")
