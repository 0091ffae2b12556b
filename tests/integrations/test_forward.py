"""Forward passes of four real processes against DeepSpeed's ``eval_batch`` and the model in one piece."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BIN, Start
from families import VARIANTS, make_config, make_model
from forward_cases import FAMILIES, LAYOUTS, make_tokens
from hypothesis import given
from hypothesis import strategies as st
from stage_cases import stage_of
from strategies import STEADY
from test_stage_capture import ELSEWHERE, OneDevice, put_on_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lp_plugin.integrations.deepspeed.forward import schedule
from lp_plugin.integrations.deepspeed.forward.whole_rows import whole_rows
from lp_plugin.integrations.transformers.decoder import CACHE_ARGUMENT, DecoderStage, num_layers

BLOCKS = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: (folder / family, make_model(make_config(family, BLOCKS))) for family in FAMILIES}
    for path, model in made.values():
        model.save_pretrained(path)
    return made


@pytest.fixture(scope="module")
def ran(models: Any, start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What was made, and what each rank saw."""
    results = tmp_path_factory.mktemp("results")
    script = Path(__file__).with_name("forward_cases.py")
    folder = models["llama"][0].parent
    start(BIN / "torchrun", "--standalone", "--nproc-per-node=4", script, folder, results)
    return results, [json.loads((results / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(4)]


Ran = tuple[Path, list[dict[str, Any]]]
Models = dict[str, tuple[Path, PreTrainedModel]]


@STEADY
@given(st.integers(1, 12), st.booleans(), st.integers(1, 3), st.data())
def test_no_activation_comes_where_one_is_still_needed(
    micro_batches: int, beside: bool, stages: int, data: st.DataObject
) -> None:
    """Played through: the next one comes in beside a pass or after it, to the buffer that its pass reads."""
    stage, num_buffers = data.draw(st.integers(0, stages - 1)), 2 if beside else 1
    order = schedule.ForwardSchedule(micro_batches, stages, stage, receives_beside=beside)
    buffers: dict[int, int] = {}
    seen: dict[type, list[int]] = defaultdict(list)
    for instruction in itertools.chain.from_iterable(order.steps()):
        number = instruction.micro_batch
        if isinstance(instruction, schedule.StartReceiving):
            assert number % num_buffers not in buffers
            buffers[number % num_buffers] = number
        elif isinstance(instruction, schedule.Forward) and stage > 0:
            assert seen[schedule.AwaitActivation][-1] == number
            assert buffers.pop(number % num_buffers) == number
            coming = [number + 1] if beside and number + 1 < micro_batches else []
            assert list(buffers.values()) == coming
        seen[type(instruction)].append(number)
    every = list(range(micro_batches))
    assert seen[schedule.Forward] == every
    assert seen[schedule.StartReceiving] == (every if stage > 0 else [])
    assert seen[schedule.SendActivation] == (every if stage < stages - 1 else [])


@STEADY
@given(st.integers(1, 1000))
def test_graphs_hold_every_micro_batch_and_are_launched_while_the_last_one_runs(micro_batches: int) -> None:
    parts = schedule.graph_parts(micro_batches)
    assert sum(parts) == micro_batches
    assert parts[0] == 1
    assert all(after <= 4 * before for before, after in itertools.pairwise(parts))
    assert max(parts) <= 32
    assert len(parts) <= 4 + micro_batches / 32


def assert_logits(ran: Ran, name: str, model: PreTrainedModel, tokens: torch.Tensor) -> None:
    made = torch.load(ran[0] / f"{name}.pt")
    with torch.no_grad():
        expected = torch.stack([model(each).logits for each in tokens])
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_four_uneven_stages(ran: Ran, models: Models, family: str) -> None:
    assert all(rank["equal"][family] for rank in ran[1])
    assert_logits(ran, f"{family}-0", models[family][1], make_tokens(0))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_a_replica_alone(ran: Ran, models: Models, name: str) -> None:
    assert all(rank["equal"][name] for rank in ran[1])
    for replica in range(LAYOUTS[name][2]):
        assert_logits(ran, f"{name}-{replica}", models["llama"][1], make_tokens(replica))


def test_cuts_inside_of_blocks(ran: Ran, models: Models) -> None:
    assert_logits(ran, "halves-0", models["llama"][1], make_tokens(0))


def test_pipelines_and_engines_take_turns(ran: Ran, models: Models) -> None:
    assert_logits(ran, "small-0", models["llama"][1], make_tokens(3, 1, 2))
    for rank in ran[1]:
        assert rank["unlabelled"]
        assert rank["repeated"]
        assert rank["restored"]
        assert rank["execution"] == "eager"


def test_labels(ran: Ran, models: Models) -> None:
    tokens = make_tokens(0)
    labels = tokens.roll(-1, dims=-1)
    with torch.no_grad():
        chances = torch.stack([models["llama"][1](each).logits for each in tokens]).double().log_softmax(-1)
    expected = chances.gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(torch.load(ran[0] / "scores-0.pt"), expected, rtol=1e-6, atol=1e-4)


def test_what_cannot_run_is_refused(ran: Ran) -> None:
    for rank in ran[1]:
        assert rank["errors"]["graphs"].startswith("RuntimeEnvironmentError: execution 'graphs' needs CUDA GPUs")
        assert rank["errors"]["rows"] == "WorkloadError: rows is 0; it must be at least 1."
    first = ran[1][0]["errors"]
    assert first["shape"].startswith("WorkloadError: inputs are of shape [1, 2, 20]; this stage takes [5, 3, 20]")
    assert first["missing"].startswith("WorkloadError: inputs are missing")


@pytest.mark.parametrize("family", [family for family in VARIANTS if family not in ELSEWHERE])
@torch.no_grad()
def test_a_pass_stays_on_the_device(family: str) -> None:
    """Or a CUDA graph could not hold it."""
    config = make_config(family, 2)
    count = num_layers(config)
    stages = [DecoderStage(config, *bounds).eval() for bounds in itertools.pairwise((0, 2, count - 1, count))]
    with FakeTensorMode(allow_non_fake_inputs=True), whole_rows():
        for stage in stages:
            put_on_gpu(stage)
        hidden = torch.zeros(3, 20, dtype=torch.long, device="cuda")
        with OneDevice():
            for stage in stages:
                hidden = stage(hidden)
    assert hidden.shape == (3, 20, config.vocab_size)


def test_a_mask_is_made_only_for_a_sliding_window() -> None:
    config = make_config("mistral", 1)
    config._attn_implementation = "sdpa"
    hidden, positions = torch.zeros(2, 20, 64), torch.arange(20)[None]
    given = {"config": config, "inputs_embeds": hidden, "attention_mask": None, CACHE_ARGUMENT: None}
    with FakeTensorMode(allow_non_fake_inputs=True), whole_rows():
        assert create_causal_mask(**given, position_ids=positions) is None
        assert create_sliding_window_causal_mask(**given, position_ids=positions) is not None
        config.sliding_window = 21
        assert create_sliding_window_causal_mask(**given, position_ids=positions) is None


@torch.no_grad()
def test_a_stage_is_compiled_once_and_in_one_piece() -> None:
    config = make_config("starcoder2", 2)
    model = make_model(config)
    stage = stage_of(model, 0, num_layers(config))
    torch.compiler.reset()
    compiled = torch.compile(stage.forward, dynamic=False, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in make_tokens(0, 2):
            with whole_rows():
                made = compiled(tokens)
            torch.testing.assert_close(made, model(tokens).logits, rtol=1e-6, atol=1e-6)
