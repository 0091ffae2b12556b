"""Timing layers, each distinct one once; and counting them without allocating."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed.pipe
import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec

from lp_plugin.integrations.deepspeed.config import read_settings
from lp_plugin.integrations.deepspeed.layers import (
    build_layer,
    distinct_numbers,
    profile_layers,
    undisturbed_random,
)
from lp_plugin.integrations.deepspeed.sample import sample_input
from lp_plugin.measure.layers import REPEATS, WARM_UP, LayerFailedError, time_layers

RUNS = WARM_UP + REPEATS
Layer = Callable[[Any], Any]


class Chain:
    """Layers that count how often they are built, and run with and without gradients."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.built: Counter[int] = Counter()
        self.run: Counter[int] = Counter()
        self.trained: Counter[int] = Counter()

    def build(self, index: int) -> Layer:
        self.built[index] += 1

        def layer(value: Any) -> Any:
            (self.trained if torch.is_grad_enabled() else self.run)[index] += 1
            return self.layers[index](value)

        return layer


def tied(forward_fn: Any = None) -> TiedLayerSpec:
    return TiedLayerSpec("table", torch.nn.Embedding, 100, 8, forward_fn=forward_fn)


def head(embedding: torch.nn.Embedding, value: torch.Tensor) -> torch.Tensor:
    return value @ embedding.weight.T


class FrozenLinear(torch.nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)


