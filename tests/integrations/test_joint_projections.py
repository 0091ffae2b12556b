"""Projections of the same input as one product: transformers' results, in the memory that the weights take anyway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make_config, make_model
from stage_cases import stage_of
from torch import fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lp_plugin.integrations.deepspeed.alone.stages import stage_of_copies
from lp_plugin.integrations.deepspeed.forward.whole_rows import whole_rows
from lp_plugin.integrations.deepspeed.generation.lean import LeanPass
from lp_plugin.integrations.deepspeed.joint_projections import JointProjections
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.save import save_model
from lp_plugin.integrations.transformers.weights import load_stage

BLOCKS = 2
SAVED = dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "granite"), 3)
SAVED |= {"llama-tied": 3, "mixtral": 2, "starcoder2": 2, "opt": 2}
"""Products less per block, of families with projections of their own for queries, keys and values."""
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
"""In float32: a product of another shape may add up in another order, and so may what comes after it."""


class Products(TorchFunctionMode):
    """Counts products with weights."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is functional.linear
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def frozen(family: str, blocks: int = BLOCKS) -> PreTrainedModel:
    return make_model(make_config(family, blocks)).requires_grad_(False)


def tokens(number: int = 0) -> torch.Tensor:
    return torch.arange(number, number + 40).view(2, 20)


def counted(model: Any, inputs: Any) -> tuple[Any, int]:
    with Products() as products:
        return model(inputs), products.count


def storage_bytes(module: nn.Module) -> int:
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in module.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_the_same_logits_by_fewer_products(family: str) -> None:
    model = frozen(family)
    expected, separately = counted(model, tokens())
    joint = JointProjections(model).all
    for context in (joint, joint, JointProjections(model).all):
        with context:
            found, together = counted(model, tokens())
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        assert separately - together == BLOCKS * SAVED.get(family, 0)
        assert counted(model, tokens())[1] == separately
        assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["qwen2", "olmo2", "opt"])
def test_parameters_are_what_they_were_in_the_same_memory(family: str) -> None:
    model = frozen(family)
    parameters, values = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    num_bytes = storage_bytes(model)
    JointProjections(model)
    assert storage_bytes(model) == num_bytes
    places = [parameter.data_ptr() for parameter in model.parameters()]
    JointProjections(model)  # of another pipeline: nothing moves, so that graphs stay valid
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    for key in ("weight", "bias") if family != "olmo2" else ("weight",):
        parts = [getattr(attention.get_submodule(name), key) for name in ("q_proj", "k_proj", "v_proj")]
        storages = {part.untyped_storage().data_ptr() for part in parts}
        assert len(storages) == 1
        assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)


def test_gate_and_up_stay_apart_where_nothing_is_compiled() -> None:
    model = frozen("llama")
    expected, separately = counted(model, tokens())
    with JointProjections(model).attention:
        found, together = counted(model, tokens())
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert separately - together == BLOCKS * 2


def test_weights_that_are_loaded_afterwards_count() -> None:
    model, other = frozen("llama"), frozen("llama")
    for parameter in other.parameters():
        parameter.mul_(0.7)
    joint = JointProjections(model).all
    for assign in (False, True):  # the second takes other memory: the projections run by themselves again
        model.load_state_dict(other.state_dict(), assign=assign)
        with joint:
            torch.testing.assert_close(model(tokens()).logits, other(tokens()).logits, **CLOSE)


def test_saved_as_before(tmp_path: Path) -> None:
    config = make_config("qwen2", BLOCKS)
    make_model(config).save_pretrained(tmp_path / "source")
    stage = DecoderStage(config, 0, num_layers(config))
    load_stage(stage, tmp_path / "source", "cpu", torch.float32)
    for name in ("before", "after"):
        save_model(stage, tmp_path / name, source=tmp_path / "source")
        JointProjections(stage.model)
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after


