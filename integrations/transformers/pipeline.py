"""A Hugging Face decoder as a DeepSpeed PipelineModule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from transformers import AutoConfig

from lp_plugin.errors import InfeasibleError, PlanFileError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.methods import detected_cluster, timed_profile, timing_share
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.weights import load_stage
from lp_plugin.model import ModelProfile
from lp_plugin.plan import Plan
from lp_plugin.planner import make_plan
from lp_plugin.report import as_text, stage_table
from lp_plugin.solver.solve import evaluate, fits
from lp_plugin.workload import Workload

__all__ = ["HFPipelineModule"]


class HFPipelineModule(PipelineModule):
    """Embedding, blocks, final norm and head of a decoder, one stage per rank; weights of its own stage only.

    The layer list is flat for partitioning; building makes one `DecoderStage` for the rank's range.

    Args:
        directory: Model directory with ``config.json`` and safetensors.
        num_stages: Stages; the world size is a multiple of it.
        workload: What the plan is made for, and the shape that layers are timed on; without a micro-batch the
            planner chooses one from the catalogue's figures.
        plan: Boundaries to use; None times the layers on the real devices and plans from that.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None takes the config's.
        cluster: Devices and links to plan for, one per stage; None asks the driver on every rank.
        loss_fn: What the last stage computes from logits and labels.

    Attributes:
        lp_plan: The plan that was used.
        lp_workload: The workload, its micro-batch chosen unless a plan was given.

    Raises:
        PlanFileError: If the plan has other numbers of layers or stages.
        UnsupportedModelError, WeightsError, InfeasibleError: From building, loading, planning.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        num_stages: int,
        workload: Workload,
        plan: Plan | None = None,
        dtype: str | None = None,
        cluster: Cluster | None = None,
        loss_fn: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.hf_config = AutoConfig.from_pretrained(self.directory, local_files_only=True)
        self.lp_profile = ModelProfile.from_config(self.directory, dtype=dtype)
        self.lp_workload = workload
        self._lp_given = plan
        self._lp_cluster = cluster
        count = num_layers(self.hf_config)
        specs = [LayerSpec(DecoderStage, self.hf_config, index, index + 1) for index in range(count)]
        super().__init__(specs, num_stages=num_stages, loss_fn=loss_fn)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of weights and activations."""
        return getattr(torch, self.lp_profile.dtype)

    def _partition_layers(self, method: str = "uniform") -> None:
        cluster = self._lp_cluster or detected_cluster(self, "auto")
        given = self._lp_given
        plan = self._plan_from_timings(cluster) if given is None else self._checked(given, cluster)
        self.lp_plan = plan
        self.parts = list(plan.boundaries)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _checked(self, plan: Plan, cluster: Cluster) -> Plan:
        """The plan, predicted again for these devices if it was made for others; refused if it can't hold the rows."""
        if len(plan.layers) != len(self._layer_specs) or plan.num_stages != self.num_stages:
            raise PlanFileError(
                f"the plan has {len(plan.layers)} layers in {plan.num_stages} stages, the model "
                f"{len(self._layer_specs)} in {self.num_stages}; make a plan for this model and these stages."
            )
        here = evaluate(self.lp_profile, cluster, self.lp_workload, plan.boundaries)
        if not fits(here):
            raise InfeasibleError(
                f"with rows of {self.lp_workload.sequence} tokens, {self.lp_workload.micro_batch} per micro-batch, "
                "the plan's stages don't fit these devices; plan for this sequence, or lower --micro-batch.",
                table=as_text(stage_table(here)),
            )
        made_for = [stage.device for stage in plan.stages]
        return plan if made_for == [stage.device for stage in here.stages] else here

    def _build(self) -> None:
        stage = DecoderStage(self.hf_config, self._local_start, self._local_stop)
        load_stage(stage, self.directory, self._device(), self.torch_dtype)
        stage.eval()
        self.forward_funcs.append(stage)
        self.fwd_map["stage"] = 0
        self.add_module("stage", stage)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _plan_from_timings(self, cluster: Cluster) -> Plan:
        """Times embedding, one block, norm and head (with the loss) on the real devices, then plans; collective."""
        kinds: dict[tuple[Any, ...], int] = {}
        numbers = [
            kinds.setdefault((layer.kind, layer.parameters, layer.window), len(kinds))
            for layer in self.lp_profile.layers
        ]
        if self.lp_workload.micro_batch is None:
            self.lp_workload = make_plan(self.lp_profile, cluster, self.lp_workload, self.num_stages).workload
        workload = self.lp_workload
        shape = (workload.chosen_micro_batch, workload.tokens_per_sequence)
        timed = timed_profile(
            self.lp_profile,
            numbers,
            self._timing_layer,
            torch.randint(self.hf_config.vocab_size, shape, device=self._device()),
            training=False,
            measured_on=cluster.devices[0],
            share=timing_share(self, cluster),
        )
        return make_plan(timed, cluster, workload, self.num_stages)

    def _timing_layer(self, index: int) -> Callable[[Any], Any]:
        stage = DecoderStage(self.hf_config, index, index + 1)
        stage.materialize(self._device(), self.torch_dtype)
        stage.randomize()
        stage.eval()
        return self.with_loss(stage) if stage.has_head else stage

    def with_loss(self, stage: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The last stage as the engine runs it: the loss is part of its forward pass."""
        loss_fn = self.loss_fn
        if loss_fn is None:
            return stage

        def run(value: Any) -> Any:
            logits = stage(value)
            return loss_fn(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device))

        return run

    def _device(self) -> str:
        return str(get_accelerator().device_name(self.local_rank))
