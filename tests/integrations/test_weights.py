"""Loading against transformers' own: any layout that it accepts, a stage's own tensors alone, and what is refused."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BERT, FAMILIES, make_batch, make_config, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertForMaskedLM, PretrainedConfig, PreTrainedModel

from lp_plugin.errors import UnsupportedModelError, WeightsError
from lp_plugin.integrations.transformers.checkpoint import new_buffer, read_headers, weight_files
from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.materialize import materialize
from lp_plugin.integrations.transformers.weights import check_checkpoint, load_stage

Saved = dict[str, tuple[Path, PreTrainedModel]]
Tensors = dict[str, torch.Tensor]
EXPERTS = ("mixtral", "qwen3_moe")
TIED = ("llama-tied", "gemma2", "gpt2", "opt", "bloom", "falcon")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Family -> directory and model with 3 blocks."""
    folder = tmp_path_factory.mktemp("three")
    made = {}
    for family in FAMILIES:
        model = make_model(make_config(family, 3))
        model.save_pretrained(folder / family)
        made[family] = (folder / family, model)
    return made


@pytest.fixture
def sharded(saved: Saved, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A llama directory of many small shards."""
    model = saved["llama"][1]
    model.save_pretrained(tmp_path / "sharded", max_shard_size="64KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 3
    return tmp_path / "sharded", model


@pytest.fixture
def single(saved: Saved, tmp_path: Path) -> tuple[Path, PretrainedConfig]:
    """A llama directory to spoil, and its configuration."""
    directory, model = saved["llama"]
    shutil.copytree(directory, tmp_path / "llama")
    return tmp_path / "llama", model.config


def loaded(config: PretrainedConfig, directory: Path, start: int, stop: int, **options: Any) -> DecoderStage:
    stage = DecoderStage(config, start, stop, **options)
    load_stage(stage, directory, "cpu", torch.float32)
    return stage.eval()


def scored(config: PretrainedConfig, directory: Path, **options: Any) -> torch.Tensor:
    """Logits of a batch, by uneven stages."""
    count = num_layers(config)
    value: Any = make_batch("none", 0)[0]
    with torch.no_grad():
        for bounds in itertools.pairwise((0, 2, count - 1, count)):
            value = loaded(config, directory, *bounds, **options)(value)
    return value


def expected(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(make_batch("none", 0)[0], use_cache=False).logits


def changed(directory: Path, change: Callable[[Tensors], Tensors], target: Path) -> Path:
    """A copy of a model directory with its tensors replaced by ``change(tensors)``."""
    shutil.copytree(directory, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


def refusals(config: PretrainedConfig, directory: Path) -> set[str]:
    """What `check_checkpoint` and the loading of each single layer say."""
    attempts: list[Callable[[], Any]] = [lambda: check_checkpoint(config, directory)]
    attempts += [lambda layer=layer: loaded(config, directory, layer, layer + 1) for layer in range(num_layers(config))]
    messages = set()
    for attempt in attempts:
        with pytest.raises(WeightsError) as caught:
            attempt()
        messages.add(str(caught.value))
    return messages


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


# --- layouts -----------------------------------------------------------------------------------------------------


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
