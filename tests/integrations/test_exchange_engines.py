"""Partitions of ours run by torch.distributed.pipelining, transformers' own pipeline and DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Start
from families import make_batch, make_config, make_model
from transformers import PreTrainedModel
from transformers.distributed.pipeline_parallel import PipelineStage

from lp_plugin import Cluster, ModelProfile, PartitionFormatError, Plan, Workload
from lp_plugin.exchange import rules
from lp_plugin.integrations.torch_pipelining import stage_module
from lp_plugin.integrations.transformers.native_pp import native_split
from lp_plugin.solver.solve import evaluate

CLOSE = 1e-5
"""Micro-batches of other shapes may be summed in another order."""


def planned(model: PreTrainedModel, boundaries: tuple[int, ...]) -> Plan:
    profile = ModelProfile.from_config(model.config.to_dict(), dtype="float32")
    cluster = Cluster.homogeneous("cpu", len(boundaries) - 1)
    return evaluate(profile, cluster, Workload(batch=1, sequence=4, micro_batch=1), boundaries)


@pytest.fixture(scope="module")
def seen(start: Start, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw in every case."""
    folder = tmp_path_factory.mktemp("exchange")
    script = Path(__file__).with_name("exchange_cases.py")
    start("torchrun", "--standalone", "--nproc-per-node", "2", script, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "boundaries"),
    [("gpipe llama", [0, 2, 8]), ("gpipe llama-tied", [0, 6, 8]), ("gpipe gpt2", [0, 7, 8])],
)
def test_gpipe_runs_uneven_stages(seen: list[dict[str, Any]], case: str, boundaries: list[int]) -> None:
    for rank in seen:
        assert rank[case]["boundaries"] == boundaries
        assert rank[case]["own tensors"]
        assert rank[case]["difference"] < CLOSE


def test_transformers_own_pipeline_keeps_our_split(seen: list[dict[str, Any]]) -> None:
    assert [rank["native"]["blocks"] for rank in seen] == [[0], [1, 2, 3, 4]]
    for rank in seen:
        assert rank["native"]["difference"] < CLOSE
        assert rank["native"]["generated"]
        assert rank["native refusals"] == {
            "stages": "WorldSizeError: the plan has 3 stages, but pp_size is 2; make them the same.",
            "blocks": "PartitionFormatError: the plan places 6 blocks, but this model has 5; "
            "make a plan for this model.",
        }


def test_deepspeed_takes_imported_parts(seen: list[dict[str, Any]]) -> None:
    for rank, local in zip(seen, ([0, 5], [5, 7]), strict=True):
        assert rank["deepspeed"] == {"exported": "[0, 5, 7]", "parts": [0, 5, 7], "local": local}


class Ranks:
    """A pipeline of some size, as far as transformers' rule asks for it."""

    def __init__(self, pp_size: int) -> None:
        self.pp_size = pp_size

    def counts(self, num_blocks: int) -> tuple[int, ...]:
        ranges = [PipelineStage.layer_range_for_rank(self, rank, num_blocks) for rank in range(self.pp_size)]
        assert ranges[0][0] == 0
        assert [stop for _, stop in ranges] == [*(start for start, _ in ranges[1:]), num_blocks]
        return tuple(stop - start for start, stop in ranges)


@pytest.mark.parametrize("num_stages", range(1, 10))
def test_the_rule_is_transformers_own(num_stages: int) -> None:
    for num_blocks in range(num_stages, 70):
        assert Ranks(num_stages).counts(num_blocks) == rules.transformers_native(num_blocks, num_stages)


def test_the_split_holds_inside_only() -> None:
    model = make_model(make_config("llama", 5))
    before = PipelineStage.layer_range_for_rank
    with native_split(planned(model, (0, 2, 4, 8))):
        assert Ranks(3).counts(5) == (1, 2, 2)
    assert PipelineStage.layer_range_for_rank is before
    assert Ranks(3).counts(5) == (2, 2, 1)
    refused = r"transformers .*stage 1 has \['head'\] but no block"
    with pytest.raises(PartitionFormatError, match=refused), native_split(planned(model, (0, 7, 8))):
        raise AssertionError("not reached")
    assert PipelineStage.layer_range_for_rank is before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stage_modules_train_like_the_model(family: str) -> None:
    model = make_model(make_config(family, 3)).train()
    for parameter in model.get_submodule("transformer.h.1" if family == "gpt2" else "model.layers.1").parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = model.config
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    ids, _ = make_batch("none", 1)
    model(ids).logits.square().mean().backward()
    parts = [stage_module(model, (0, 1, 3, 4, 6), stage) for stage in range(4)]
    value: Any = ids
    for part in parts:
        assert part.training
        value = part(value)
    value.square().mean().backward()
    expected = dict(model.named_parameters(remove_duplicate=False))
    tied = {"lm_head.weight", "transformer.wte.weight"} if family == "gpt2" else set()  # each gets a part of the sum
    checked = 0
    for part in parts:
        for name, parameter in part.model.named_parameters():
            whole = part.checkpoint_name(name)
            assert parameter.requires_grad == expected[whole].requires_grad
            assert torch.equal(parameter, expected[whole])
            assert parameter is not expected[whole]
            if parameter.requires_grad and whole not in tied:
                torch.testing.assert_close(parameter.grad, expected[whole].grad)
                checked += 1
    assert checked > 10


def test_a_tied_head_beside_its_embedding_stays_tied() -> None:
    model = make_model(make_config("llama-tied", 3))
    part = stage_module(model, (0, 6), 0).model
    assert part.get_output_embeddings().weight is part.get_input_embeddings().weight
    ids, _ = make_batch("none", 1)
    with torch.no_grad():
        assert torch.equal(part(ids).logits, model(ids).logits)


def test_stage_modules_refuse_boundaries_of_another_model() -> None:
    model = make_model(make_config("llama", 3))
    with pytest.raises(PartitionFormatError, match="from 0 to 7; they must run from 0 to 6"):
        stage_module(model, (0, 3, 7), 0)
    with pytest.raises(PartitionFormatError, match="there is no stage 2; the boundaries make stages 0 to 1"):
        stage_module(model, (0, 3, 6), 2)
