"""Reading a config.json: what is taken from it, what is filled in, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lp_plugin import ModelConfigError, ModelProfile, UnsupportedModelError
from lp_plugin.architecture import FAMILIES, read_architecture, read_config

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_fills_in(model_type: str) -> None:
    ours, theirs = read_architecture({"model_type": model_type}), AutoConfig.for_model(model_type)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    own_width = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (own_width or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_config_as_transformers_saves_it(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    assert read_architecture(read_config(tmp_path)) == read_architecture({"model_type": model_type})


def test_the_reference_config() -> None:
    architecture = read_architecture(read_config(DENSE16))
    assert (architecture.hidden_size, architecture.head_dim, architecture.num_heads) == (8192, 512, 16)
    assert (architecture.intermediate_size, architecture.mlp_matrices) == (32768, 2)
    assert architecture.dtype == "float16"
    assert architecture.windows == (None,) * 16
    assert not architecture.qkv_bias


def test_unknown_keys_are_ignored() -> None:
    assert read_architecture({**LLAMA, "rope_theta": 1.0, "made_up": {}}) == read_architecture(LLAMA)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2"])
def test_keys_that_the_family_does_not_know_change_nothing(model_type: str) -> None:
    """transformers ignores a window in these families, so its model has none."""
    plain = read_architecture({"model_type": model_type})
    assert read_architecture({"model_type": model_type, "sliding_window": 16}) == plain


def write(path: Path, content: str | bytes) -> Path:
    file = path / "config.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_missing_file_and_missing_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nowhere"):
        with pytest.raises(ModelConfigError, match=r"does not exist; give a Hugging Face model directory"):
            ModelProfile.from_config(path)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    text = json.dumps(LLAMA)
    for length in range(len(text)):
        with pytest.raises(ModelConfigError, match=r"is not valid JSON.*truncated"):
            ModelProfile.from_config(write(tmp_path, text[:length]))


@pytest.mark.parametrize(("content", "kind"), [("[1, 2]", "list"), ('"llama"', "str"), ("7", "int"), ("null", "None")])
def test_json_that_is_no_object(tmp_path: Path, content: str, kind: str) -> None:
    with pytest.raises(ModelConfigError, match=f"holds a JSON {kind}.*a model config is an object"):
        ModelProfile.from_config(write(tmp_path, content))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"[" * 200_000, b"1" * 5000], ids=["not UTF-8", "nested too deep", "a huge number"]
)
def test_unreadable_content(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        ModelProfile.from_config(write(tmp_path, content))


def test_no_model_type() -> None:
    for config in ({}, {"model_type": None}, {"model_type": ["llama"]}):
        with pytest.raises(ModelConfigError, match='no "model_type"; supported are gpt2, gpt_neox, llama'):
            read_architecture(config)


def test_unsupported_family_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported.*starcoder2.*from_costs") as caught:
        read_architecture({"model_type": "mamba"})
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("hidden_size", None),
        ("hidden_size", [64]),
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", 64.5),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", {}),
        ("vocab_size", "many"),
        ("num_key_value_heads", 0),
        ("tie_word_embeddings", "perhaps"),
        ("attention_bias", 2),
        ("head_dim", -1),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(ModelConfigError, match=f"llama config: {key} is "):
        read_architecture({**LLAMA, key: value})


def test_aliases_are_named_as_the_user_wrote_them() -> None:
    with pytest.raises(ModelConfigError, match="gpt2 config: n_embd is 'x'"):
        read_architecture({"model_type": "gpt2", "n_embd": "x"})


def test_heads_must_divide() -> None:
    with pytest.raises(ModelConfigError, match=r"hidden_size 65 is not a multiple of num_attention_heads 4.*head_dim"):
        read_architecture({**LLAMA, "hidden_size": 65})
    assert read_architecture({**LLAMA, "hidden_size": 65, "head_dim": 16}).head_dim == 16
    with pytest.raises(ModelConfigError, match=r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        read_architecture({**LLAMA, "num_key_value_heads": 3})


@pytest.mark.parametrize("dtype", ["float64", "int8", "auto", 16, ["float16"], {"type": "float16"}])
def test_a_bad_dtype(dtype: Any) -> None:
    with pytest.raises(ModelConfigError, match=r"dtype is .*supported are bfloat16, float16, float32"):
        read_architecture({**LLAMA, "dtype": dtype})


def test_a_bad_dtype_by_argument() -> None:
    with pytest.raises(ModelConfigError, match="dtype is 'half'"):
        ModelProfile.from_config(LLAMA, dtype="half")


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention"] * 5, []])
def test_layer_types_must_be_one_per_layer(types: list[str]) -> None:
    with pytest.raises(ModelConfigError, match="layer_types"):
        ModelProfile.from_config({"model_type": "qwen2", "num_hidden_layers": 4, "layer_types": types})
