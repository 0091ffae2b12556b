"""The ``"lp_plugin"`` section of a DeepSpeed JSON configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import hjson
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from lp_plugin.errors import DeepSpeedConfigError
from lp_plugin.files import read_text
from lp_plugin.job.watch.timeout import DEFAULT_TIMEOUT_SECONDS, LEAST_TIMEOUT_SECONDS, MOST_TIMEOUT_SECONDS
from lp_plugin.objective import Objective
from lp_plugin.quantity import said, shown
from lp_plugin.workload import Phase, Workload

__all__ = ["InputSpec", "Section", "Settings", "read_config", "read_settings"]

_MOST_BYTES = 2**18  # of a configuration; real ones have some thousands


class InputSpec(BaseModel):
    """One tensor of the sample that ``profile`` feeds to the first layer."""

    model_config = ConfigDict(extra="forbid")

    shape: Annotated[list[PositiveInt], Field(min_length=1)]
    """Of one micro-batch, the batch dimension first."""
    dtype: Literal["float32", "float16", "bfloat16", "int64"] = "float32"
    """Floating-point values are drawn from a normal distribution, integers from 0 to ``high - 1``."""
    high: PositiveInt = 2
    """One more than the largest integer, e.g. the size of the vocabulary."""


class Section(BaseModel):
    """What a user may write under ``"lp_plugin"``; every key may be left out."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = None
    """``cache-aware``, ``profile``, ``plan:PATH`` or one of DeepSpeed's own; overrides ``partition_method``."""
    plan: str | None = None
    """A plan file; the same as ``"method": "plan:PATH"``."""
    device: str = "auto"
    """``auto`` asks the driver; else a name of the catalogue or a cluster file."""
    objective: Objective = "throughput"
    """``throughput``: slowest stage as fast as possible; ``memory``: fullest device as empty as possible."""
    phase: Phase | None = None
    """Left out: ``train`` if the configuration has an optimizer, else ``prefill``."""
    sequence: PositiveInt = 1
    """Tokens per sample, for FLOPs and for the inferred input."""
    input: list[InputSpec] | InputSpec | None = None
    """What ``profile`` feeds to the first layer; inferred from an embedding or linear layer if left out."""
    timeout: Annotated[float, Field(ge=LEAST_TIMEOUT_SECONDS, le=MOST_TIMEOUT_SECONDS)] = DEFAULT_TIMEOUT_SECONDS
    """Seconds after which a rank that does not move ends the job, under ``lp-plugin launch``."""
    check_finite: bool = False
    """Whether activations and gradients that cross between stages are checked, at the end of each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The section together with what the rest of the configuration says about the workload."""

    section: Section
    """As written."""
    micro_batch: int = 1
    """``train_micro_batch_size_per_gpu``, or what ``train_batch_size`` leaves for one data-parallel replica."""
    num_micro_batches: int = 1
    """``gradient_accumulation_steps``."""
    dtype: str = "float32"
    """From ``fp16`` and ``bf16``."""
    has_optimizer: bool = False
    """Whether the configuration names an optimizer."""
    zero_stage: int = 0
    """``zero_optimization.stage``."""
    checkpointing: bool = False
    """Whether the ``pipeline`` section's ``activation_checkpoint_interval`` is above 0."""
    float32_gradients: bool = False
    """Whether ``data_types.grad_accum_dtype`` is float32, in 16 bits."""

    @property
    def method(self) -> str | None:
        """The method asked for, a plan file included; None leaves it to the script."""
        return f"plan:{self.section.plan}" if self.section.plan is not None else self.section.method

    @property
    def phase(self) -> Phase:
        """The section's phase, or what the optimizer implies."""
        return self.section.phase or ("train" if self.has_optimizer else "prefill")

    def workload(self, phase: Phase, *, data_parallel: int = 1) -> Workload:
        """One batch of one pipeline.

        Args:
            phase: What it is for.
            data_parallel: Replicas of the pipeline.

        Raises:
            DeepSpeedConfigError: If ZeRO is to spread gradients or weights, which a pipeline's can't be.
        """
        training: dict[str, Any] = {}
        if phase == "train":
            if self.zero_stage > 1:
                raise DeepSpeedConfigError(
                    f"zero_optimization.stage is {self.zero_stage}; DeepSpeed's pipelines train with stage 0 or 1 "
                    "(ZeRO-2 and ZeRO-3 spread what a pipeline accumulates or sends); set it to 1."
                )
            training = {
                "zero_stage": self.zero_stage,
                "data_parallel": data_parallel,
                "checkpointing": self.checkpointing,
                "float32_gradients": self.float32_gradients,
            }
        return Workload(
            phase=phase,
            batch=self.micro_batch * self.num_micro_batches,
            sequence=self.section.sequence,
            micro_batch=self.micro_batch,
            **training,
        )


