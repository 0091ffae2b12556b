"""A decoder's stages in one process: exact at every split, and only a stage's own tensors loaded from any file."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    PADDINGS,
    make_batch,
    make_config,
    make_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lp_plugin.errors import UnsupportedModelError, WeightsError
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.weights import load_stage, weight_files

# --- one process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Family -> directory and model with 3 blocks."""
    folder = tmp_path_factory.mktemp("three")
    made = {}
    for family in FAMILIES:
        model = make_model(make_config(family, 3))
        model.save_pretrained(folder / family)
        made[family] = (folder / family, model)
    return made


def splits(count: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut ``count`` layers into stages."""
    inner = range(1, count)
    for size in range(count):
        for chosen in itertools.combinations(inner, size):
            yield (0, *chosen, count)


def loaded_stage(config: PretrainedConfig, directory: Path, start: int, stop: int) -> DecoderStage:
    stage = DecoderStage(config, start, stop)
    load_stage(stage, directory, "cpu", torch.float32)
    return stage.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_gives_the_same_logits(three_blocks: dict[str, tuple[Path, PreTrainedModel]], family: str) -> None:
    directory, model = three_blocks[family]
    count = num_layers(model.config)
    assert count == 6
    pieces = itertools.combinations(range(count + 1), 2)
    stages = {bounds: loaded_stage(model.config, directory, *bounds) for bounds in pieces}
    for padding in PADDINGS:
        ids, mask = make_batch(padding, 0)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            for cut in splits(count):
                value: Any = ids if mask is None else (ids, mask)
                for bounds in itertools.pairwise(cut):
                    value = stages[bounds](value)
                assert torch.equal(value, expected), (padding, cut)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_hold_each_tensor_of_the_model_once(
    three_blocks: dict[str, tuple[Path, PreTrainedModel]], family: str
) -> None:
    directory, model = three_blocks[family]
    whole = dict(model.named_parameters(remove_duplicate=False))
    for cut in splits(num_layers(model.config)):
        names: list[str] = []
        for bounds in itertools.pairwise(cut):
            stage = loaded_stage(model.config, directory, *bounds)
            for name, parameter in stage.model.named_parameters(remove_duplicate=False):
                names.append(stage.checkpoint_name(name))
                assert torch.equal(parameter, whole[names[-1]]), names[-1]
                assert not parameter.requires_grad
        assert sorted(names) == sorted(whole), cut
        assert len(set(names)) == len(names)


def test_tied_matrix_is_held_once_by_a_stage_with_both_ends(
    three_blocks: dict[str, tuple[Path, PreTrainedModel]],
) -> None:
    directory, model = three_blocks["llama-tied"]
    stage = loaded_stage(model.config, directory, 0, 6)
    assert stage.model.get_output_embeddings().weight is stage.model.get_input_embeddings().weight
    count = sum(parameter.numel() for parameter in stage.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    first, last = (loaded_stage(model.config, directory, *bounds) for bounds in ((0, 2), (2, 6)))
    assert torch.equal(first.model.get_input_embeddings().weight, last.model.get_output_embeddings().weight)


def test_stage_is_on_the_meta_device_until_it_is_loaded() -> None:
    stage = DecoderStage(make_config("llama", 3), 0, 6)
    assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(three_blocks: dict[str, tuple[Path, PreTrainedModel]], tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A llama directory of many small shards."""
    model = three_blocks["llama"][1]
    model.save_pretrained(tmp_path / "sharded", max_shard_size="64KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded", model


@pytest.fixture
def single(three_blocks: dict[str, tuple[Path, PreTrainedModel]], tmp_path: Path) -> tuple[Path, PretrainedConfig]:
    """A llama directory to spoil, and its configuration."""
    directory, model = three_blocks["llama"]
    shutil.copytree(directory, tmp_path / "llama")
    return tmp_path / "llama", model.config


def rewrite(directory: Path, change: Any) -> None:
    """Replaces the weights by ``change(weights)``."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_sharded_checkpoint_loads(sharded: tuple[Path, PreTrainedModel]) -> None:
    directory, model = sharded
    ids, _ = make_batch("none", 0)
    value: Any = ids
    with torch.no_grad():
        for bounds in ((0, 2), (2, 5), (5, 6)):
            value = loaded_stage(model.config, directory, *bounds)(value)
        assert torch.equal(value, model(ids).logits)


def test_only_own_tensors_are_read(sharded: tuple[Path, PreTrainedModel]) -> None:
    """Tensors of other layers are renamed away or of a wrong shape: a stage that holds none of them loads."""
    directory, model = sharded
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        other = {name: torch.zeros(1) for name in tensors if ".layers.1." not in name}
        save_file(tensors | other, file, metadata={"format": "pt"})
    stage = loaded_stage(model.config, directory, 2, 3)
    expected = dict(model.model.layers[1].named_parameters())
    assert len(list(stage.parameters())) == len(expected)
    for name, parameter in expected.items():
        assert torch.equal(stage.get_parameter(f"model.model.layers.0.{name}"), parameter)
    with pytest.raises(WeightsError, match=r"model\.layers\.2\..*shape \(1,\)"):
        loaded_stage(model.config, directory, 3, 4)


def test_missing_shard_is_named(sharded: tuple[Path, PreTrainedModel]) -> None:
    directory, model = sharded
    shard = max(directory.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(WeightsError, match=shard.name):
        loaded_stage(model.config, directory, 0, 1)


@pytest.mark.parametrize("kept", [0, 4, 200, 10_000])
def test_truncated_shard_is_named(sharded: tuple[Path, PreTrainedModel], kept: int) -> None:
    directory, model = sharded
    shard = sorted(directory.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    assert len(content) > kept
    shard.write_bytes(content[:kept])
    with pytest.raises(WeightsError, match=shard.name):
        loaded_stage(model.config, directory, 0, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\0"])
def test_broken_index_is_named(sharded: tuple[Path, PreTrainedModel], content: str) -> None:
    directory, _ = sharded
    (directory / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        weight_files(directory)


def test_index_that_names_a_tensor_its_shard_lacks(sharded: tuple[Path, PreTrainedModel]) -> None:
    directory, model = sharded
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    name = "model.norm.weight"
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(WeightsError, match=name):
        loaded_stage(model.config, directory, 4, 5)


def test_truncated_single_file_is_named(single: tuple[Path, PretrainedConfig]) -> None:
    directory, config = single
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model\.safetensors can't be read"):
        loaded_stage(config, directory, 0, 1)


def test_no_weights(single: tuple[Path, PretrainedConfig]) -> None:
    directory, config = single
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=f"{directory} holds no weights.*safetensors"):
        loaded_stage(config, directory, 0, 1)


def test_missing_tensor_is_named(single: tuple[Path, PretrainedConfig]) -> None:
    directory, config = single
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    loaded_stage(config, directory, 0, 2)
    with pytest.raises(WeightsError, match=f"no tensor '{name}'"):
        loaded_stage(config, directory, 1, 4)


def test_untied_model_without_head_is_refused(single: tuple[Path, PretrainedConfig]) -> None:
    directory, config = single
    rewrite(directory, lambda tensors: {key: value for key, value in tensors.items() if key != "lm_head.weight"})
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        loaded_stage(config, directory, 5, 6)


def test_wrong_shape_is_named(single: tuple[Path, PretrainedConfig]) -> None:
    directory, config = single
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite(directory, lambda tensors: tensors | {name: tensors[name][:-1].contiguous()})
    with pytest.raises(WeightsError, match=rf"{name} has shape \(31, 64\), but the config asks for \(32, 64\)"):
        loaded_stage(config, directory, 3, 4)


# --- families' peculiarities -------------------------------------------------------------------------------------


def test_gpt2_scaled_by_layer_index_is_refused() -> None:
    config = make_config("gpt2", 3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx"):
        DecoderStage(config, 0, 2)


def copied(directory: Path, target: Path, name_of: Any) -> Path:
    """A copy of a model directory with its tensors renamed."""
    shutil.copytree(directory, target)
    rewrite(target, lambda tensors: {name_of(name): tensor for name, tensor in tensors.items()})
    return target


def test_gpt2_checkpoint_without_prefix(three_blocks: dict[str, tuple[Path, PreTrainedModel]], tmp_path: Path) -> None:
    """The checkpoint of gpt2 on the hub is that of the bare decoder: ``h.0...``, not ``transformer.h.0...``."""
    directory, model = three_blocks["gpt2"]
    hub = copied(directory, tmp_path / "hub", lambda name: name.removeprefix("transformer."))
    names = set(weight_files(hub))
    assert "h.0.ln_1.weight" in names
    assert not any(name.startswith("transformer.") for name in names)
    ids, _ = make_batch("none", 0)
    value: Any = ids
    with torch.no_grad():
        for bounds in ((0, 2), (2, 6)):
            value = loaded_stage(model.config, hub, *bounds)(value)
        assert torch.equal(value, model(ids).logits)


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_gpt_neox_head_under_both_names(
    three_blocks: dict[str, tuple[Path, PreTrainedModel]], tmp_path: Path, head: str
) -> None:
    directory, model = three_blocks["gpt_neox"]
    names = {"embed_out.weight": head, "lm_head.weight": head}
    renamed = copied(directory, tmp_path / "renamed", lambda name: names.get(name, name))
    assert [name for name in weight_files(renamed) if name in names] == [head]
    stage = loaded_stage(model.config, renamed, 5, 6)
    assert torch.equal(stage.model.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_keeps_rotary_frequencies_in_float32(
    three_blocks: dict[str, tuple[Path, PreTrainedModel]], family: str, dtype: torch.dtype
) -> None:
    directory, _ = three_blocks[family]
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    expected = {name: buffer for name, buffer in whole.named_buffers() if "rotary" in name}
    stage = DecoderStage(whole.config, 2, 4)
    load_stage(stage, directory, "cpu", dtype)
    found = {name: buffer for name, buffer in stage.model.named_buffers() if "rotary" in name}
    assert {parameter.dtype for parameter in stage.parameters()} == {dtype}
    assert found
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_lower_precision_gives_the_same_logits(
    three_blocks: dict[str, tuple[Path, PreTrainedModel]], family: str
) -> None:
    directory, _ = three_blocks[family]
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids, mask = make_batch("left", 0)
    value: Any = (ids, mask)
    with torch.no_grad():
        for bounds in ((0, 1), (1, 3), (3, 6)):
            stage = DecoderStage(whole.config, *bounds)
            load_stage(stage, directory, "cpu", torch.bfloat16)
            value = stage.eval()(value)
        assert torch.equal(value, whole(ids, attention_mask=mask, use_cache=False).logits)
