"""Saving in one process, against what transformers saves of the same checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BERT, FAMILIES, make_config, make_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lp_plugin.errors import InvalidInputError, RuntimeEnvironmentError
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.save import save_model
from lp_plugin.integrations.transformers.weights import load_stage


def saved(source: Path, target: Path, dtype: torch.dtype = torch.float32, *, head: bool = True) -> Path:
    """The model of a directory, loaded as one stage and saved to another."""
    config = AutoConfig.from_pretrained(source)
    stage = DecoderStage(config, 0, num_layers(config), head=head)
    load_stage(stage, source, "cpu", dtype)
    save_model(stage, target, source=source)
    return target


def assert_same(ours: Path, theirs: Path) -> None:
    """Tensors, their names and precisions, and the configuration."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    first, second = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (ours, theirs))
    assert first == second


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_is_what_transformers_saves(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    make_model(make_config(family, 3)).save_pretrained(tmp_path / "source")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    whole.save_pretrained(tmp_path / "theirs")
    assert_same(saved(tmp_path / "source", tmp_path / "ours", dtype), tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert again.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "source", "theirs"]


def test_encoder(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", **BERT, num_hidden_layers=3)
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(tmp_path / "source")
    assert_same(saved(tmp_path / "source", tmp_path / "ours"), tmp_path / "source")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_without_head(tmp_path: Path, family: str) -> None:
    make_model(make_config(family, 2)).base_model.save_pretrained(tmp_path / "source")
    assert_same(saved(tmp_path / "source", tmp_path / "ours", head=False), tmp_path / "source")


def test_layout_that_was_loaded_is_kept(tmp_path: Path) -> None:
    """Fused experts stay fused."""
    make_model(make_config("mixtral", 2)).save_pretrained(tmp_path / "source", save_original_format=False)
    assert_same(saved(tmp_path / "source", tmp_path / "ours"), tmp_path / "source")


def test_head_of_its_own_is_saved(tmp_path: Path) -> None:
    model = make_model(make_config("llama", 2))
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    ours = saved(tmp_path / "source", tmp_path / "ours")
    found = load_file(ours / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(found["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_what_lies_beside_the_weights_is_copied(tmp_path: Path) -> None:
    make_model(make_config("llama", 1)).save_pretrained(tmp_path / "source")
    kept = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"}
    kept |= {"special_tokens_map.json", "chat_template.jinja", "added_tokens.json"}
    for name in kept | {"training_args.bin", "README.md", "optimizer.pt"}:
        (tmp_path / "source" / name).write_text(name)
    (tmp_path / "source" / "tokenizer_old").mkdir()
    (tmp_path / "ours").mkdir()
    ours = saved(tmp_path / "source", tmp_path / "ours")
    expected = kept | {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in ours.iterdir()} == expected
    assert all((ours / name).read_text() == name for name in kept)


def test_what_a_save_that_was_killed_left_is_replaced(tmp_path: Path) -> None:
    make_model(make_config("llama", 1)).save_pretrained(tmp_path / "source")
    (tmp_path / ".ours.unfinished").mkdir()
    (tmp_path / ".ours.unfinished" / "model-00001-of-00002.safetensors").write_text("half")
    assert_same(saved(tmp_path / "source", tmp_path / "ours"), tmp_path / "source")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ours", "source"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_model(make_config("llama", 1)).save_pretrained(tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "before")
    for target in (tmp_path / "source", tmp_path / "source" / "config.json", Path("/dev/null")):
        with pytest.raises(InvalidInputError, match=rf"{target} is there already"):
            saved(tmp_path / "source", target)
    assert_same(tmp_path / "source", tmp_path / "before")


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    make_model(make_config("llama", 1)).save_pretrained(tmp_path / "source")
    with pytest.raises(RuntimeEnvironmentError, match="process 0 couldn't prepare the directory: NotADirectoryError"):
        saved(tmp_path / "source", tmp_path / "source" / "config.json" / "ours")


def test_a_save_that_fails_at_its_end_leaves_no_copy(tmp_path: Path) -> None:
    make_model(make_config("llama", 1)).save_pretrained(tmp_path / "source")
    with pytest.raises(RuntimeEnvironmentError, match="process 0 couldn't finish the directory"):
        saved(tmp_path / "source", tmp_path / "new" / "..")
    assert not any(tmp_path.rglob("*.unfinished"))
