"""Loading against transformers' own: a stage's own tensors alone, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import Saved, changed, expected, loaded, refusals, scored
from families import FAMILIES
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from lp_plugin.errors import WeightsError
from lp_plugin.integrations.transformers.checkpoint import new_buffer, read_headers, weight_files
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.weights import check_checkpoint, load_stage

EXPERTS = ("mixtral", "qwen3_moe")
TIED = ("llama-tied", "gemma2", "gpt2", "opt", "bloom", "falcon")


@pytest.fixture
def sharded(saved: Saved, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A llama directory of many small shards."""
    model = saved["llama"][1]
    model.save_pretrained(tmp_path / "sharded", max_shard_size="64KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded", model


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads(saved: Saved, family: str) -> None:
    directory, model = saved[family]
    check_checkpoint(model.config, directory)
    assert torch.equal(scored(model.config, directory), expected(model))


def test_sharded_checkpoint_loads(sharded: tuple[Path, PreTrainedModel]) -> None:
    directory, model = sharded
    assert torch.equal(scored(model.config, directory), expected(model))


def test_one_file_goes_before_shards(saved: Saved, sharded: tuple[Path, PreTrainedModel]) -> None:
    """As in transformers."""
    directory, _ = sharded
    shutil.copy(saved["llama"][0] / "model.safetensors", directory)
    assert set(weight_files(directory).values()) == {directory / "model.safetensors"}


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def test_only_own_tensors_are_read(saved: Saved) -> None:
    directory, model = saved["llama"]
    stage = DecoderStage(model.config, 2, 3)
    size = sum(parameter.numel() * 4 for parameter in stage.parameters())
    before = bytes_read()
    load_stage(stage, directory, "cpu", torch.float32)
    headers = 3 * 8192
    assert size <= bytes_read() - before <= size + headers
    assert (directory / "model.safetensors").stat().st_size > 3 * size


def test_missing_shard_is_named(sharded: tuple[Path, PreTrainedModel]) -> None:
    directory, model = sharded
    shard = max(directory.glob("*.safetensors"))
    shard.unlink()
    (message,) = refusals(model.config, directory)
    assert f"{shard} is missing, but the index names it" in message


@pytest.mark.parametrize("kept", [0, 4, 200, 10_000])
def test_truncated_shard_is_named(sharded: tuple[Path, PreTrainedModel], kept: int) -> None:
    directory, model = sharded
    shard = sorted(directory.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    assert len(content) > kept
    shard.write_bytes(content[:kept])
    (message,) = refusals(model.config, directory)
    assert f"{shard} can't be read" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\0"])
def test_broken_index_is_named(sharded: tuple[Path, PreTrainedModel], content: str) -> None:
    directory, _ = sharded
    (directory / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json is broken"):
        weight_files(directory)


def test_index_that_names_a_tensor_its_shard_lacks(sharded: tuple[Path, PreTrainedModel]) -> None:
    directory, model = sharded
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    files = sorted(set(index["weight_map"].values()))
    name = "model.norm.weight"
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    path.write_text(json.dumps(index), encoding="utf-8")
    (message,) = refusals(model.config, directory)
    assert f"{index['weight_map'][name]} holds {name}, but it doesn't" in message


def test_truncated_single_file_is_named(single: tuple[Path, PretrainedConfig]) -> None:
    directory, config = single
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (message,) = refusals(config, directory)
    assert f"{file} can't be read" in message


def test_file_that_shrinks_after_its_header_was_read(single: tuple[Path, PretrainedConfig]) -> None:
    directory, _ = single
    tensor = read_headers(directory)["lm_head.weight"]
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: tensor.offset + 4])
    with pytest.raises(WeightsError, match=r"model\.safetensors ended inside lm_head\.weight"):
        tensor.copy_to(torch.empty(tensor.shape), new_buffer())


@pytest.mark.parametrize(("pickled", "says"), [("pytorch_model.bin", "holds pytorch_model.bin, which"), (None, "")])
def test_no_weights(single: tuple[Path, PretrainedConfig], pickled: str | None, says: str) -> None:
    directory, config = single
    (directory / "model.safetensors").unlink()
    if pickled:
        (directory / pickled).write_bytes(b"")
    (message,) = refusals(config, directory)
    assert f"{directory} holds no weights" in message
    assert says in message
    assert "safetensors" in message


@pytest.mark.parametrize("shape", [(7,), (5, 6), (0, 4), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("buffer_bytes", [4, 12, 64, 4096])
def test_any_part_is_read_through_any_buffer(tmp_path: Path, shape: tuple[int, ...], buffer_bytes: int) -> None:
    whole = torch.randn(shape)
    save_file({"before": torch.zeros(3), "it": whole}, tmp_path / "model.safetensors")
    stored, buffer = read_headers(tmp_path)["it"], torch.empty(buffer_bytes, dtype=torch.uint8)
    for dim, size in enumerate(shape):
        for start, stop in itertools.combinations(range(size + 1), 2):
            part = whole.narrow(dim, start, stop - start)
            for target in (torch.full_like(part, float("nan")), torch.full_like(part, 3.0, dtype=torch.float64)):
                stored.copy_to(target, buffer, dim=dim, start=start)
                assert torch.equal(target, part.to(target.dtype))


# --- tensors -----------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named_by_every_stage(single: tuple[Path, PretrainedConfig], tmp_path: Path) -> None:
    directory, config = single
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = changed(directory, lambda tensors: {key: tensors[key] for key in tensors.keys() - {name}}, tmp_path / "x")
    (message,) = refusals(config, spoilt)
    assert f"{spoilt} lacks {name}, compared" in message
    empty = changed(directory, lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "y")
    (message,) = refusals(config, empty)
    assert (
        "lacks lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight and 26 more" in message
    )


def test_untied_model_without_head_is_refused_unless_the_head_is_not_wanted(
    single: tuple[Path, PretrainedConfig], tmp_path: Path
) -> None:
    directory, config = single
    name = "lm_head.weight"
    spoilt = changed(directory, lambda tensors: {key: tensors[key] for key in tensors.keys() - {name}}, tmp_path / "x")
    (message,) = refusals(config, spoilt)
    assert "lacks lm_head.weight" in message
    check_checkpoint(config, spoilt, head=False)
    assert list(loaded(config, spoilt, 5, 6, head=False).parameters()) == []


def test_wrong_shape_is_named_by_every_stage(single: tuple[Path, PretrainedConfig], tmp_path: Path) -> None:
    directory, config = single
    name = "model.layers.2.self_attn.k_proj.weight"
    spoilt = changed(directory, lambda tensors: tensors | {name: tensors[name][:-1].contiguous()}, tmp_path / "x")
    (message,) = refusals(config, spoilt)
    assert f"model.safetensors: {name} has shape (31, 64), but the config asks for (32, 64)" in message


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.bias", "model.layers.3.input_layernorm.weight"])
def test_unexpected_tensors_of_the_models_own_modules_are_refused(
    single: tuple[Path, PretrainedConfig], tmp_path: Path, name: str
) -> None:
    directory, config = single
    spoilt = changed(directory, lambda tensors: tensors | {name: torch.zeros(3)}, tmp_path / "x")
    (message,) = refusals(config, spoilt)
    assert f"also holds {name} (in model.safetensors)" in message


def test_other_modules_tensors_are_let_be(single: tuple[Path, PretrainedConfig], tmp_path: Path) -> None:
    directory, config = single
    others = {"score.weight": torch.zeros(3), "vision_tower.layers.0.weight": torch.zeros(2)}
    check_checkpoint(config, changed(directory, lambda tensors: tensors | others, tmp_path / "x"))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "h.0.attn.masked_bias"),
    ],
)
def test_buffers_of_old_checkpoints_are_let_be(saved: Saved, tmp_path: Path, family: str, name: str) -> None:
    directory, model = saved[family]
    old = changed(directory, lambda tensors: tensors | {name: torch.zeros(1)}, tmp_path / "old")
    assert torch.equal(scored(model.config, old), expected(model))


def test_two_names_of_one_tensor_are_refused(saved: Saved, tmp_path: Path) -> None:
    directory, model = saved["gpt_neox"]
    two = {"lm_head.weight": torch.zeros(97, 64), "embed_out.weight": torch.zeros(97, 64)}
    (message,) = refusals(model.config, changed(directory, lambda tensors: tensors | two, tmp_path / "two"))
    assert "would both fill lm_head.weight" in message
