"""Loading against transformers' own: any layout and precision that it accepts, and the memory it takes."""

from __future__ import annotations

import ctypes
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Saved, Tensors, changed, expected, loaded, refusals, scored
from families import BERT, FAMILIES, make_batch, make_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertForMaskedLM, PretrainedConfig

from lp_plugin.errors import UnsupportedModelError
from lp_plugin.integrations.transformers.checkpoint import weight_files
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.materialize import materialize
from lp_plugin.integrations.transformers.weights import load_stage

EXPERTS = ("mixtral", "qwen3_moe")
TIED = ("llama-tied", "gemma2", "gpt2", "opt", "bloom", "falcon")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_of_the_bare_decoder_loads(saved: Saved, tmp_path: Path, family: str) -> None:
    """Names without the decoder's prefix, as gpt2's on the hub, and no head unless it is tied."""
    _, model = saved[family]
    model.base_model.save_pretrained(tmp_path / "bare")
    hidden = scored(model.config, tmp_path / "bare", head=False)
    with torch.no_grad():
        assert torch.equal(hidden, model.base_model(make_batch("none", 0)[0], use_cache=False).last_hidden_state)
    if model.config.tie_word_embeddings:
        assert torch.equal(scored(model.config, tmp_path / "bare"), expected(model))


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_gpt_neox_head_under_both_names(saved: Saved, tmp_path: Path, head: str) -> None:
    directory, model = saved["gpt_neox"]
    names = {"embed_out.weight": head, "lm_head.weight": head}
    renamed = changed(
        directory, lambda tensors: {names.get(name, name): tensors[name] for name in tensors}, tmp_path / "renamed"
    )
    assert [name for name in weight_files(renamed) if name in names] == [head]
    assert torch.equal(scored(model.config, renamed), expected(model))


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_load_from_either_layout(saved: Saved, tmp_path: Path, family: str) -> None:
    directory, model = saved[family]
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert len(weight_files(directory)) > len(weight_files(tmp_path / "fused"))
    for each in (directory, tmp_path / "fused"):
        assert torch.equal(scored(model.config, each), expected(model))


def test_missing_and_misshapen_experts_are_named(saved: Saved, tmp_path: Path) -> None:
    directory, model = saved["mixtral"]
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    lacking = changed(directory, lambda tensors: {key: tensors[key] for key in tensors.keys() - {name}}, tmp_path / "x")
    (message,) = refusals(model.config, lacking)
    assert "has 3 tensors like *.experts.*.w3.weight for model.layers.1.mlp.experts.gate_up_proj" in message
    assert "asks for 4" in message
    short = changed(directory, lambda tensors: tensors | {name: torch.zeros(127, 64)}, tmp_path / "y")
    (message,) = refusals(model.config, short)
    assert f"{name} has shape (127, 64), but the config asks for (128, 64)" in message


