"""Partitions that people write by hand: every spelling that engines take, and what is wrong with the others."""

from __future__ import annotations

import itertools
import json

import pytest
from chains import Cut, boundaries_over, can_express, chain
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import STEADY

from lp_plugin import PartitionFormatError
from lp_plugin.exchange.counts import MAX_CHARACTERS
from lp_plugin.integrations.formats import FORMATS, export_partition, import_partition


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vllm", " VLLM_PP_LAYER_PARTITION=2,1,1 "),
        ("vllm", "VLLM_PP_LAYER_PARTITION = '2, 1, 1'".replace(" = ", "=")),
        ("sglang", 'SGLANG_PP_LAYER_PARTITION="2,1,1"'),
        ("sglang", "2 ,01, 1"),
        ("transformers", "2,1,1\n"),
        ("deepspeed", "[0,3,\n 4,7]"),
        ("megatron", "E,tt|t|t,L"),
        ("megatron", "E(t)*2|(t|)*1t*01L*1"),
        ("megatron", "Et*2(|t)*2L(m|)*0"),
        ("megatron", "E(t*00000000000002t*0|)*1t|tL"),
        ("torch", '[["model"], ["model.layers.2"], ["model.layers.3", "model.norm", "lm_head"]]'),
        ("accelerate", '{"": 0, "model.layers.2": 1, "model.layers.3": "cpu", "model.norm": "cpu", "lm_head": "cpu"}'),
        ("accelerate", '{"model": 0, "model.layers.2": 1, "model.layers.3": "cuda:2", "model.norm": 2, "lm_head": 2}'),
        (
            "accelerate",
            '{"model.layers.0": 1, "model.embed_tokens": 1, "lm_head": 3, "model.layers.1": 1, "model.norm": 3, '
            '"model.layers.2.mlp": 0, "model.layers.2.self_attn": 0, "model.layers.3": 3, "model.rotary_emb": 7}',
        ),
    ],
)
def test_texts_that_people_write(name: str, text: str) -> None:
    assert import_partition(text, chain(4), name, num_stages=3, model_type="llama") == (0, 3, 4, 7)


def test_modules_that_only_some_models_have_may_be_left_out() -> None:
    cut = Cut(chain(2), (0, 2, 5), "opt")
    device_map = json.loads(export_partition(cut, "accelerate"))
    assert device_map.pop("model.decoder.project_in") == 0
    assert device_map.pop("model.decoder.project_out") == 1
    assert import_partition(json.dumps(device_map), cut.layers, "accelerate", model_type="opt") == (0, 2, 5)


