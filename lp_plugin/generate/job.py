"""What a generating job is: everything checked and tokenized before the first process starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lp_plugin.errors import DocumentError, RuntimeEnvironmentError, WorkloadError
from lp_plugin.generate.settings import check_seed, checked_settings, settings_key
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
from lp_plugin.job.documents import TokenizedDocuments, check_characters, read_documents, tokenize
from lp_plugin.job.layout import Layout
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan

__all__ = ["GenerateJob", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateJob:
    """All that a rank needs; travels to the processes as it is."""

    directory: Path
    """Model directory."""
    dtype: str
    """Precision to run in."""
    layout: Layout
    """Processes."""
    prompts: TokenizedDocuments
    """All prompts, tokenized."""
    plan: Plan | None
    """Boundaries to use; None makes a plan on the ranks' devices."""
    micro_batch: int | None
    """Prompts per slot; None leaves it to the planner."""
    settings: Any
    """transformers' GenerationConfig, with the most new tokens."""
    seed: int
    """Of the first prompt; each further prompt's is one more."""
    cluster: Cluster | None
    """Devices and links of one pipeline to plan for; None asks the driver."""
    compiled: bool
    """Whether GPUs run decode passes through ``torch.compile``."""
    stream: bool
    """Whether texts are printed as they come."""
    output: Path
    """Where the results go."""
    digest: str
    """Names configuration, weights, precision, prompts and how tokens are chosen."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens for each prompt."""
        return int(self.settings.max_new_tokens)


def prepare(
    directory: str | Path,
    *,
    prompts_path: str | Path,
    output: str | Path,
    max_new_tokens: int,
    num_stages: int | None,
    plan_path: str | Path | None,
    micro_batch: int | None,
    dtype: str | None,
    cluster: str | None,
    tensor_parallel: int | None,
    data_parallel: int,
    sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    compiled: bool,
    report: str | Path | None,
    stream: bool,
) -> GenerateJob:
    """Checks everything that can be checked in one process, so that nothing starts in vain.

    Raises:
        InvalidInputError: One of its kinds, for a wrong config, plan, input, option, or missing weights.
        RuntimeEnvironmentError: If this machine can't run the precision.
    """
    profile = ModelProfile.from_config(directory, dtype=dtype)
    architecture = checked_architecture(directory, profile)
    plan = checked_plan(plan_path, directory, dtype=profile.dtype, tensor_parallel=tensor_parallel, phase="decode")
    layout = checked_layout(
        plan, profile, num_stages=num_stages, tensor_parallel=tensor_parallel, data_parallel=data_parallel
    )
    check_at_least_one("--micro-batch", micro_batch)
    if stream and data_parallel > 1:
        raise WorkloadError(f"--stream follows one pipeline, but --data-parallel is {data_parallel}; leave one out.")
    if compiled and not torch.cuda.device_count():
        raise RuntimeEnvironmentError("--compile needs a GPU: only there decode passes are captured; leave it out.")
    check_seed(seed, "--seed")
    check_writable(prompts_path, output, report)
    read = read_documents(prompts_path)
    check_replicas(layout, len(read), "prompts")
    model = model_fingerprint(directory, profile.dtype)
    settings = checked_settings(
        directory, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature, top_k=top_k, top_p=top_p
    )
    if architecture.max_positions is not None:
        check_characters(read, architecture.max_positions)
    prompts = tokenize(read, directory, None, architecture.vocab_size)
    _check_lengths(prompts, max_new_tokens, architecture.max_positions)
    check_buildable(
        directory,
        profile.dtype,
        halves=plan is not None and plan.granularity == "sublayer",
        tensor_parallel=layout.tensor_parallel,
    )
    identity = "|".join([model, prompts.digest, settings_key(settings, seed)])
    return GenerateJob(
        directory=Path(directory),
        dtype=profile.dtype,
        layout=layout,
        prompts=prompts,
        plan=plan,
        micro_batch=micro_batch,
        settings=settings,
        seed=seed,
        cluster=checked_cluster(cluster, layout),
        compiled=compiled,
        stream=stream,
        output=Path(output),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _check_lengths(prompts: TokenizedDocuments, max_new_tokens: int, max_positions: int | None) -> None:
    """Refuses prompts without a token, and those that leave no room for the new ones."""
    shortest, longest = int(np.argmin(prompts.lengths)), int(np.argmax(prompts.lengths))
    if not prompts.lengths[shortest]:
        raise DocumentError(
            f"prompt {prompts.ids[shortest]!r} has no token, so there is nothing to go on from; "
            "give it a text, or leave it out."
        )
    tokens = int(prompts.lengths[longest])
    if max_positions is not None and tokens + max_new_tokens > max_positions:
        remedy = f"lower --max-new-tokens to {max_positions - tokens}" if tokens < max_positions else "shorten it"
        raise WorkloadError(
            f"prompt {prompts.ids[longest]!r} has {tokens} tokens, and {max_new_tokens} new ones make "
            f"{tokens + max_new_tokens}, but the model allows {max_positions} (max_position_embeddings); {remedy}."
        )
