"""What a scoring job is: everything checked and tokenized before the first process starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lp_plugin.architecture import read_architecture, read_config
from lp_plugin.errors import DocumentError, PlanFileError, WorkloadError
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.planfile import check_model, load_plan
from lp_plugin.score.documents import TokenizedDocuments, read_documents, tokenize

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
    timeline: Path | None
    """Where the timeline picture goes."""
    report: Path | None
    """Where the figures go as JSON."""
    digest: str
    """Names model, weights, precision and input."""


def prepare(
    directory: str | Path,
    *,
    input_path: str | Path,
    output: str | Path,
    num_stages: int | None,
    plan_path: str | Path | None,
    micro_batch: int | None,
    dtype: str | None,
    timeline: str | Path | None,
    report: str | Path | None,
) -> ScoreJob:
    """Checks everything that can be checked in one process, so that nothing starts in vain.

    Raises:
        InvalidInputError: One of its kinds, for a wrong config, plan, input, number of stages, or missing weights.
    """
    profile = ModelProfile.from_config(directory, dtype=dtype)
    plan = _checked_plan(plan_path, profile, num_stages)
    stages = plan.num_stages if plan is not None else num_stages
    if stages is None:
        raise WorkloadError("neither --stages nor --plan is given; say how many stages the pipeline has.")
    if not 1 <= stages <= profile.num_layers:
        raise WorkloadError(
            f"--stages is {stages}, but {profile.name} has {profile.num_layers} layers (embedding, norm and head "
            f"included) and each stage needs at least one; give 1 to {profile.num_layers}."
        )
    if micro_batch is not None and micro_batch < 1:
        raise WorkloadError(f"--micro-batch is {micro_batch}; it must be at least 1.")
    for path in (output, timeline, report):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise DocumentError(f"{path} can't be written: folder {Path(path).parent} does not exist.")
    read = read_documents(input_path)
    files = _weight_fingerprint(directory)
    architecture = read_architecture(read_config(directory), dtype=dtype)
    documents = tokenize(read, directory, architecture.max_positions, architecture.vocab_size)
    identity = "|".join([profile.digest, profile.dtype, files, documents.digest])
    return ScoreJob(
        directory=Path(directory),
        dtype=profile.dtype,
        num_stages=stages,
        documents=documents,
        plan=plan,
        micro_batch=micro_batch,
        max_positions=architecture.max_positions,
        output=Path(output),
        timeline=None if timeline is None else Path(timeline),
        report=None if report is None else Path(report),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _checked_plan(path: str | Path | None, profile: ModelProfile, num_stages: int | None) -> Plan | None:
    if path is None:
        return None
    plan = load_plan(path)
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
    return plan


def _weight_fingerprint(directory: str | Path) -> str:
    """Names, sizes and times of the weight files: enough to notice that they were replaced."""
    from lp_plugin.integrations.transformers.weights import weight_files  # noqa: PLC0415 - imports torch

    files = sorted(set(weight_files(directory).values()))
    return ";".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