class NeedsValues(torch.nn.Module):
    """A constructor that looks at a value, which meta tensors don't have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(int(torch.full((1,), 3.0).item()), 2))


# time_layers


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_distinct_layer_is_timed_once_over_all_processes(processes: int) -> None:
    signatures = ["a", "b", "a", "a", "c", "b", "d"]
    covered: Counter[int] = Counter()
    timed: Counter[int] = Counter()
    for turn in range(processes):
        chain = Chain([torch.relu] * len(signatures))
        result = time_layers(signatures, chain.build, torch.ones(2), training=False, share=(turn, processes))
        assert chain.built == {0: 1, 1: 1, 4: 1, 6: 1}  # once each, for the shapes
        assert set(chain.run.values()) <= {1, 1 + RUNS}
        assert not chain.trained
        timed.update(index for index, count in chain.run.items() if count > 1)
        covered.update(result.keys())
        for first, second in ((0, 2), (0, 3), (1, 5)):
            assert result.get(first) == result.get(second)
        assert all(seconds.forward > 0 and seconds.backward == 0 for seconds in result.values())
    assert timed == dict.fromkeys((0, 1, 4, 6), 1)
    assert covered == dict.fromkeys(range(len(signatures)), 1)


def test_more_processes_than_layers_leave_some_idle() -> None:
    chain = Chain([torch.relu])
    assert time_layers([0], chain.build, torch.ones(2), training=False, share=(4, 5)) == {}
    assert chain.run == {0: 1}


def test_equal_layers_on_other_shapes_or_types_are_timed_again() -> None:
    chain = Chain([torch.relu, lambda value: value.repeat(2), torch.relu, torch.Tensor.long, torch.relu])
    result = time_layers(["relu", "twice", "relu", "cast", "relu"], chain.build, torch.ones(2), training=False)
    assert set(chain.built) == {0, 1, 2, 3, 4}
    assert set(result) == set(range(5))


def test_shapes_flow_on_through_tuples_and_repeated_layers() -> None:
    seen = []

    def widen(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return value, torch.arange(3)

    def merge(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append([tuple(part.shape) for part in pair])
        return pair[0].repeat(1, 2)

    chain = Chain([widen, merge, widen, merge])
    result = time_layers(["w", "m", "w", "m"], chain.build, torch.ones(2, 4), training=True)
    assert chain.built == {0: 1, 1: 1, 2: 1, 3: 1}  # the second pair is wider
    assert seen[0] == [(2, 4), (3,)]
    assert seen[-1] == [(2, 8), (3,)]
    assert set(result) == {0, 1, 2, 3}


def test_training_times_the_backward_pass_too() -> None:
    linear = torch.nn.Linear(4, 4)
    chain = Chain([linear])
    seconds = time_layers([0], chain.build, torch.ones(2, 4), training=True)[0]
    assert seconds.forward > 0
    assert seconds.backward > 0
    assert chain.run == {0: 1}
    assert chain.trained == {0: RUNS}
    assert linear.weight.grad is not None
    assert torch.is_grad_enabled()


def test_training_takes_layers_without_gradients() -> None:
    """Integer inputs, integer outputs, and layers with nothing to train."""
    chain = Chain([torch.Tensor.long, torch.nn.Embedding(2, 4), torch.detach])
    assert set(time_layers(["cast", "table", "cut"], chain.build, torch.ones(2), training=True)) == {0, 1, 2}


def test_training_takes_layers_that_work_in_place() -> None:
    chain = Chain([torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True)])
    assert set(time_layers(["linear", "relu"], chain.build, torch.ones(2, 4), training=True)) == {0, 1}


def test_the_sample_is_left_as_it_is() -> None:
    sample = torch.full((2, 4), -1.0)
    time_layers([0], Chain([torch.nn.Linear(4, 4)]).build, sample, training=True)
    assert torch.equal(sample, torch.full((2, 4), -1.0))
    assert not sample.requires_grad
    assert sample.grad is None


@pytest.mark.parametrize("position", [0, 2])
def test_a_failing_layer_is_named_by_its_position(position: int) -> None:
    layers: list[Layer] = [torch.relu] * 3
    layers[position] = torch.nn.Linear(5, 5)
    signatures = ["relu"] * 3
    signatures[position] = "linear"
    with pytest.raises(LayerFailedError, match=rf"layer {position} failed: RuntimeError: .*shapes") as failed:
        time_layers(signatures, Chain(layers).build, torch.ones(2, 4), training=False)
    assert failed.value.position == position


def test_a_layer_that_cant_be_built_is_named_too() -> None:
    def build(index: int) -> Layer:
        raise ValueError("no such width")

    with pytest.raises(LayerFailedError, match="layer 0 failed: ValueError: no such width"):
        time_layers([0], build, torch.ones(2), training=False)


@pytest.mark.parametrize("output", [None, {"hidden": 1}])
def test_a_layer_that_gets_no_tensor_is_named(output: Any) -> None:
    with pytest.raises(LayerFailedError, match="layer 1"):
        time_layers([0, 1], Chain([lambda value: output, torch.relu]).build, torch.ones(2), training=False)


# undisturbed_random


def test_the_random_state_comes_back_after_building_and_after_an_error() -> None:
    before = torch.get_rng_state()
    with undisturbed_random():
        torch.nn.Linear(4, 4)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="shape"), undisturbed_random():
        torch.rand(2).view(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_counting_and_sampling_leave_the_random_state() -> None:
    specs = [NeedsValues(), LayerSpec(NeedsValues), LayerSpec(torch.nn.Embedding, 10, 4), torch.nn.Linear(4, 4)]
    before = torch.get_rng_state()
    profile_layers(specs, "float32")
    sample_input(specs, read_settings({}), "cpu")
    sample_input(specs, read_settings({"lp_plugin": {"input": {"shape": [2, 2]}}}), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


# profile_layers


def test_parameters_bytes_and_flops_of_each_kind_of_layer() -> None:
    profile = profile_layers(
        [
            LayerSpec(torch.nn.Embedding, 100, 8),
            LayerSpec(torch.nn.Linear, 8, 6),
            torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.Linear(6, 2, bias=False)),
            torch.relu,
            lambda value: value,
        ],
        "bfloat16",
    )
    assert [layer.parameters for layer in profile.layers] == [800, 54, 24, 0, 0]
    assert [layer.weight_bytes for layer in profile.layers] == [1600, 108, 48, 0, 0]
    assert [layer.weight_traffic_bytes for layer in profile.layers] == [0, 108, 48, 0, 0]
    assert [layer.flops_per_token for layer in profile.layers] == [0, 96, 24, 0, 0]
    names = [layer.name for layer in profile.layers]
    assert names == ["Embedding 0", "Linear 1", "Sequential 2", "relu 3", "<lambda> 4"]
    assert profile.dtype == "bfloat16"


def test_frozen_parameters_count_like_any_others() -> None:
    frozen = profile_layers([LayerSpec(FrozenLinear, 8, 6), FrozenLinear(8, 6)], "float32").layers
    plain = profile_layers([LayerSpec(torch.nn.Linear, 8, 6)], "float32").layers[0]
    for layer in frozen:
        assert (layer.parameters, layer.weight_bytes, layer.flops_per_token) == (54, 216, 96)
        assert (layer.parameters, layer.flops_per_token) == (plain.parameters, plain.flops_per_token)


def test_nothing_is_allocated() -> None:
    """A layer of 4 TB."""
    layer = profile_layers([LayerSpec(torch.nn.Linear, 10**6, 10**6, bias=False)], "float32").layers[0]
    assert layer.weight_bytes == 4 * 10**12


def test_a_constructor_that_cant_work_on_meta_is_run_for_real() -> None:
    assert profile_layers([LayerSpec(NeedsValues)], "float32").layers[0].parameters == 6


def test_counting_builds_each_distinct_layer_once_and_leaves_existing_ones() -> None:
    built = []

    class Counted(torch.nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)
            built.append(width)

    existing = torch.nn.Linear(2, 2)
    profile_layers([LayerSpec(Counted, 3), LayerSpec(Counted, 4), LayerSpec(Counted, 3), existing], "float32")
    assert built == [3, 4]
    assert existing.weight.device.type == "cpu"


def test_tied_layers_share_their_weights_and_a_forward_fn_makes_a_head() -> None:
    first, last = profile_layers([tied(), tied(head)], "float32").layers
    assert first.shared_key == last.shared_key == "table"
    assert first.shared_bytes == last.shared_bytes == first.weight_bytes == last.weight_bytes == 3200
    assert (first.flops_per_token, first.weight_traffic_bytes) == (0, 0)
    assert (last.flops_per_token, last.weight_traffic_bytes) == (1600, 3200)


def test_a_tied_layer_counts_whichever_comes_first() -> None:
    for specs in ([tied(head)], [tied(head), tied()], [tied(lambda table, value: table(value)), tied(head)]):
        assert all(layer.parameters == 800 for layer in profile_layers(specs, "float32").layers)


# distinct_numbers


def test_equal_numbers_mean_the_same_class_and_arguments() -> None:
    def double(value: torch.Tensor) -> torch.Tensor:
        return value * 2

    specs = [
        LayerSpec(torch.nn.Linear, 4, 4),
        LayerSpec(torch.nn.Linear, 4, 4),
        LayerSpec(torch.nn.Linear, 4, 4, bias=False),
        LayerSpec(torch.nn.Linear, 4, 5),
        LayerSpec(torch.nn.Bilinear, 4, 4, 4),
        torch.nn.Linear(4, 4),
        torch.nn.Linear(4, 4),
        torch.nn.Linear(4, 5),
        torch.nn.Sequential(torch.nn.Linear(4, 4)),
        double,
        double,
        torch.relu,
        tied(),
        tied(head),
        tied(),
    ]
    assert distinct_numbers(specs) == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 9]
    assert distinct_numbers([]) == []


def test_arguments_that_dont_compare_are_told_apart() -> None:
    class Holds(torch.nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.value = value

    specs = [LayerSpec(Holds, torch.ones(2)), LayerSpec(Holds, torch.ones(2))]
    assert distinct_numbers(specs) == [0, 1]


# build_layer and sample_input


def test_a_built_layer_is_the_users_and_an_existing_one_a_copy() -> None:
    existing = torch.nn.Linear(4, 4)
    copied = build_layer(existing, "cpu")
    assert copied is not existing
    assert torch.equal(copied.weight, existing.weight)
    assert build_layer(torch.relu, "cpu") is torch.relu
    assert isinstance(build_layer(LayerSpec(torch.nn.Linear, 4, 2), "cpu"), torch.nn.Linear)
    assert build_layer(tied(), "cpu")(torch.tensor([3])).shape == (1, 8)
    assert build_layer(tied(head), "cpu")(torch.ones(2, 8)).shape == (2, 100)


@pytest.mark.parametrize(
    ("specs", "section", "shape", "dtype"),
    [
        ([LayerSpec(torch.nn.Embedding, 10, 4)], {"sequence": 6}, (3, 6), torch.int64),
        ([tied(lambda table, value: table(value))], {"sequence": 6}, (3, 6), torch.int64),
        ([torch.nn.Linear(5, 4)], {}, (3, 5), torch.float32),
        ([torch.relu, torch.nn.Sequential(torch.nn.Linear(5, 4))], {"sequence": 6}, (3, 6, 5), torch.float32),
        ([torch.relu], {"input": {"shape": [2, 7], "dtype": "bfloat16"}}, (2, 7), torch.bfloat16),
    ],
)
def test_a_sample_is_as_configured_or_inferred(
    specs: list[Any], section: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    settings = read_settings({"train_micro_batch_size_per_gpu": 3, "lp_plugin": section})
    sample = sample_input(specs, settings, "cpu")
    assert (tuple(sample.shape), sample.dtype) == (shape, dtype)


def test_a_sample_of_several_tensors_is_a_tuple() -> None:
    spec = [{"shape": [2, 3], "dtype": "int64", "high": 5}, {"shape": [2]}]
    first, second = sample_input([], read_settings({"lp_plugin": {"input": spec}}), "cpu")
    assert (first.shape, first.dtype, second.shape) == ((2, 3), torch.int64, (2,))
    assert 0 <= int(first.min()) <= int(first.max()) < 5


def test_importing_us_keeps_deepspeeds_class() -> None:
    assert deepspeed.pipe.PipelineModule._partition_layers.__wrapped__.__module__.startswith("deepspeed.")
