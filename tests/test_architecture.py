"""Reading a config.json: what is taken from it, what is filled in, what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from shrunk import small_config, their_config

from lp_plugin import ModelConfigError, ModelProfile, UnsupportedModelError
from lp_plugin.model.architecture import Attention, Block, Mlp, read_architecture, read_config
from lp_plugin.model.families import FAMILIES

DENSE16 = Path(__file__).parent.parent / "examples" / "dense16"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def test_the_reference_config() -> None:
    architecture = read_architecture(read_config(DENSE16))
    assert (architecture.hidden_size, architecture.num_layers, architecture.dtype) == (8192, 16, "float16")
    (block,) = set(architecture.blocks)
    attention = Attention(num_heads=16, num_kv_heads=16, head_dim=512, value_dim=512)
    assert block == Block(attention=attention, mlp=Mlp(inner=32768, matrices=2, activation="gelu_pytorch_tanh"))
    assert (architecture.norm, architecture.norm_vectors, architecture.tied_embeddings) == ("layer", 2, False)


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
    for config in ({}, {"model_type": None}, {"model_type": ["llama"]}, {"text_config": {"model_type": ["llama"]}}):
        with pytest.raises(ModelConfigError, match=r'no "model_type"; supported are arcee, bart, bert, .* llama, '):
            read_architecture(config)


def test_unsupported_family_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported.*starcoder2.*from_costs") as caught:
        read_architecture({"model_type": "mamba"})
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("lama", "llama"), ("qwen3moe", "qwen3_moe"), ("xlm_roberta", "xlm-roberta"), ("Bert", "bert")],
)
def test_a_family_that_is_nearly_right(written: str, meant: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{written!r} is not supported \(did you mean .*{meant}"):
        read_architecture({"model_type": written})


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
    odd = read_architecture({**LLAMA, "hidden_size": 65, "head_dim": 16})
    assert odd.blocks[0].attention.head_dim == 16
    with pytest.raises(ModelConfigError, match=r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        read_architecture({**LLAMA, "num_key_value_heads": 3})


@pytest.mark.parametrize("dtype", ["float64", "int8", "auto", 16, ["float16"], {"type": "float16"}])
def test_a_bad_dtype(dtype: Any) -> None:
    with pytest.raises(ModelConfigError, match=r"dtype is .*supported are bfloat16, float16, float32"):
        read_architecture({**LLAMA, "dtype": dtype})


def test_a_bad_dtype_by_argument() -> None:
    with pytest.raises(ModelConfigError, match="dtype is 'half'"):
        ModelProfile.from_config(LLAMA, dtype="half")


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "gemma2", "modernbert", "olmo3"])
@pytest.mark.parametrize("types", [["full_attention"], ["full_attention"] * 5, []])
def test_layer_types_must_be_one_per_layer(family: str, types: list[str]) -> None:
    config = {**small_config(family), "num_hidden_layers": 4, "layer_types": types}
    with pytest.raises(ModelConfigError, match=f"layer_types has {len(types)} entries for 4 layers; give one each"):
        ModelProfile.from_config(config)


@pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention", "", "Full_Attention"])
def test_unknown_kinds_of_layers(kind: str) -> None:
    types = ["full_attention", "sliding_attention", kind]
    with pytest.raises(ModelConfigError, match=rf"layer_types has '{kind}' for block 2; known are full_attention"):
        read_architecture({**small_config("gemma2"), "layer_types": types})


def test_sliding_layers_need_a_window() -> None:
    config = {**small_config("gemma2", 1), "sliding_window": None}
    with pytest.raises(ModelConfigError, match=r"asks for sliding_attention in block 1, but sliding_window is null"):
        read_architecture(config)
    full = read_architecture({**config, "layer_types": ["full_attention"] * 3})
    assert {block.attention.window for block in full.blocks} == {None}


@pytest.mark.parametrize(
    ("family", "key", "value", "bound"),
    [
        ("llama", "num_hidden_layers", 4_097, "4096"),
        ("llama", "num_hidden_layers", 10**6, "4096"),
        ("llama", "hidden_size", 2**24 + 1, "16777216"),
        ("llama", "vocab_size", 10**30, "16777216"),
        ("llama", "max_position_embeddings", 10**12, "2147483648"),
        ("llama", "intermediate_size", float("nan"), "whole|integer"),
        ("llama", "hidden_size", float("inf"), "whole|integer"),
        ("gpt2", "n_layer", 4_097, "4096"),
        ("gpt2", "n_positions", 0, "0"),
        ("falcon", "num_kv_heads", -1, "0"),
        ("falcon", "bias", "no", "bool"),
        ("opt", "ffn_dim", 0, "0"),
        ("opt", "_remove_final_layer_norm", 1, "bool"),
        ("mixtral", "num_local_experts", 0, "0"),
        ("deepseek_v3", "kv_lora_rank", None, "integer"),
        ("deepseek_v3", "n_routed_experts", "many", "integer"),
        ("gemma3_text", "sliding_window", 0, "0"),
        ("gemma2", "layer_types", "full", "list"),
        ("bert", "type_vocab_size", -2, "0"),
        ("t5", "d_kv", 0, "0"),
        ("t5", "num_decoder_layers", 4_097, "4096"),
        ("bart", "encoder_layers", 0, "0"),
        ("modernbert", "local_attention", 0, "0"),
    ],
)
def test_values_out_of_bounds_are_named_with_key_and_bound(family: str, key: str, value: Any, bound: str) -> None:
    with pytest.raises(ModelConfigError, match=rf"{family} config: {key} is .*({bound})"):
        read_architecture({**small_config(family), key: value})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok is 6 of 5 experts; give 1 to 5"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is None of 8 experts"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn is false"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "describes 3 layers, but num_layers is 4"),
        ("gpt_neo", {"attention_types": [["global", 3]]}, "attention_types holds .*give pairs"),
        ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, "attention_types holds .*give pairs"),
        ("gpt_neo", {"attention_types": [[["sparse"], 4]]}, "attention_types holds .*give pairs"),
        ("bart", {"decoder_attention_heads": 5}, "hidden_size 64 is not a multiple of 5 heads"),
        ("bart", {"tie_word_embeddings": False}, "one table for encoder, decoder and head"),
        ("t5", {"feed_forward_proj": "twice-gelu"}, "feed_forward_proj is 'twice-gelu'"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention is true"),
        ("gpt2", {"n_head": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
    ],
)
def test_values_that_contradict_each_other(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        read_architecture({**small_config(family), **changes})


JUNK = [None, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "x", [], [[]], {}, True, [None], [1, 2], ["x"] * 3, 7]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_junk_in_any_key_is_a_profile_or_a_typed_error(family: str) -> None:
    """Never another exception, and never a message as long as the junk."""
    reader = importlib.import_module(f"lp_plugin.model.families.{FAMILIES[family]}").READERS[family]
    others = ["text_config", "quantization_config", "dtype", "made_up"]
    outcomes = []
    for key in [*reader.model_fields, *reader.renamed, *others]:
        for junk in JUNK:
            try:
                ModelProfile.from_config({**small_config(family), key: junk}, granularity="sublayer")
            except (ModelConfigError, UnsupportedModelError) as error:
                outcomes.append(str(error))
            else:
                outcomes.append("")
    assert "" in outcomes
    assert any(outcomes)
    assert max(map(len, outcomes)) < 500


def test_a_long_value_is_shown_in_short() -> None:
    with pytest.raises(ModelConfigError) as caught:
        read_architecture({**LLAMA, "hidden_size": "wide" * 100_000})
    assert len(str(caught.value)) < 200


def test_the_language_model_of_a_nested_config_is_read() -> None:
    text = small_config("gemma3_text")
    nested = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 7}, "dtype": "bfloat16"}
    assert read_architecture(nested) == read_architecture(text, dtype="bfloat16")
    assert read_architecture({"model_type": "llava", "text_config": LLAMA}) == read_architecture(LLAMA)
    untied = read_architecture({**nested, "tie_word_embeddings": False})
    assert not untied.tied_embeddings
    with pytest.raises(UnsupportedModelError, match="'llava' is not supported"):
        read_architecture({"model_type": "llava", "text_config": {"model_type": "someone's"}})
    with pytest.raises(UnsupportedModelError, match="'gemma3' is not supported"):
        read_architecture({"model_type": "gemma3"})


@pytest.mark.parametrize(
    ("family", "shared", "own"),
    [
        ("gpt2", "hidden_size", "n_embd"),
        ("gptj", "num_hidden_layers", "n_layer"),
        ("mpt", "hidden_size", "d_model"),
        ("bart", "num_hidden_layers", "encoder_layers"),
    ],
)
def test_the_name_that_all_families_share_is_taken_too(family: str, shared: str, own: str) -> None:
    config = small_config(family)
    value = config.pop(own) * 2
    theirs = their_config({**config, shared: value})
    assert getattr(theirs, own) == value
    assert read_architecture({**config, shared: value}) == read_architecture({**config, own: value})


def test_a_name_that_only_other_families_have_is_not_taken() -> None:
    assert not hasattr(their_config({"model_type": "opt"}), "intermediate_size")
    assert read_architecture({"model_type": "opt", "intermediate_size": 7}) == read_architecture({"model_type": "opt"})
    for family in ("bloom", "gpt_neox", "mpt", "bert"):
        plain = small_config(family)
        assert read_architecture({**plain, "num_key_value_heads": 2, "head_dim": 3}) == read_architecture(plain)
