"""A Hugging Face model as a DeepSpeed PipelineModule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig

from lp_plugin.errors import InfeasibleError, PlanFileError, WorldSizeError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.deepspeed.agreement import check_same, plan_digest
from lp_plugin.integrations.deepspeed.methods import detected_cluster, timed_profile, timing_share
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.fingerprint import model_digest
from lp_plugin.integrations.transformers.materialize import materialize, randomize
from lp_plugin.integrations.transformers.tensor_parallel import shard_stage
from lp_plugin.integrations.transformers.weights import check_checkpoint, load_stage
from lp_plugin.job.memory import expect
from lp_plugin.job.place import at, set_stage
from lp_plugin.model import ModelProfile
from lp_plugin.objective import Objective
from lp_plugin.plan import Plan
from lp_plugin.planner import make_plan
from lp_plugin.report import as_text, stage_table
from lp_plugin.solver.solve import evaluate, fits
from lp_plugin.workload import Workload

__all__ = ["HFPipelineModule"]


class HFPipelineModule(PipelineModule):
    """All layers of a model, one stage per rank or tensor-parallel group; weights of the rank's own stage only.

    The layer list is flat for partitioning; building makes one `DecoderStage` for the rank's range. Ranks that share
    a stage's layers are neighbours; replicas of the whole pipeline lie between them and the stages.

    Args:
        directory: Model directory with ``config.json`` and safetensors.
        num_stages: Stages.
        workload: What the plan is made for, and the shape that layers are timed on; without a micro-batch the
            planner chooses one from the catalogue's figures.
        plan: Boundaries to use, between layers or halves of blocks; None makes a plan.
        partition_method: How it is made: ``profile`` times the layers on the real devices (prefill), ``cache-aware``
            takes the catalogue's figures, as decode always does.
        objective: What it is made for; see `make_plan`.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None takes the config's.
        cluster: Devices and links of one pipeline to plan for, one (or one group) per stage; None asks the driver on
            every rank.
        loss_fn: What the last stage computes from its output and labels.
        tensor_parallel: Ranks that share each stage's layers.
        data_parallel: Replicas of the pipeline.
        head: Whether the model ends with its head; without, the last stage gives the final hidden state.

    Attributes:
        stage: This rank's layers.
        lp_plan: The plan that was used.
        lp_workload: The workload, its micro-batch chosen unless a plan was given.
        lp_profile: The layers, as one rank of a tensor-parallel group holds them.
        lp_cluster: What was planned for.
        hf_config: transformers' configuration of the whole model.

    Raises:
        WorldSizeError: If there are more or fewer processes.
        PlanFileError: If the plan has other numbers of layers, stages or tensor-parallel ranks.
        UnsupportedModelError, WeightsError, WorkloadError, InfeasibleError: From building, loading, planning.
    """

    stage: DecoderStage

    def __init__(
        self,
        directory: str | Path,
        *,
        num_stages: int,
        workload: Workload,
        plan: Plan | None = None,
        partition_method: Literal["profile", "cache-aware"] = "profile",
        objective: Objective = "throughput",
        dtype: str | None = None,
        cluster: Cluster | None = None,
        loss_fn: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
        tensor_parallel: int = 1,
        data_parallel: int = 1,
        head: bool = True,
    ) -> None:
        _check_world(num_stages, tensor_parallel, data_parallel)
        self.directory = Path(directory)
        self.hf_config = AutoConfig.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        self._check_files(head)
        granularity = "layer" if plan is None else plan.granularity
        profile = ModelProfile.from_config(self.directory, dtype=dtype, granularity=granularity)
        self.lp_profile = profile.sharded(tensor_parallel) if tensor_parallel > 1 else profile
        self.lp_workload = workload
        self._lp_given = plan
        self._lp_objective: Objective = objective
        self._lp_wanted_cluster = cluster
        self._lp_head = head
        self._lp_mesh: Any = None
        if tensor_parallel > 1:
            shape = (num_stages, data_parallel, tensor_parallel)
            self._lp_mesh = init_device_mesh(get_accelerator().device_name(), shape, mesh_dim_names=("pp", "dp", "tp"))
        topology = PipeModelDataParallelTopology(num_pp=num_stages, num_mp=tensor_parallel, num_dp=data_parallel)
        super().__init__(self._specs(), topology=topology, loss_fn=loss_fn, partition_method=partition_method)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of weights and activations."""
        return getattr(torch, self.lp_profile.dtype)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(get_accelerator().device_name(self.local_rank))

    def with_loss(self, stage: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The last stage as the engine runs it: the loss is part of its forward pass."""
        loss_fn = self.loss_fn
        if loss_fn is None:
            return stage

        def run(value: Any) -> Any:
            logits = stage(value)
            return loss_fn(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device))

        return run

    def _specs(self) -> list[LayerSpec]:
        """One per layer, for what counts layers; `_build` makes a whole stage."""
        count = self.lp_profile.num_layers
        return [LayerSpec(DecoderStage, self.hf_config, index, index + 1) for index in range(count)]

    def _partition_layers(self, method: str = "profile") -> None:
        size = self.lp_profile.tensor_parallel
        self.lp_cluster = self._lp_wanted_cluster or detected_cluster(self._topo, "auto", tensor_parallel=size)
        given = self._lp_given
        self.lp_plan = self._new_plan(method) if given is None else self._checked(given)
        self._settle()

    def _settle(self) -> None:
        """Uses the plan, once all ranks have the same one; what comes next is loading."""
        check_same(
            {"plan": plan_digest(self.lp_plan), "model": model_digest(self.directory)},
            f"give all hosts the same plan, and the same files in {self.directory}.",
        )
        self.parts = list(self.lp_plan.boundaries)
        stage = self._topo.get_coord(self.global_rank).pipe
        expect(self.lp_plan, stage)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])
        set_stage(stage)
        at("load")

    def _checked(self, plan: Plan) -> Plan:
        """The plan, predicted again for these devices if it was made for others; refused if it can't hold the rows."""
        here = self._evaluated(plan)
        made_for = [stage.device for stage in plan.stages]
        return plan if made_for == [stage.device for stage in here.stages] else here

    def _evaluated(self, plan: Plan) -> Plan:
        """The plan's boundaries, predicted for these devices and this workload; refused if they can't hold it."""
        mine = (len(self._layer_specs), self.num_stages, self.lp_profile.tensor_parallel)
        if (len(plan.layers), plan.num_stages, plan.tensor_parallel) != mine:
            raise PlanFileError(
                f"the plan has {len(plan.layers)} layers in {plan.num_stages} stages of {plan.tensor_parallel} ranks, "
                f"the model {mine[0]} in {mine[1]} of {mine[2]}; make a plan for this model and these processes."
            )
        here = evaluate(self.lp_profile, self.lp_cluster, self.lp_workload, plan.boundaries)
        if not fits(here):
            raise InfeasibleError(
                f"with rows of {self.lp_workload.sequence} tokens, {self.lp_workload.micro_batch} per micro-batch, "
                "the plan's stages don't fit these devices; plan for this sequence, or make micro-batches smaller.",
                table=as_text(stage_table(here)),
            )
        return here

    def _new_plan(self, method: str) -> Plan:
        """Collective if layers are timed."""
        profile, cluster, count = self.lp_profile, self.lp_cluster, self.num_stages
        if method == "cache-aware" or self.lp_workload.phase == "decode":
            plan = make_plan(profile, cluster, self.lp_workload, count, objective=self._lp_objective)
            self.lp_workload = plan.workload
            return plan
        if self.lp_workload.micro_batch is None:
            self.lp_workload = make_plan(profile, cluster, self.lp_workload, count).workload
        return make_plan(self._timed(), cluster, self.lp_workload, count, objective=self._lp_objective)

    def _timed(self) -> ModelProfile:
        """The profile with embedding, one block, norm and head (with the loss) timed on the real devices."""
        kinds: dict[tuple[Any, ...], int] = {}
        numbers = [
            kinds.setdefault((layer.kind, layer.parameters, layer.window), len(kinds))
            for layer in self.lp_profile.layers
        ]
        shape = (self.lp_workload.chosen_micro_batch, self.lp_workload.tokens_per_sequence)
        at("time layers")
        return timed_profile(
            self.lp_profile,
            numbers,
            self._timing_layer,
            torch.randint(self.hf_config.vocab_size, shape, device=self.device),
            training=self.lp_workload.phase == "train",
            measured_on=self.lp_cluster.devices[0],
            share=timing_share(self, self.lp_cluster),
        )

    def _timing_layer(self, index: int) -> Callable[[Any], Any]:
        stage = self._make_stage(index, index + 1)
        materialize(stage, self.device, self.torch_dtype)
        randomize(stage)
        stage.requires_grad_(self.lp_workload.phase == "train").eval()
        return self.with_loss(stage) if stage.has_head else stage

    def _check_files(self, head: bool) -> None:
        """Refuses weights that don't fill the model, before anything is built."""
        check_checkpoint(self.hf_config, self.directory, head=head)

    def _load(self, stage: DecoderStage) -> None:
        """Gives a stage that has no memory yet its weights."""
        load_stage(stage, self.directory, self.device, self.torch_dtype)

    def _build(self) -> None:
        stage = self._make_stage(self._local_start, self._local_stop)
        self._load(stage)
        stage.eval()
        self.forward_funcs.append(stage)
        self.fwd_map["stage"] = 0
        self.add_module("stage", stage)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False

    def _make_stage(self, start: int, stop: int) -> DecoderStage:
        """Layers ``start .. stop - 1`` without memory, this rank's share of them."""
        halves = self.lp_profile.granularity == "sublayer"
        stage = DecoderStage(self.hf_config, start, stop, halves=halves, head=self._lp_head)
        if self._lp_mesh is not None:
            shard_stage(stage, self._lp_mesh)
        return stage


def _check_world(num_stages: int, tensor_parallel: int, data_parallel: int) -> None:
    world, needed = dist.get_world_size(), num_stages * tensor_parallel * data_parallel
    if world != needed:
        raise WorldSizeError(
            f"{world} processes for {num_stages} stages of {tensor_parallel} ranks in {data_parallel} replicas: "
            f"that takes {needed}; start as many (torchrun --nproc-per-node {needed}), or change these numbers."
        )
