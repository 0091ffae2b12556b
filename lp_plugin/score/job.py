"""What a scoring job is: everything checked and tokenized before the first process starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lp_plugin.errors import (
    DocumentError,
    LpPluginError,
    ModelConfigError,
    PlanFileError,
    RuntimeEnvironmentError,
    WorkloadError,
)
from lp_plugin.hardware import Cluster
from lp_plugin.job.documents import TokenizedDocuments, read_documents, tokenize
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import read_config
from lp_plugin.plan import Plan
from lp_plugin.planfile import check_model, load_plan

__all__ = ["ScoreJob", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """All that a rank needs; travels to the processes as it is."""

    directory: Path
    """Model directory."""
    dtype: str
    """Precision to run in."""
    num_stages: int
    """Stages, and processes."""
    documents: TokenizedDocuments
    """All documents, tokenized."""
    plan: Plan | None
    """Boundaries to use; None plans from timed layers."""
    micro_batch: int | None
    """Documents of the longest length per micro-batch; None leaves it to the plan or planner."""
    max_positions: int
    """Longest row."""
    output: Path
    """Where the scores go."""
    cluster: Cluster | None
    """Devices and links to plan for; None asks the driver."""
    digest: str
    """Names configuration, weights, precision and input."""


def prepare(
    directory: str | Path,
    *,
    input_path: str | Path,
    output: str | Path,
    num_stages: int | None,
    plan_path: str | Path | None,
    micro_batch: int | None,
    dtype: str | None,
    cluster: str | None,
    timeline: str | Path | None,
    report: str | Path | None,
) -> ScoreJob:
    """Checks everything that can be checked in one process, so that nothing starts in vain.

    Raises:
        InvalidInputError: One of its kinds, for a wrong config, plan, input, number of stages, or missing weights.
    """
    profile = ModelProfile.from_config(directory, dtype=dtype)
    vocab_size, max_positions = _checked_family(directory, profile)
    plan = _checked_plan(plan_path, profile, num_stages)
    stages = _checked_stages(num_stages if plan is None else plan.num_stages, profile)
    if micro_batch is not None and micro_batch < 1:
        raise WorkloadError(f"--micro-batch is {micro_batch}; it must be at least 1.")
    _check_writable(input_path, output, timeline, report)
    read = read_documents(input_path)
    files = _weight_fingerprint(directory)
    documents = tokenize(read, directory, max_positions, vocab_size)
    _check_buildable(directory, profile.dtype)
    config = json.dumps(read_config(directory), sort_keys=True)
    identity = "|".join([config, profile.dtype, files, documents.digest])
    return ScoreJob(
        directory=Path(directory),
        dtype=profile.dtype,
        num_stages=stages,
        documents=documents,
        plan=plan,
        micro_batch=micro_batch,
        max_positions=max_positions,
        output=Path(output),
        cluster=None if cluster is None else Cluster.parse(cluster).subset(stages),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _checked_family(directory: str | Path, profile: ModelProfile) -> tuple[int, int]:
    """Size of the vocabulary and longest row of a model that stages can be built of."""
    from lp_plugin.integrations.transformers.runnable import check_runnable  # noqa: PLC0415 - looks for torch

    check_runnable(read_config(directory))
    architecture = profile.architecture
    if architecture is None or architecture.max_positions is None:
        raise ModelConfigError(f"{directory} has no limit to the length of a row; documents can't be cut to it.")
    return architecture.vocab_size, architecture.max_positions


def _checked_stages(stages: int | None, profile: ModelProfile) -> int:
    if stages is None:
        raise WorkloadError("neither --stages nor --plan is given; say how many stages the pipeline has.")
    if not 1 <= stages <= profile.num_layers:
        raise WorkloadError(
            f"--stages is {stages}, but {profile.name} has {profile.num_layers} layers (embedding, norm and head "
            f"included) and each stage needs at least one; give 1 to {profile.num_layers}."
        )
    return stages


def _check_buildable(directory: str | Path, dtype: str) -> None:
    """Lets transformers build one block without memory: what it refuses, the ranks need not find out."""
    import torch  # noqa: PLC0415 - seconds to import
    from transformers import AutoConfig  # noqa: PLC0415

    from lp_plugin.integrations.transformers.decoder import DecoderStage  # noqa: PLC0415

    if dtype == "float16" and not torch.cuda.device_count():
        raise RuntimeEnvironmentError("float16 needs a GPU: CPUs compute it too slowly to use; add --dtype float32.")
    try:
        DecoderStage(AutoConfig.from_pretrained(str(directory), local_files_only=True), 0, 2)
    except LpPluginError:
        raise
    except Exception as error:  # noqa: BLE001 - a value that a config class or a layer can't use raises anything
        raise ModelConfigError(
            f"transformers can't build the model in {directory}: {type(error).__name__}: {error}. Correct its config."
        ) from None


def _check_writable(
    input_path: str | Path, output: str | Path, timeline: str | Path | None, report: str | Path | None
) -> None:
    """Refuses files that could not be written when the work is done."""
    for path in (output, timeline, report):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise DocumentError(f"{path} can't be written: folder {Path(path).parent} does not exist.")
        if path is not None and Path(path).is_dir():
            raise DocumentError(f"{path} can't be written: it is a folder; give the name of a file.")
    if Path(output).resolve() == Path(input_path).resolve():
        raise DocumentError(f"--output {output} would replace the input; give another name.")
    if timeline is not None and Path(timeline).suffix not in {".png", ".svg", ".pdf"}:
        raise DocumentError(f"--timeline {timeline}: pictures end in .png, .svg or .pdf.")


def _checked_plan(path: str | Path | None, profile: ModelProfile, num_stages: int | None) -> Plan | None:
    if path is None:
        return None
    plan = load_plan(path)
    _check_runnable(plan, path)
    check_model(plan, profile, path)
    if num_stages is not None and num_stages != plan.num_stages:
        raise PlanFileError(
            f"{path} has {plan.num_stages} stages, but --stages is {num_stages}; leave --stages out, "
            f"or make a plan with --stages {num_stages}."
        )
    if plan.dtype != profile.dtype:
        raise PlanFileError(
            f"{path} was made for {plan.dtype}, but the job runs in {profile.dtype}; "
            f"add --dtype {plan.dtype}, or make a plan for {profile.dtype}."
        )
    if plan.workload.phase != "prefill":
        raise PlanFileError(f"{path} was made for {plan.workload.phase}, but scoring is prefill; make a plan for that.")
    return plan


def _check_runnable(plan: Plan, path: str | Path) -> None:
    """Refuses plans that a run can't carry out: whole blocks on single devices, with weights as the model has them."""
    options = {
        "--granularity sublayer": any(layer.kind in {"attention", "mlp"} for layer in plan.layers),
        "--tensor-parallel": plan.tensor_parallel > 1,
        "--weights": plan.weight_dtype is not None,
    }
    for option, used in options.items():
        if used:
            raise PlanFileError(
                f"{path} was made with {option}, which a run can't carry out; make a plan without it, or export it "
                "to an engine that can."
            )


def _weight_fingerprint(directory: str | Path) -> str:
    """Names, sizes and times of the weight files: enough to notice that they were replaced."""
    from lp_plugin.integrations.transformers.weights import weight_files  # noqa: PLC0415 - imports torch

    files = sorted(set(weight_files(directory).values()))
    return ";".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
