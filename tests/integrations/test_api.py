"""`load` in one process and in four, against the unpartitioned Hugging Face model."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from api_cases import NEW_TOKENS, PROMPTS, SAMPLING, SEED, TEXTS, plan_of
from commands import BIN, Start
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lp_plugin import (
    Cluster,
    DeepSpeedConfigError,
    DocumentError,
    InvalidInputError,
    LpPluginError,
    ModelConfigError,
    ModelProfile,
    PlanFileError,
    RuntimeEnvironmentError,
    UnsupportedModelError,
    WeightsError,
    WorkloadError,
    save_plan,
)
from lp_plugin.integrations.transformers import load
from lp_plugin.integrations.transformers.model import PipelinedModel

CASES = Path(__file__).with_name("api_cases.py")
SCORED = ("stages", "halves", "tensor-parallel", "timed, tensor-parallel", "replicas")
BOUNDARIES = {"stages": [0, 1, 3, 5, 6], "halves": [0, 2, 4, 5, 9], "tensor-parallel": [0, 3, 6]}


@pytest.fixture(scope="module")
def llama(text_models: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(text_models / "llama").eval()


@pytest.fixture(scope="module")
def expected(text_models: Path, llama: Any) -> dict[str, Any]:
    """What the unpartitioned model makes of each text or prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(text_models / "llama")
    encoder = AutoModel.from_pretrained(text_models / "bert").eval()
    found: dict[str, Any] = {name: [] for name in ("scores", "embeddings", "encoded", "greedy", "sampled")}
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = llama(ids).logits[0, :-1].double().log_softmax(dim=-1)
            found["scores"].append(logits.gather(1, ids[0, 1:, None]).sum().item())
            found["embeddings"].append(llama.model(ids).last_hidden_state[0].mean(dim=0).tolist())
            found["encoded"].append(encoder(ids).last_hidden_state[0].mean(dim=0).tolist())
    for index, prompt in enumerate(PROMPTS):
        for name, options in (("greedy", {"do_sample": False}), ("sampled", SAMPLING)):
            torch.manual_seed(SEED + index)
            tokens = llama.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, pad_token_id=0, **options)
            found[name].append(tokens[0, len(prompt) :].tolist())
    return found


# --- one process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(text_models: Path, own_process: None) -> Iterator[PipelinedModel]:
    with load(text_models / "llama") as model:
        yield model


def test_one_process_is_one_stage(loaded: PipelinedModel, expected: dict[str, Any]) -> None:
    assert loaded.plan.boundaries == (0, 6)
    assert loaded.score(TEXTS) == pytest.approx(expected["scores"], rel=1e-6, abs=1e-6)
    embeddings = loaded.embed(TEXTS)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, torch.tensor(expected["embeddings"]), rtol=1e-4, atol=1e-5)
    assert loaded.generate(PROMPTS, max_new_tokens=NEW_TOKENS) == expected["greedy"]
    assert loaded.generate(PROMPTS, max_new_tokens=NEW_TOKENS, seed=SEED, **SAMPLING) == expected["sampled"]


def test_texts_are_continued_and_streamed(loaded: PipelinedModel, text_models: Path, llama: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_models / "llama")
    pieces: dict[int, list[str]] = {}
    texts = loaded.generate(
        TEXTS, max_new_tokens=12, on_text=lambda index, piece: pieces.setdefault(index, []).append(piece)
    )
    for index, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        whole = llama.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert texts[index] == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert "".join(pieces[index]) == texts[index]
    assert max(map(len, pieces.values())) > 1


def test_a_saved_model_is_the_same(loaded: PipelinedModel, llama: Any, tmp_path: Path) -> None:
    loaded.save(tmp_path / "saved")
    assert_same_tensors(tmp_path / "saved", llama)


