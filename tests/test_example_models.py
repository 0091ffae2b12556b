"""The example model, tokenizer and text: they load, agree, and are the same every time."""

import filecmp
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).parent.parent / "examples"
REFERENCE = EXAMPLES / "dense16"
SMALL = REFERENCE / "small"
TEXT = EXAMPLES / "text" / "alice.txt"

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Run the script's `main`: `make(config, *options)` gives the directory it wrote."""
    sys.path.insert(0, str(REFERENCE))
    try:
        script = importlib.import_module("make_model")
    finally:
        sys.path.remove(str(REFERENCE))

    def run(config: Path, *options: str, output: Path | None = None) -> Path:
        output = output or tmp_path_factory.mktemp("models") / "model"
        script.main([str(config), str(output), *options])
        return output

    return run


@pytest.fixture(scope="module")
def small(make: Make) -> Path:
    return make(SMALL)


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(small)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_small_model_loads_whole_and_scores_the_text(small: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(small, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 16
    batch = tokenizer(TEXT.read_text("utf-8").splitlines()[1], return_tensors="pt")
    with torch.inference_mode():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert 4 < loss.item() < 8  # a uniform guess is ln 264 = 5.6


def test_small_model_generates(small: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    batch = tokenizer("Alice", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 10)
    assert model.generation_config.pad_token_id == 256


def test_weights_have_the_models_own_scale(small: Path) -> None:
    tensors = tensors_of(small)
    matrix = tensors["model.layers.3.mlp.c_fc.weight"]
    assert matrix.std().item() == pytest.approx(0.018042, rel=0.01)
    assert matrix.mean().item() == pytest.approx(0, abs=2e-4)
    assert not torch.equal(matrix, tensors["model.layers.4.mlp.c_fc.weight"])
    assert (tensors["model.norm.weight"] == 1).all()
    assert (tensors["model.norm.bias"] == 0).all()


def test_ids_are_the_bytes_after_one_leading_token(tokenizer: PreTrainedTokenizerBase) -> None:
    lines = TEXT.read_text("utf-8").splitlines()
    for line, ids in zip(lines, tokenizer(lines)["input_ids"], strict=True):
        assert ids == [256, *line.encode()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == line


@pytest.mark.parametrize(
    "text", ["", " two  spaces ,and . stops", "\ttab\r\nline", "é 日本 🐇", "".join(map(chr, range(0x800)))]
)
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_are_one(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 257
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {256}
    assert tokenizer.model_max_length == 2048


def test_text_is_one_document_to_a_line() -> None:
    lines = TEXT.read_text("ascii").splitlines()
    assert 30_000 <= TEXT.stat().st_size <= 40_000
    assert all(line and line == line.strip() and len(line) < 1500 for line in lines)
    assert min(map(len, lines)) < 40
    assert max(map(len, lines)) > 900
    assert "gutenberg" not in TEXT.read_text("ascii").lower()


def test_reference_layer_is_twelve_hidden_squared() -> None:
    config = AutoConfig.from_pretrained(REFERENCE)
    assert config.dtype == torch.float16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    norms = 2 * (8192 + 8192)  # two LayerNorms, each a weight and a bias
    assert len(model.model.layers) == 16
    for layer in model.model.layers:
        assert sum(parameter.numel() for parameter in layer.parameters()) == 12 * 8192**2 + norms
        assert layer.self_attn.head_dim == 512
    ends = 2 * 264 * 8192 + 2 * 8192  # embedding and head, last norm
    assert sum(parameter.numel() for parameter in model.parameters()) == 16 * (12 * 8192**2 + norms) + ends


def test_small_configuration_differs_only_in_size() -> None:
    reference, small = (json.loads((path / "config.json").read_text()) for path in (REFERENCE, SMALL))
    differing = {key for key in reference.keys() | small.keys() if reference.get(key) != small.get(key)}
    assert differing == {"hidden_size", "intermediate_size", "max_position_embeddings", "dtype"}


def test_shards_hold_the_same_tensors(make: Make, small: Path) -> None:
    sharded = make(SMALL, "--shard-gb", "0.004")
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 10
    assert not (sharded / "model.safetensors").exists()
    assert not (small / "model.safetensors.index.json").exists()
    one, many = tensors_of(small), tensors_of(sharded)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    _, info = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not any(info.values())


def test_twice_is_the_same_and_another_seed_is_not(make: Make, small: Path) -> None:
    again, other = make(SMALL), make(SMALL, "--seed", "1")
    names = sorted(path.name for path in small.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert filecmp.cmpfiles(small, again, names, shallow=False) == (names, [], [])
    assert not filecmp.cmp(small / "model.safetensors", other / "model.safetensors", shallow=False)
    assert [path.name for path in again.parent.iterdir()] == [again.name]  # nothing temporary stays


def test_fewer_layers_are_the_first_layers(make: Make, small: Path) -> None:
    short = make(SMALL, "--layers", "2")
    assert AutoConfig.from_pretrained(short).num_hidden_layers == 2
    whole, part = tensors_of(small), tensors_of(short)
    assert sum(name.endswith("q_proj.weight") for name in part) == 2
    assert all(torch.equal(whole[name], tensor) for name, tensor in part.items())


def test_precision_can_be_chosen(make: Make) -> None:
    half = make(SMALL, "--dtype", "float16", "--layers", "1")
    assert {tensor.dtype for tensor in tensors_of(half).values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.float16


def test_any_decoder_will_do(make: Make, tmp_path: Path) -> None:
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    made = make(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(info.values())
    assert "lm_head.weight" not in tensors_of(made)
    assert AutoTokenizer.from_pretrained(made)("a")["input_ids"] == [256, 97]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "greater than 0"),
        (["--shard-gb", "0"], "greater than 0"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_refused_options(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as refusal:
        make(SMALL, *options, output=tmp_path / "model")
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_gpu_is_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        make(SMALL, "--device", "cuda", output=tmp_path / "model")
    assert "torch sees no GPU" in capsys.readouterr().err


def test_existing_output_is_refused_and_kept(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        make(SMALL, output=tmp_path)
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json in"),
        ("not json", "is not a configuration"),
        ('{"model_type": "nonesuch"}', "is not a configuration"),
        (
            '{"model_type": "starcoder2", "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 1}',
            "needs 257",
        ),
    ],
)
def test_bad_configurations_are_refused(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path, output=tmp_path / "model")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_interruption_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("make_model.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make(SMALL, output=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_documents_for_measurements_have_the_length_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "documents.jsonl"
    command = [sys.executable, str(EXAMPLES / "text" / "make_documents.py"), str(output)]
    subprocess.run([*command, "--count", "7", "--characters", "2047"], check=True)
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == list(range(7))
    assert {len(record["text"]) for record in records} == {2047}
    assert len({record["text"] for record in records}) == 7