def read_settings(config: str | Path | Mapping[str, Any]) -> Settings:
    """Reads a DeepSpeed configuration, file or dict.

    Raises:
        DeepSpeedConfigError: If the file can't be read, or the section has an unknown key or a wrong value.
    """
    where = "the DeepSpeed configuration" if isinstance(config, Mapping) else str(config)
    content = read_config(config)
    raw = content.get("lp_plugin", {})
    try:
        section = Section.model_validate(raw)
    except ValidationError as error:
        deepest = max(error.errors(), key=lambda each: len(each["loc"]))  # of "input" the form that was meant
        steps = (str(part) for part in deepest["loc"] if part not in {"InputSpec", "list[InputSpec]"})
        named = (step if step.replace("_", "").isalnum() and len(step) <= 80 else shown(step) for step in steps)
        key = ".".join(["lp_plugin", *named])
        known = ", ".join(Section.model_fields)
        raise DeepSpeedConfigError(
            f"{where}: {key} is {shown(deepest['input'])}: {deepest['msg'].lower()}. Known keys: {known}."
        ) from None
    if section.plan is not None and section.method is not None:
        raise DeepSpeedConfigError(f'{where}: lp_plugin has both "plan" and "method"; keep one.')
    return Settings(
        section=section,
        micro_batch=_micro_batch(content, where),
        num_micro_batches=_positive(content, "gradient_accumulation_steps", where),
        dtype=_dtype(content),
        has_optimizer="optimizer" in content,
        zero_stage=_from_zero(content, "zero_optimization", "stage", where),
        checkpointing=_from_zero(content, "pipeline", "activation_checkpoint_interval", where) > 0,
        float32_gradients=_dtype(content) != "float32" and _has_float32_gradients(content),
    )


def read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a DeepSpeed configuration, file or dict.

    Raises:
        DeepSpeedConfigError: If the file can't be read.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        text = read_text(path, _MOST_BYTES, "a configuration has some thousands")
        content = hjson.loads(text, object_pairs_hook=dict)  # as DeepSpeed: with comments
    except FileNotFoundError:
        raise DeepSpeedConfigError(f"{path} does not exist; give the DeepSpeed configuration's path.") from None
    except (OSError, ValueError, ArithmeticError, LookupError, RecursionError) as error:  # hjson is not strict
        raise DeepSpeedConfigError(f"{path} can't be read as JSON: {said(error)}.") from None
    if not isinstance(content, dict):
        raise DeepSpeedConfigError(f"{path} holds a JSON {type(content).__name__}; a configuration is an object.")
    return content


def _micro_batch(content: Mapping[str, Any], where: str) -> int:
    """As DeepSpeed derives it; the number of replicas is not known here and taken as 1."""
    if "train_micro_batch_size_per_gpu" in content:
        return _positive(content, "train_micro_batch_size_per_gpu", where)
    whole = _positive(content, "train_batch_size", where)
    return max(1, whole // _positive(content, "gradient_accumulation_steps", where))


def _positive(content: Mapping[str, Any], key: str, where: str) -> int:
    value = content.get(key, 1)
    if value == "auto":  # Hugging Face's Trainer fills these in later
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DeepSpeedConfigError(f"{where}: {key} is {shown(value)}; it must be a whole number of at least 1.")
    return value


def _from_zero(content: Mapping[str, Any], part: str, key: str, where: str) -> int:
    """A whole number of at least 0 in a part of the configuration; 0 where it is left out."""
    inside = content.get(part)
    value = inside.get(key, 0) if isinstance(inside, Mapping) else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DeepSpeedConfigError(f"{where}: {part}.{key} is {shown(value)}; it must be a whole number of at least 0.")
    return value


def _has_float32_gradients(content: Mapping[str, Any]) -> bool:
    types = content.get("data_types")
    return isinstance(types, Mapping) and types.get("grad_accum_dtype") in {"fp32", "float32", "float", "torch.float32"}


def _dtype(content: Mapping[str, Any]) -> str:
    for key, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")):
        part = content.get(key)
        if isinstance(part, Mapping) and part.get("enabled") is True:
            return dtype
    return "float32"
