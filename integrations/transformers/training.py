"""Training a Hugging Face model as a DeepSpeed pipeline.

The layer list is flat, as DeepSpeed sees it: every layer is a submodule under its number, tied embeddings are
DeepSpeed's tied modules. So parameters' names and the files of a checkpoint (``layer_07-...``) say nothing of the cut,
and what one partition saved, another one loads. What runs is one `DecoderStage` that holds the same parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from deepspeed.checkpoint.constants import (
    PIPELINE_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from lp_plugin.errors import DeepSpeedConfigError, PlanFileError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.config import read_settings
from lp_plugin.integrations.deepspeed.methods import detected_cluster
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.initialize import initialize_stage
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule
from lp_plugin.integrations.transformers.runnable import check_runnable
from lp_plugin.integrations.transformers.save import save_model
from lp_plugin.integrations.transformers.weights import is_tied
from lp_plugin.plan import Plan
from lp_plugin.planfile import load_plan
from lp_plugin.solver.solve import evaluate

__all__ = ["HFTrainingModule", "causal_loss"]

_TIED = "embedding"
"""Key of the tied matrix; its parameter is ``tied_modules.embedding.weight`` on every stage that holds it."""


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token given those before it, in float32; transformers' own.

    Args:
        logits: [batch, sequence, vocabulary].
        labels: int64 [batch, sequence]: the input tokens, not shifted; -100 where none is to be predicted.

    Returns:
        The mean over the micro-batch's predicted tokens. DeepSpeed takes the mean over micro-batches.
    """
    return cast(torch.Tensor, ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1]))


