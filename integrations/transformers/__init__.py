"""Hugging Face transformers: a model as a pipeline of stages.

`load` gives a pipelined model that scores, generates and embeds. Below it, `HFPipelineModule` is a DeepSpeed
PipelineModule over embedding, blocks, final norm and head; every rank builds and loads its own layers only, and runs
them through transformers' own model (`lp_plugin...decoder`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lp_plugin.errors import MissingDependencyError

if TYPE_CHECKING:
    from lp_plugin.integrations.transformers.model import PipelinedModel
    from lp_plugin.plan import Plan

for _name in ("torch", "safetensors", "transformers"):
    if importlib.util.find_spec(_name) is None:
        raise MissingDependencyError(
            f"{_name} is not installed; install it with: pip install 'lp-plugin[transformers]'"
        )

__all__ = ["load"]


def load(
    path: str | Path,
    plan: Plan | str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    num_stages: int | None = None,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    dtype: str | None = None,
) -> PipelinedModel:
    """A pipelined model from a local directory.

    In a process of its own the model is one stage. Under torchrun, deepspeed or srun it has a stage per process (or
    per group of ``tensor_parallel`` processes), and every process calls this and each method alike; results are given
    to all of them.

    Args:
        path: Model directory: config.json, tokenizer, safetensors.
        plan: A plan, or its file: the boundaries to use; it also says how many stages and tensor-parallel processes
            there are. Left out, one is made for the devices found here.
        config: DeepSpeed configuration, its path or contents. Its ``"lp_plugin"`` section says how to plan
            (``cache-aware``, ``profile``, ``plan:PATH``, device, objective, phase, sequence), ``fp16`` or ``bf16``
            the precision, ``train_micro_batch_size_per_gpu`` the rows of a micro-batch. What trains is left out.
        num_stages: Stages; as many as there are processes for, if left out.
        tensor_parallel: Processes that share each stage's layers.
        data_parallel: Replicas of the pipeline, which share the texts of each call.
        dtype: ``float32``, ``float16`` or ``bfloat16``; left out, as in ``config``, else as in the model's config.

    Raises:
        InvalidInputError: One of its kinds, for a wrong model, plan or configuration, or broken weights.
        InfeasibleError: If the model does not fit the devices.
        RuntimeEnvironmentError: If DeepSpeed is missing, the number of processes is wrong, or the precision can't run.

    Example::

        with load("models/llama", num_stages=4) as model:
            print(model.generate(["Once upon a time"], max_new_tokens=20))
    """
    from lp_plugin.job.launch import prepare_environment  # noqa: PLC0415 - imports torch

    prepare_environment(None)  # before DeepSpeed is imported
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError("deepspeed is not installed; install it with: pip install 'lp-plugin[run]'")
    from lp_plugin.integrations.transformers.loading import load_model  # noqa: PLC0415 - imports DeepSpeed

    return load_model(
        Path(path),
        plan,
        config,
        num_stages=num_stages,
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        dtype=dtype,
    )