WRONG = {
    "vllm": {
        "": "'' in '' is not a number of blocks",
        "2,2,": "'' in '2,2,' is not a number",
        "2,1": r"\[2, 1\] add up to 3, but the model has 4 blocks",
        "3,0,1": "stage 1 has 0 blocks",
        "5,-1": "'-1' in '5,-1' is not a number",
        "2,1.5": "'1.5'",
        "٢,٢": "is not a number",
        "1_0": "'1_0'",
        "1,1,1,1,1": "more stages than the model's 4 blocks",
        "9" * 5000: "is not a number",
        "999999999,1": "add up to 1000000000",
        "SGLANG_PP_LAYER_PARTITION=2,2": "'SGLANG_PP_LAYER_PARTITION=2' in",
    },
    "deepspeed": {
        "": "'' is not JSON",
        "[0, 3": "is not JSON",
        "{}": r"\{\} is a JSON dict",
        "[]": r"\[\] makes no stage",
        "[0]": "makes no stage",
        "[0, 3, 8]": "from 0 to 8; they must run from 0 to 7",
        "[1, 7]": "from 1 to 7",
        "[0, 3, 3, 7]": "stage 1 runs from layer 3 to 3",
        "[0, 5, 3, 7]": "stage 1 runs from layer 5 to 3",
        "[0, 3.0, 7]": "3.0 among the boundaries is no whole number",
        "[0, true, 7]": "True among",
        "[0, NaN, 7]": "nan among",
        "[0, null, 7]": "None among",
        "[0, 1, 2, 3, 4, 5, 6, 6, 7]": "9 boundaries make more stages than the model's 7 layers",
        "[" * 200_000: "nested too deeply",
        "[0, " + "9" * 5000 + "]": "is not JSON",
    },
    "megatron": {
        "": "E .* stands 0 times",
        "Ett|ttL|": "stage 2 of .* is empty",
        "|Ett|ttL": "stage 0 of .* is empty",
        "Ett|(t*0)*3|ttL": "stage 1 of .* is empty",
        "Ett|*999999999ttL": "stage 1 of .* is empty",
        "Ett|tt": "L .* stands 0 times",
        "EEtt|ttL": "E .* stands 2 times",
        "Ett|tttL": "5 decoder layers .* 4 blocks",
        "Et*999999999L": "999999999 decoder layers",
        "tEt|ttL": "from t to L; they must run from E to L",
        "Ett|tLt": "from E to t",
        "Ett|ttmL": "1 multi-token-prediction",
        "Ett x|ttL": "' ' in 'Ett x",
        "Ett|t2L": "'2' in",
        "E(t)*(2)|ttL": "the group 't' has no repeat",
        "E(tt)|ttL": "the group 'tt' has no repeat",
        "E((t)*2|)*2L": r"'\(' in",
        "E(tt|ttL": r"'\(' in",
        "Et*2*2L": r"'\*' in",
        "E()*2ttttL": r"'\(' in",
        "E(t|)*999999999L": "stands 999999999 times .* more than the 12 symbols",
        "E(t|)*4" * 3: "stands 4 times .* more than the 12 symbols",
        "E(t|)*4" * 100_000: "has more than the 12 symbols",
        "t*0" * 100_000: "more than the 12 symbols",
        "E" + "t*" + "9" * 5000 + "L": "are too many",
    },
    "torch": {
        "{}": "is a JSON dict",
        "[]": "'model.embed_tokens' has no place",
        '["model"]': "stage 0 is 'model'",
        "[[1]]": "1 on stage 0 is no module name",
        '[["model"], ["model"]]': "'model' is on stage 0 and on stage 1",
        '[["model"]]': "'lm_head' has no place",
        '[["model"], ["head"]]': "no module 'head'",
        '[["model"], ["lm_head"], []]': "leave stage 2 without a layer",
        '[["lm_head"], ["model"]]': "are not in model order",
        '[["model", "lm_head"], ["model.rotary_emb"]]': "leave stage 1 without a layer",
        '[["model", "lm_head"], ["model.layers.1"]]': "'model.layers.2' is in place 0 again, after 1",
        '[["model", "lm_head"], ["model.layers.3.mlp"]]': "model.layers.3 is spread over \\['0', '1'\\]",
        '[["model", "lm_head"], ["model.layers.4"]]': "no module 'model.layers.4'",
        json.dumps([["a." * 1_000_000]]): "no module 'a.a.a",
    },
    "accelerate": {
        "0": "0 is a JSON int",
        "{}": "'model.embed_tokens' has no place",
        '{"model": 0}': "'lm_head' has no place",
        '{"model": 0, "model": 1, "lm_head": 1}': "'model' stands twice",
        '{"model": 0, "lm_head": "disk"}': "offloaded",
        '{"model": 0, "lm_head": -1}': "'lm_head' is on -1; give",
        '{"model": 0, "lm_head": true}': "is on True",
        '{"model": 0, "lm_head": [1]}': r"is on \[1\]",
        '{"model": 0, "lm_head": "GPU"}': "is on 'GPU'",
        '{"model": 0, "lm_head": 1, "transformer.wte": 0}': "no module 'transformer.wte'",
        '{"": 0, "model.layers.1": 1}': "'model.layers.2' is in place 0 again, after 1",
        '{"": 0, "model.layers.3.mlp": 1}': "model.layers.3 is spread over \\['0', '1'\\]",
    },
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_wrong_texts_are_named(name: str, text: str) -> None:
    with pytest.raises(PartitionFormatError, match=WRONG[name][text]) as caught:
        import_partition(text, chain(4), name, model_type="llama")
    assert str(caught.value).startswith(f"{name}: ")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", FORMATS)
def test_texts_of_any_size_are_bounded(name: str) -> None:
    with pytest.raises(PartitionFormatError, match=f"at most {MAX_CHARACTERS} are read"):
        import_partition("1" * (MAX_CHARACTERS + 1), chain(4), name, model_type="llama")
    with pytest.raises(PartitionFormatError) as caught:
        import_partition("1," * (MAX_CHARACTERS // 2), chain(4), name, model_type="llama")
    assert len(str(caught.value)) < 600


def test_the_number_of_stages_is_checked() -> None:
    with pytest.raises(PartitionFormatError, match=r"vllm: '2,1,1' has 3 stages, but 4 are wanted"):
        import_partition("2,1,1", chain(4), "vllm", num_stages=4)
    with pytest.raises(PartitionFormatError, match=r"megatron: .* has 4 stages, but 2 are wanted; .*several stages"):
        import_partition("Et|t|t|tL", chain(4), "megatron", num_stages=2)


@pytest.mark.parametrize("name", FORMATS)
@STEADY
@given(data=st.data())
def test_a_mutated_text_is_a_partition_or_a_typed_error(name: str, data: st.DataObject) -> None:
    layers = chain(data.draw(st.integers(1, 6)), halves=data.draw(st.booleans()))
    cut = Cut(layers, data.draw(boundaries_over(len(layers))))
    model_type = data.draw(st.sampled_from(["llama", "gpt2", "falcon"]))
    assume(can_express(cut, name))
    text = export_partition(cut, name, model_type=model_type)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 6)))
        junk = st.text(alphabet='EtLm|(*),[]{}":.0123456789- \x00é', max_size=6)
        piece = data.draw(junk | st.just(text[start:stop]))
        text = text[:start] + piece + text[data.draw(st.sampled_from([start, stop])) :]
    try:
        boundaries = import_partition(text, layers, name, model_type=model_type)
    except PartitionFormatError:
        return
    assert boundaries[0] == 0
    assert boundaries[-1] == len(layers)
    assert all(low < high for low, high in itertools.pairwise(boundaries))
    assert can_express(Cut(layers, boundaries), name)