class HFTrainingModule(HFPipelineModule):
    """A model to be trained by ``PipelineEngine.train_batch``, partitioned by its memory and time in training.

    Micro-batches are ``(tokens, labels)``, int64 [rows, sequence] each, all of one shape.

    Args:
        directory: Model directory; ``config.json`` alone will do with ``seed``.
        num_stages: Stages; the other processes are replicas of the pipeline, as in DeepSpeed.
        config: The engine's DeepSpeed configuration, path or contents: micro-batches, precision, ZeRO stage and
            activation checkpointing are planned for as it says; its ``"lp_plugin"`` section counts as for any
            PipelineModule, ``sequence`` and ``method`` before the arguments here.
        sequence: Tokens of a row.
        plan: Boundaries to use, between layers; None lets ``partition_method`` decide.
        partition_method: ``cache-aware``, ``profile`` (times layers, forward and backward), ``plan:PATH``, or one of
            DeepSpeed's own, such as ``parameters``, which may choose what doesn't fit.
        seed: Weights are initialised from this number instead of loaded.
        cluster: Devices and links of one pipeline; None asks the driver, or takes those of the section.
        loss_fn: Of the last stage's logits and the labels.

    Attributes:
        lp_plan: Its boundaries, times and memory as predicted for training.
        lp_workload: What was planned for.

    Raises:
        DeepSpeedConfigError: If the configuration is wrong, or asks for ZeRO-2 or 3.
        WorldSizeError: If the stages don't divide the processes.
        PlanFileError: If the plan has another number of layers or stages, or cuts blocks into halves.
        UnsupportedModelError, WeightsError, WorkloadError, InfeasibleError: From building, loading, planning.
    """

    universal_checkpoint_info: dict[str, Any]
    """What DeepSpeed's converter of checkpoints has to know."""

    def __init__(
        self,
        directory: str | Path,
        *,
        num_stages: int,
        config: str | Path | Mapping[str, Any],
        sequence: int = 1024,
        plan: Plan | None = None,
        partition_method: str = "cache-aware",
        seed: int | None = None,
        cluster: Cluster | None = None,
        loss_fn: Callable[[torch.Tensor, Any], torch.Tensor] = causal_loss,
    ) -> None:
        settings = read_settings(config)
        section = settings.section
        if section.phase not in {None, "train"}:
            raise DeepSpeedConfigError(f'lp_plugin.phase is "{section.phase}"; this module trains: leave it out.')
        if "sequence" not in section.model_fields_set:
            section = section.model_copy(update={"sequence": sequence})
        plain = section.model_copy(update={"method": None, "plan": None})  # chosen here, and then by no one else
        self.lp_settings = dataclasses.replace(settings, section=plain)
        self._lp_seed = seed
        data_parallel = max(torch.distributed.get_world_size() // num_stages, 1)
        model = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        check_runnable(model.to_dict())
        self._lp_tied = bool(model.tie_word_embeddings) if seed is not None else is_tied(model, directory)
        method = "" if plan is not None else settings.method or partition_method
        if method.lower().startswith("plan:"):
            plan = load_plan(method[len("plan:") :])
        if plan is not None and plan.granularity != "layer":
            raise PlanFileError("the plan cuts blocks into halves, which training does not; plan whole blocks.")
        super().__init__(
            directory,
            num_stages=num_stages,
            workload=self.lp_settings.workload("train", data_parallel=data_parallel),
            plan=plan,
            partition_method=cast(Literal["profile", "cache-aware"], method),
            objective=section.objective,
            dtype=settings.dtype,
            cluster=cluster,
            loss_fn=loss_fn,
            data_parallel=data_parallel,
        )

    def forward(self, value: Any) -> Any:
        """This rank's layers; blocks are checkpointed if ``activation_checkpoint_interval`` is above 0."""
        return self.stage(value)

    def train(self, mode: bool = True) -> HFTrainingModule:
        """Also the parts of the stage that have no parameters, such as dropout."""
        super().train(mode)
        if "stage" in self.__dict__:
            self.stage.train(mode)
        return self

    def save(self, directory: str | Path) -> None:
        """Writes the weights as a Hugging Face directory, with the tokenizer of the one that was read.

        Collective: every process calls it, on a file system that all share.

        Args:
            directory: Where to; must not exist yet, or be empty.

        Raises:
            InvalidInputError: If the directory has contents.
            RuntimeEnvironmentError: If a process can't write; names it. All processes raise.
        """
        here = self._topo.get_coord(self.global_rank)
        save_model(
            self.stage,
            directory,
            source=self.directory,
            part=here.pipe,
            num_parts=self.num_stages,
            replica=here.data,
        )

    def _specs(self) -> list[LayerSpec]:
        last = self.lp_profile.num_layers - 1
        return [
            TiedLayerSpec(_TIED, DecoderStage, self.hf_config, index, index + 1)
            if self._lp_tied and index in {0, last}
            else LayerSpec(DecoderStage, self.hf_config, index, index + 1)
            for index in range(last + 1)
        ]

    def _check_files(self, head: bool) -> None:
        if self._lp_seed is None:
            super()._check_files(head)

    def _load(self, stage: DecoderStage) -> None:
        stage.tied = self._lp_tied
        if self._lp_seed is None:
            super()._load(stage)
        else:
            initialize_stage(stage, self.device, self.torch_dtype, self._lp_seed)

    def _partition_layers(self, method: str = "cache-aware") -> None:
        self.lp_cluster = self._lp_wanted_cluster or detected_cluster(self._topo, self.lp_settings.section.device)
        if self._lp_given is None and method.lower() in {"cache-aware", "profile"}:
            self.lp_plan = self._new_plan(method.lower())
        elif self._lp_given is None:
            PipelineModule._partition_layers(self, method)
            self.lp_plan = evaluate(self.lp_profile, self.lp_cluster, self.lp_workload, self.parts)
        else:
            self.lp_plan = self._evaluated(self._lp_given)
        self._settle()

    def _build(self) -> None:
        stage = self._make_stage(self._local_start, self._local_stop)
        self._load(stage)
        stage.requires_grad_(True)
        self.__dict__["stage"] = stage  # not a submodule: its parameters have their names by layer
        if self._lp_tied and (stage.has_embedding or stage.has_head):
            table = stage.model.get_input_embeddings() if stage.has_embedding else stage.model.get_output_embeddings()
            self.tied_modules[_TIED] = nn.Module()
            self.tied_modules[_TIED].register_parameter("weight", table.weight)
            self.tied_weight_attrs[_TIED] = ["weight"]
        for index in range(self._local_start, self._local_stop):
            self.fwd_map[str(index)] = len(self.forward_funcs)
            self.forward_funcs.append(self._layer(stage, index))
            self.add_module(str(index), self.forward_funcs[-1])
        for name, parameter in self.named_parameters():
            parameter.ds_pipe_replicated = False
            # without ZeRO, DeepSpeed's clipping else takes the norm of the first stage's gradients for that of all
            parameter.model_parallel = stage.has_embedding or not name.startswith("tied_modules.")
        self.universal_checkpoint_info = {
            UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE,
            PIPELINE_REPLICATED_PARAMETER_PATTERNS: [rf"tied_modules\.{_TIED}\."],
        }

    def _layer(self, stage: DecoderStage, index: int) -> nn.Module:
        """What a layer's parameters lie in: a block, or the modules that hold those of embedding, norm or head."""
        layer = self.lp_profile.layers[index]
        blocks = stage.model.get_submodule(stage.blocks_name)
        if layer.block is not None:
            return cast(nn.Module, blocks[layer.block - stage.first_block])
        alone = DecoderStage(self.hf_config, index, index + 1).model
        names = [name for name, module in alone.named_modules() if any(True for _ in module.parameters(recurse=False))]
        return nn.ModuleDict({name.rpartition(".")[2]: stage.model.get_submodule(name) for name in names})

    def _precompute_checkpointable_values(self) -> None:
        """Called by DeepSpeed whenever the interval may have changed."""
        for module in self.stage.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = self.activation_checkpoint_interval > 0
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
