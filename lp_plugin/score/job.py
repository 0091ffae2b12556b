"""What a scoring job is: everything checked and tokenized before the first process starts."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from lp_plugin.errors import DocumentError
from lp_plugin.hardware import Cluster
from lp_plugin.job.checks import (
    check_at_least_one,
    check_buildable,
    check_replicas,
    check_writable,
    checked_architecture,
    checked_cluster,
    checked_layout,
    checked_plan,
    model_fingerprint,
)
from lp_plugin.job.documents import TokenizedDocuments, read_documents, tokenize
from lp_plugin.job.layout import Layout
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan

__all__ = ["ScoreJob", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """All that a rank needs; travels to the processes as it is."""

    directory: Path
    """Model directory."""
    dtype: str
    """Precision to run in."""
    layout: Layout
    """Processes."""
    documents: TokenizedDocuments
    """All documents, tokenized."""
    plan: Plan | None
    """Boundaries to use; None plans from timed layers."""
    micro_batch: int | None
    """Documents of the longest length per micro-batch; None leaves it to the plan or planner."""
    max_positions: int
    """Longest row; without a limit the largest number."""
    output: Path
    """Where the scores go."""
    cluster: Cluster | None
    """Devices and links to plan for; None asks the driver."""
    check_finite: bool
    """Whether what crosses between stages is checked."""
    digest: str
    """Names configuration, weights, precision and input."""


def prepare(
    directory: str | Path,
    *,
    input_path: str | Path,
    output: str | Path,
    num_stages: int | None,
    tensor_parallel: int | None,
    data_parallel: int,
    plan_path: str | Path | None,
    micro_batch: int | None,
    dtype: str | None,
    cluster: str | None,
    timeline: str | Path | None,
    report: str | Path | None,
    check_finite: bool,
) -> ScoreJob:
    """Checks everything that can be checked in one process, so that nothing starts in vain.

    Raises:
        InvalidInputError: One of its kinds, for a wrong config, plan, input, number of stages, or missing weights.
    """
    profile = ModelProfile.from_config(directory, dtype=dtype)
    architecture = checked_architecture(directory, profile)
    plan = checked_plan(plan_path, directory, dtype=profile.dtype, tensor_parallel=tensor_parallel, phase="prefill")
    layout = checked_layout(
        plan, profile, num_stages=num_stages, tensor_parallel=tensor_parallel, data_parallel=data_parallel
    )
    check_at_least_one("--micro-batch", micro_batch)
    check_writable(input_path, output, timeline, report)
    if timeline is not None and Path(timeline).suffix not in {".png", ".svg", ".pdf"}:
        raise DocumentError(f"--timeline {timeline}: pictures end in .png, .svg or .pdf.")
    read = read_documents(input_path)
    check_replicas(layout, len(read), "documents")
    model = model_fingerprint(directory, profile.dtype)
    documents = tokenize(read, directory, architecture.max_positions, architecture.vocab_size)
    check_buildable(
        directory,
        profile.dtype,
        halves=plan is not None and plan.granularity == "sublayer",
        tensor_parallel=layout.tensor_parallel,
    )
    return ScoreJob(
        directory=Path(directory),
        dtype=profile.dtype,
        layout=layout,
        documents=documents,
        plan=plan,
        micro_batch=micro_batch,
        max_positions=architecture.max_positions or sys.maxsize,
        output=Path(output),
        cluster=checked_cluster(cluster, layout),
        check_finite=check_finite,
        digest=hashlib.sha256(f"{model}|{documents.digest}".encode()).hexdigest(),
    )