def assert_same_tensors(directory: Path, model: Any) -> None:
    again = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda model: model.score([]), WorkloadError, "at least one"),
        (lambda model: model.score("text"), WorkloadError, "a list of strings"),
        (lambda model: model.embed(["a", 1]), WorkloadError, "a list of strings"),
        (lambda model: model.score(["a", "x" * 200]), DocumentError, "document 1 has 201 tokens"),
        (lambda model: model.generate([], max_new_tokens=1), WorkloadError, "at least one"),
        (lambda model: model.generate("text", max_new_tokens=1), WorkloadError, "a list of strings, or of lists"),
        (lambda model: model.generate([1, 2], max_new_tokens=1), WorkloadError, "a list of strings, or of lists"),
        (lambda model: model.generate([[1], "a"], max_new_tokens=1), WorkloadError, "a list of strings, or of lists"),
        (lambda model: model.generate([[1], []], max_new_tokens=1), WorkloadError, "prompt 1 is empty"),
        (lambda model: model.generate([[1], [2] * 127], max_new_tokens=2), WorkloadError, "prompt 1 has 127 tokens"),
        (lambda model: model.generate([[1]], max_new_tokens=0), WorkloadError, "a whole number of at least 1"),
        (lambda model: model.generate([[1]], max_new_tokens=None), WorkloadError, "max_new_tokens is None"),
        (lambda model: model.generate(None, max_new_tokens=1), WorkloadError, "a list of strings, or of lists"),
        (lambda model: model.generate([[999]], max_new_tokens=1), WorkloadError, "tokens from 999 to 999"),
        (lambda model: model.generate([[1]], max_new_tokens=1, top_q=3), WorkloadError, "top_q: no such option"),
        (lambda model: model.generate([[1]], max_new_tokens=1, num_beams=4), WorkloadError, "num_beams"),
        (lambda model: model.generate([[1]], max_new_tokens=1, seed=1.5), WorkloadError, "seed is 1.5"),
        (lambda model: model.generate([[1]], max_new_tokens=1, seed=-1), WorkloadError, "seed is -1"),
    ],
)
def test_bad_input_is_refused(loaded: PipelinedModel, call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(loaded)


def test_encoders_embed_alone(text_models: Path, own_process: None, expected: dict[str, Any]) -> None:
    with load(text_models / "bert") as model:
        torch.testing.assert_close(model.embed(TEXTS), torch.tensor(expected["encoded"]), rtol=1e-4, atol=1e-5)
        with pytest.raises(UnsupportedModelError, match="it can't score"):
            model.score(TEXTS)
        with pytest.raises(UnsupportedModelError, match="it can't generate"):
            model.generate(TEXTS, max_new_tokens=1)


def test_a_model_saved_without_its_head_embeds(
    text_models: Path, own_process: None, expected: dict[str, Any], llama: Any, tmp_path: Path
) -> None:
    llama.model.save_pretrained(tmp_path)
    for file in (text_models / "llama").glob("*token*"):
        shutil.copy(file, tmp_path)
    with load(tmp_path) as model:
        embeddings = model.embed(TEXTS)
        torch.testing.assert_close(embeddings, torch.tensor(expected["embeddings"]), rtol=1e-4, atol=1e-5)
        with pytest.raises(UnsupportedModelError, match="saved without its head"):
            model.generate(TEXTS, max_new_tokens=1)


def test_a_closed_model_is_gone_and_says_so(text_models: Path, own_process: None) -> None:
    model = load(text_models / "llama")
    weights = weakref.ref(model._module.stage)
    model.close()
    model.close()
    assert weights() is None
    with pytest.raises(RuntimeEnvironmentError, match="closed"):
        model.score(["a"])
    with pytest.raises(RuntimeEnvironmentError, match="closed"):
        _ = model.plan


def test_configuration_and_plan_are_used(text_models: Path, own_process: None, tmp_path: Path) -> None:
    """A plan's path, in the section or as an argument; precision and rows from the rest; what trains is left out."""
    plan = plan_of(text_models / "llama", (0, 9), sublayer=True)
    save_plan(plan, tmp_path / "plan.json")
    with load(text_models / "llama", tmp_path / "plan.json") as model:
        assert model.plan == plan
        assert model.plan.granularity == "sublayer"
    training = {"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 1}, "train_batch_size": 6}
    config = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}
    section = {"sequence": 16, "device": "h200", "phase": "decode", "objective": "memory"}
    (tmp_path / "ds.json").write_text(json.dumps(config | training | {"lp_plugin": section}), encoding="utf-8")
    with load(text_models / "llama", config=tmp_path / "ds.json") as model:
        assert model.plan.dtype == "bfloat16"
        assert (model.plan.workload.micro_batch, model.plan.workload.sequence) == (3, 16)
        assert (model.plan.workload.phase, model.plan.objective) == ("decode", "memory")
        assert model.plan.stages[0].device == "h200"
        assert len(model.generate(PROMPTS, max_new_tokens=3)) == len(PROMPTS)


# --- what is wrong before anything runs ---------------------------------------------------------------------------


def refused_models(folder: Path, models: Path) -> list[tuple[Path, dict[str, Any], type[LpPluginError], str]]:
    """A directory, arguments, and the error that they give."""
    llama = models / "llama"

    def changed(name: str, **values: Any) -> Path:
        shutil.copytree(llama, folder / name)
        config = json.loads((llama / "config.json").read_text(encoding="utf-8")) | values
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder / name

    bare = changed("bare")
    (bare / "model.safetensors").unlink()
    planned = plan_of(llama, (0, 3, 6))
    other = plan_of(models / "bert", (0, 5))
    return [
        (folder / "nowhere", {}, ModelConfigError, "nowhere does not exist"),
        (changed("mpt", model_type="mpt"), {}, UnsupportedModelError, "mpt"),
        (bare, {}, WeightsError, "holds no weights"),
        (llama, {"dtype": "float16"}, RuntimeEnvironmentError, "float16 needs a GPU"),
        (llama, {"dtype": "int3"}, ModelConfigError, "int3"),
        (llama, {"num_stages": 0}, WorkloadError, "num_stages is 0"),
        (llama, {"data_parallel": 0}, WorkloadError, "data_parallel is 0"),
        (llama, {"num_stages": 2}, RuntimeEnvironmentError, "1 processes for 2 stages"),
        (llama, {"plan": planned}, RuntimeEnvironmentError, "1 processes for 2 stages"),
        (llama, {"plan": planned, "num_stages": 1}, PlanFileError, "leave it out"),
        (llama, {"plan": other}, PlanFileError, "was made for bert"),
        (llama, {"plan": planned, "dtype": "bfloat16"}, PlanFileError, "made for float32"),
        (llama, {"config": {"lp_plugin": {"method": "uniform"}}}, DeepSpeedConfigError, "uniform"),
        (llama, {"config": {"lp_plugin": {"phase": "train"}}}, DeepSpeedConfigError, "train"),
        (llama, {"config": {"lp_plugin": {"mehtod": "profile"}}}, DeepSpeedConfigError, "mehtod"),
    ]


def test_what_is_wrong_is_said(text_models: Path, own_process: None, tmp_path: Path) -> None:
    for directory, arguments, error, said in refused_models(tmp_path, text_models):
        with pytest.raises(error, match=said):
            load(directory, **arguments)


def test_a_plan_for_stored_weights_or_training_is_refused(text_models: Path, own_process: None) -> None:
    from lp_plugin import Workload, make_plan

    profile = ModelProfile.from_config(text_models / "llama", weight_dtype="int8")
    workload = Workload(batch=1, sequence=8)
    with pytest.raises(PlanFileError, match="int8"):
        load(text_models / "llama", make_plan(profile, Cluster.homogeneous("h200", 1), workload))
    profile = ModelProfile.from_config(text_models / "llama")
    with pytest.raises(InvalidInputError, match="training"):
        load(
            text_models / "llama",
            make_plan(profile, Cluster.homogeneous("h200", 1), Workload(phase="train", batch=1, sequence=8)),
        )


# --- four processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(start: Start, text_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """What each of four processes got, and where."""
    folder = tmp_path_factory.mktemp("four")
    start(BIN / "torchrun", "--standalone", "--nproc-per-node=4", CASES, text_models, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(4)], folder


@pytest.mark.parametrize("name", SCORED)
def test_pipelines_give_what_the_whole_model_gives(
    four: tuple[list[Any], Path], expected: dict[str, Any], name: str
) -> None:
    for result in (rank[name] for rank in four[0]):  # every process has every result
        assert result.get("message") is None
        assert result["boundaries"] == BOUNDARIES.get(name, result["boundaries"])
        assert result["scores"] == pytest.approx(expected["scores"], rel=1e-6, abs=1e-6)
        assert result["scores again"] == pytest.approx(expected["scores"][:2], rel=1e-6, abs=1e-6)
        embeddings = torch.tensor(result["embeddings"])
        torch.testing.assert_close(embeddings, torch.tensor(expected["embeddings"]), rtol=1e-4, atol=1e-5)
        assert result["greedy"] == expected["greedy"]
        assert result["sampled"] == expected["sampled"]


def test_tokens_are_streamed_by_the_first_process_of_each_pipeline(
    four: tuple[list[Any], Path], expected: dict[str, Any]
) -> None:
    every = [[index, tokens] for index, tokens in enumerate(expected["greedy"])]
    for name in ("stages", "halves", "tensor-parallel"):
        assert [rank[name]["heard"] for rank in four[0]] == [every, [], [], []]
    assert [rank["replicas"]["heard"] for rank in four[0]] == [every[::2], every[1::2], [], []]


def test_a_model_in_four_parts_is_saved_whole(four: tuple[list[Any], Path], llama: Any) -> None:
    assert_same_tensors(four[1] / "saved", llama)


def test_encoder_in_four_processes(four: tuple[list[Any], Path], expected: dict[str, Any]) -> None:
    for rank in four[0]:
        embeddings = torch.tensor(rank["encoder"]["embeddings"])
        torch.testing.assert_close(embeddings, torch.tensor(expected["encoded"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("other number of stages", "WorldSizeError", "4 processes for 3 stages"),
        ("not a divisor", "WorldSizeError", "start a multiple of 3"),
        ("heads that can't be shared", "WorkloadError", "heads"),
        ("an option, no prompt for most", "WorkloadError", "`temperature` (=-1.0)"),
        ("no plan of transformers", "UnsupportedModelError", "bert"),
    ],
)
def test_every_process_refuses(four: tuple[list[Any], Path], name: str, error: str, said: str) -> None:
    for rank in four[0]:
        assert rank[name]["error"] == error
        assert said in rank[name]["message"]