@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
def test_compiled_once_and_in_one_piece(family: str) -> None:
    model = frozen(family)
    stage = stage_of(model, 0, num_layers(model.config))
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(stage.forward, dynamic=False, fullgraph=True, backend=backend)
    joint = JointProjections(stage.model).all
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3):
            with joint, whole_rows():
                found = compiled(tokens(number))
            torch.testing.assert_close(found, model(tokens(number)).logits, **CLOSE)
    (graph,) = graphs
    products = sum(node.target is functional.linear for node in graph.graph.nodes)
    assert products == counted(model, tokens())[1] - BLOCKS * SAVED[family]
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    assert len(output.args[0]) == 1  # no projection leaves the graph


def test_in_a_lean_pass() -> None:
    model = frozen("qwen3")
    expected = model(tokens()).logits
    with JointProjections(model).all, LeanPass(model):
        torch.testing.assert_close(model(tokens()).logits, expected, **CLOSE)


@pytest.mark.parametrize(("family", "saved"), [("qwen2", 3), ("olmo2", 1)])
def test_a_rank_s_parts(family: str, saved: int) -> None:
    """olmo2's queries and keys are gathered from all ranks: they are left alone."""
    config = make_config(family, BLOCKS)
    given: dict[str, Any] = {"halves": False, "device": torch.device("cpu"), "dtype": torch.float32}
    stage = stage_of_copies(config, 1, 2, copies=BLOCKS, tensor_parallel=2, **given)
    hidden = torch.randn(2, 5, config.hidden_size)
    expected, separately = counted(stage, hidden)
    with JointProjections(stage.model).all:
        found, together = counted(stage, hidden)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert separately - together == BLOCKS * saved


class Mlp(nn.Module):
    """As transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 6).requires_grad_(False) for _ in range(2))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(value).sigmoid() * self.up_proj(value)


class OtherOrder(Mlp):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.up_proj(value) * self.gate_proj(value).sigmoid()


class OtherInput(Mlp):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(value).sigmoid() * self.up_proj(value.clone())


class OneAlone(Mlp):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(value).sigmoid()


class NeedsMore(Mlp):
    def forward(self, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(value * scale)


class Sometimes(Mlp):
    """Asks otherwise than when tried out."""

    tried_out = False

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(value).sigmoid() * self.up_proj(value + 1 if self.tried_out else value)


def with_gradients() -> nn.Module:
    return Mlp().requires_grad_(True)


def with_one_bias() -> nn.Module:
    mlp = Mlp()
    mlp.up_proj.bias = None
    return mlp


def with_two_precisions() -> nn.Module:
    mlp = Mlp()
    mlp.up_proj.double()
    return mlp


def with_shared_memory() -> nn.Module:
    mlp = Mlp()
    mlp.up_proj.weight.data = torch.randn(7, 8)[:6]
    return mlp


def with_hook() -> nn.Module:
    mlp = Mlp()
    mlp.up_proj.register_forward_hook(lambda _, __, output: output + 1)
    return mlp


def with_forward() -> nn.Module:
    mlp = Mlp()
    mlp.up_proj.forward = lambda value: value[..., :6]  # type: ignore[method-assign]
    return mlp


OTHERS = (OtherOrder, OtherInput, OneAlone, NeedsMore)
CHANGED = (with_gradients, with_one_bias, with_two_precisions, with_shared_memory, with_hook, with_forward)


@pytest.mark.parametrize("make", [*OTHERS, *CHANGED])
def test_left_alone(make: Any) -> None:
    mlp = make()
    places, own = [each.data_ptr() for each in mlp.parameters()], dict(mlp.up_proj.__dict__)
    with JointProjections(mlp).all:
        assert "forward" not in mlp.gate_proj.__dict__
        assert mlp.up_proj.__dict__.get("forward") is own.get("forward")
    assert places == [each.data_ptr() for each in mlp.parameters()]


def test_another_input_than_tried_out() -> None:
    mlp = Sometimes()
    joint, mlp.tried_out = JointProjections(mlp).all, True
    value = torch.randn(3, 8)
    expected = mlp(value)
    with joint:
        found, products = counted(mlp, value)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert products == 2


def test_everything_is_back_after_an_error() -> None:
    mlp = Mlp()
    joint = JointProjections(mlp).all
    with pytest.raises(RuntimeError, match="shape"), joint:
        mlp(torch.randn(3, 9))
    assert "forward" not in mlp.gate_proj.__dict__