def test_bert_loads_from_an_old_checkpoint_with_its_head(tmp_path: Path) -> None:
    """Norms' old names, the prefix, pooler and head of pretraining, and buffers that were stored."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **BERT, num_hidden_layers=3)
    BertForMaskedLM(config).save_pretrained(tmp_path / "new")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(tensors: Tensors) -> Tensors:
        renamed = {}
        for name, tensor in tensors.items():
            end = next((end for end in names if name.endswith(end)), None)
            renamed[name if end is None else name.removesuffix(end) + names[end]] = tensor
        more = {"bert.embeddings.position_ids": torch.arange(64)[None], "bert.pooler.dense.bias": torch.zeros(64)}
        return renamed | more

    directory = changed(tmp_path / "new", old, tmp_path / "old")
    model = AutoModel.from_pretrained(tmp_path / "new", add_pooling_layer=False).eval()
    ids, mask = make_batch("right", 0)
    value: Any = (ids, mask)
    with torch.no_grad():
        for bounds in ((0, 2), (2, num_layers(config))):
            value = loaded(config, directory, *bounds)(value)
        assert torch.equal(value, model(ids, attention_mask=mask).last_hidden_state)


# --- tied matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("stored", ["both", "head", "embedding"])
def test_tied_matrix_stored_under_either_name_or_both_is_held_once(
    saved: Saved, tmp_path: Path, family: str, stored: str
) -> None:
    directory, model = saved[family]
    ((head, embedding),) = model.all_tied_weights_keys.items()

    kept = {"both": (head, embedding), "head": (head,), "embedding": (embedding,)}[stored]

    def stored_so(tensors: Tensors) -> Tensors:
        others = {name: tensors[name] for name in tensors.keys() - {head, embedding}}
        return others | {name: tensors[embedding].clone() for name in kept}

    directory = changed(directory, stored_so, tmp_path / "stored")
    stage = loaded(model.config, directory, 0, num_layers(model.config))
    assert stage.model.get_output_embeddings().weight is stage.model.get_input_embeddings().weight
    assert torch.equal(scored(model.config, directory), expected(model))


def test_head_of_its_own_although_the_config_ties(saved: Saved, tmp_path: Path) -> None:
    """As transformers loads it: untied."""
    directory, model = saved["llama-tied"]
    own = changed(
        directory,
        lambda tensors: tensors | {"lm_head.weight": torch.randn(97, 64, dtype=torch.float32)},
        tmp_path / "own",
    )
    untied = AutoModelForCausalLM.from_pretrained(own).eval()
    assert not torch.equal(expected(untied), expected(model))
    assert torch.equal(scored(model.config, own), expected(untied))
    assert torch.equal(loaded(model.config, own, 0, 6)(make_batch("none", 0)[0]), expected(untied))


# --- precision and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_and_buffers_are_transformers(saved: Saved, family: str, dtype: torch.dtype) -> None:
    """Also that rotary frequencies stay in float32."""
    directory, _ = saved[family]
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    count = num_layers(whole.config)
    found: Tensors = {}
    value: Any = make_batch("left", 0)
    with torch.no_grad():
        for bounds in itertools.pairwise((0, 1, 3, count)):
            stage = DecoderStage(whole.config, *bounds)
            load_stage(stage, directory, "cpu", dtype)
            value = stage.eval()(value)
            for name, tensor in itertools.chain(stage.model.named_parameters(), stage.model.named_buffers()):
                found[stage.checkpoint_name(name)] = tensor
        if dtype == torch.bfloat16:
            assert torch.equal(value, whole(make_batch("left", 0)[0], attention_mask=make_batch("left", 0)[1]).logits)
    theirs = dict(itertools.chain(whole.named_parameters(remove_duplicate=False), whole.named_buffers()))
    assert theirs.keys() == found.keys()
    for name, tensor in theirs.items():
        if not name.endswith("embed_scale"):  # which transformers rounds before it is used, we after
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
def test_any_stored_precision_is_converted(saved: Saved, tmp_path: Path, stored: torch.dtype) -> None:
    directory, model = saved["llama"]
    other = changed(
        directory, lambda tensors: {name: tensors[name].to(stored) for name in tensors}, tmp_path / "converted"
    )
    whole = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    assert torch.equal(scored(model.config, other), expected(whole))


def test_precision_that_cannot_be_converted_is_named(single: tuple[Path, PretrainedConfig], tmp_path: Path) -> None:
    directory, config = single
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt = changed(directory, lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "x")
    (message,) = refusals(config, spoilt)
    assert f"{name} is stored as F8_E4M3, but only F64, F32, F16, BF16" in message


def test_buffer_that_cannot_be_recomputed_is_refused() -> None:
    stage = DecoderStage(make_config("llama", 3), 0, 2)
    stage.model.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM holds the buffer 'table'"):
        materialize(stage, "cpu", torch.float32)


WIDE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 256, "num_attention_heads": 8}
MANY = WIDE | {"intermediate_size": 2048, "num_local_experts": 8}


@pytest.mark.parametrize(
    ("family", "values", "stored", "held"),
    [
        ("llama", WIDE | {"num_hidden_layers": 6}, torch.bfloat16, torch.bfloat16),
        ("llama", WIDE | {"num_hidden_layers": 4}, torch.float32, torch.bfloat16),
        ("mixtral", MANY | {"num_hidden_layers": 2}, torch.bfloat16, torch.bfloat16),
    ],
    ids=["dense", "converted", "experts"],
)
def test_host_memory_stays_within_a_fifth_of_the_share(
    tmp_path: Path, family: str, values: dict[str, Any], stored: torch.dtype, held: torch.dtype
) -> None:
    """By the kernel's own high-water mark of the process, which counts mapped files too."""
    config = AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=stored)
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    del model
    stage = DecoderStage(config, 1, 1 + config.num_hidden_layers // 2)
    share = sum(parameter.numel() for parameter in stage.parameters()) * held.itemsize
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, and not be seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    load_stage(stage, tmp_path, "cpu", held)
    assert share > 80 * 2**20
    assert 0.8 * share < resident("VmHWM") - before <= 1.2 * share


def resident(what: str) -> int:
    """A line of the process's status, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{what}:"))) * 1024
