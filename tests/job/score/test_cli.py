"""``lp-plugin plan | explain | run`` in this process: what is printed, written and refused before a rank starts."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

import lp_plugin
from lp_plugin import Cluster, ModelProfile, Workload, make_plan, save_plan
from lp_plugin.planfile import load_plan
from lp_plugin.score.batches import pad_length
from lp_plugin.score.job import prepare

REFERENCE = Path(__file__).parents[3] / "examples" / "dense16"

Main = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def squeezed(text: str) -> str:
    """Without line breaks and runs of blanks."""
    return " ".join(text.split())


# --- plan --------------------------------------------------------------------------------------------------------


def planned(main: Main, devices: int, *options: object) -> str:
    cluster = ("--cluster", f"h100-sxm:{devices}", "--batch", 1024, "--sequence", 10_000)
    code, out, err = main("plan", REFERENCE, *cluster, *options)
    assert (code, err) == (0, "")
    return out


def test_16_devices_have_a_block_each(main: Main) -> None:
    out = planned(main, 16)
    text = squeezed(out)
    assert "dense16 in float16, prefill: batch 1024 x sequence 10000, micro-batch 1, 16 stages" in text
    assert "boundaries [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19]" in text
    assert "block 0-15, each 1.61 GB 164 MB" in text  # footprint of each layer
    assert "no partition at this granularity can stay in L2" in text
    assert "The batch must be cut" in text
    assert "168 GB" in text  # its activation in one piece
    assert "<- slowest" in text
    assert "throughput" in text
    assert "bubble" in text


def test_12_devices_gain_nothing_over_8(main: Main) -> None:
    twelve, eight = squeezed(planned(main, 12)), squeezed(planned(main, 8))
    assert "12 devices gain nothing over 8" in twelve
    assert "gain nothing" not in eight
    assert "boundaries [0, 3, 5, 7, 9, 11, 13, 15, 19]" in eight
    bottleneck = "bottleneck "
    seconds = [text[text.index(bottleneck) :].split()[1:3] for text in (twelve, eight)]
    assert seconds[0] == seconds[1]


def test_plan_file_loads_and_explains(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    out = planned(main, 8, "-o", path)
    assert f"plan written to {path}" in squeezed(out)
    plan = load_plan(path)
    assert plan.num_stages == 8
    assert plan.boundaries == (0, 3, 5, 7, 9, 11, 13, 15, 19)
    assert f"boundaries   {list(plan.boundaries)}" in out

    code, explained, err = main("explain", path)
    assert (code, err) == (0, "")
    picture = tmp_path / "plan.png"
    assert f"picture written to {picture}" in squeezed(explained)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    printed = {line.strip() for line in out.splitlines()}  # also the tiers, which only the cluster knows
    shown = [line.strip() for line in explained.splitlines() if "picture written" not in line]
    assert set(shown) - {"", str(picture)} <= printed
    assert "bottleneck" in explained

    for name, start in (("other.svg", b"<?xml"), ("other.pdf", b"%PDF")):
        assert main("explain", path, "--picture", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_bytes().startswith(start)


def test_fewer_stages_and_a_given_micro_batch(main: Main) -> None:
    text = squeezed(planned(main, 8, "--stages", 4, "--micro-batch", 2, "--dtype", "bfloat16"))
    assert "dense16 in bfloat16, prefill: batch 1024 x sequence 10000, micro-batch 2, 4 stages" in text


def test_a_model_that_cannot_fit_shows_where_and_what_would(main: Main) -> None:
    cluster = ("--cluster", "h100-sxm:4", "--batch", 1024, "--sequence", 10_000, "--phase", "decode")
    code, out, err = main("plan", REFERENCE, *cluster)
    assert (code, out) == (2, "")
    assert err.startswith("error: dense16 does not fit 4 x h100-sxm in decode")
    rows = [line for line in err.splitlines() if "<- does not fit" in line]
    assert rows
    assert all("TB" in row for row in rows)
    assert "KV cache" in err
    remedies = squeezed(err[err.index("What would fit") :])
    assert "--batch" in remedies
    batch = remedies.split("--batch ")[1].split()[0]
    again = ("--cluster", "h100-sxm:4", "--batch", batch, "--sequence", 10_000, "--phase", "decode")
    assert main("plan", REFERENCE, *again)[0] == 0
    more = ("--cluster", "h100-sxm:4", "--batch", int(batch) + 1, "--sequence", 10_000, "--phase", "decode")
    assert main("plan", REFERENCE, *more)[0] == 2  # it was the smallest change


# --- the command -------------------------------------------------------------------------------------------------


def test_version_and_help(main: Main) -> None:
    assert main("--version") == (0, f"lp_plugin {lp_plugin.__version__}\n", "")
    code, out, err = main("--help")
    assert (code, err) == (0, "")
    for command in ("plan", "explain", "run", "launch", "bench"):
        assert command in out
        code, described, err = main(command, "--help")
        assert (code, err) == (0, "")
        assert "Usage" in described


@pytest.mark.parametrize("arguments", [("fly",), ("plan",), ("plan", "x", "--cluster", "cpu:2", "--batch", "many")])
def test_wrong_usage(main: Main, arguments: tuple[str, ...]) -> None:
    code, out, err = main(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert "Traceback" not in err


def test_the_module_is_the_command(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "lp_plugin", "--version"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == f"lp_plugin {lp_plugin.__version__}\n"


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def refused(main: Main, model: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a job that must fail: one message, exit code 2, no file. Returns the message."""
    documents = tmp_path / "documents.txt"
    documents.write_text("abc\nde\n", encoding="utf-8")

    def run(*options: object, stages: object = 2, **changes: Any) -> str:
        before = sorted(path for path in tmp_path.rglob("*"))
        files = {"--input": documents, "--output": tmp_path / "scores.jsonl"} | changes
        arguments = [part for option in files.items() for part in option]
        if stages is not None:
            arguments += ["--stages", stages]
        code, out, err = main("run", model, *arguments, *options)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert sorted(path for path in tmp_path.rglob("*")) == before
        return err

    return run


def test_missing_config(refused: Refused, model: Path) -> None:
    (model / "config.json").unlink()
    said = refused()
    assert "does not exist" in said
    assert str(model) in said


@pytest.mark.parametrize("content", ["", '{"model_type": "starcoder2",', "[]", "\xff"])
def test_broken_config(refused: Refused, model: Path, content: str) -> None:
    (model / "config.json").write_bytes(content.encode("latin-1"))
    assert str(model / "config.json") in refused()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "no such function"}, "no such function"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_config_with_a_wrong_value(refused: Refused, model: Path, changes: dict[str, Any], said: str) -> None:
    rewrite(model, **changes)
    assert said in refused()


def rewrite(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def test_unsupported_architecture_lists_those_that_are(refused: Refused, model: Path) -> None:
    rewrite(model, model_type="olmoe", architectures=["OlmoeForCausalLM"])
    said = refused()
    assert "'olmoe' can be planned, but not run" in said
    assert "mistral, mixtral, olmo2, opt, phi3, qwen2, qwen3, qwen3_moe, starcoder2" in said


@pytest.mark.parametrize("stages", [7, 0, -1])
def test_more_stages_than_layers_or_none(refused: Refused, stages: int) -> None:
    said = refused(stages=stages)
    assert f"--stages is {stages}" in said
    assert "give 1 to 6" in said


def test_neither_stages_nor_plan(refused: Refused) -> None:
    assert "neither --stages nor --plan" in refused(stages=None)


@pytest.fixture(scope="module")
def plans(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans for 2 stages: of the model, of the model in float16 and decoding, of another model."""
    folder = tmp_path_factory.mktemp("plans")
    own, other = make_model(), make_model(num_hidden_layers=4)
    for name, directory, dtype, phase in (
        ("own", own, None, "prefill"),
        ("half", own, "float16", "prefill"),
        ("decode", own, None, "decode"),
        ("other", other, None, "prefill"),
    ):
        profile = ModelProfile.from_config(directory, dtype=dtype)
        plan = make_plan(profile, Cluster.homogeneous("cpu", 2), Workload(phase=phase, batch=4, sequence=64))
        save_plan(plan, folder / f"{name}.json")
    return folder


def test_plan_for_another_model(refused: Refused, plans: Path) -> None:
    said = refused("--plan", plans / "other.json", stages=None)
    assert "other.json was made for" in said
    assert "(7 layers" in said
    assert "(6 layers" in said


def test_truncated_plan(refused: Refused, plans: Path, tmp_path: Path) -> None:
    content = (plans / "own.json").read_text(encoding="utf-8")
    (tmp_path / "plan.json").write_text(content[: len(content) // 2], encoding="utf-8")
    said = refused("--plan", tmp_path / "plan.json", stages=None)
    assert "plan.json is not valid JSON" in said
    assert "truncated" in said


def test_missing_plan(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.json does not exist" in refused("--plan", tmp_path / "nowhere.json", stages=None)


def test_plan_with_other_stages_precision_or_phase(refused: Refused, plans: Path) -> None:
    assert "has 2 stages, but --stages is 3" in refused("--plan", plans / "own.json", stages=3)
    assert "was made for float16, but the job runs in float32" in refused("--plan", plans / "half.json", stages=None)
    assert "was made for decode" in refused("--plan", plans / "decode.json", stages=None)


def test_plan_for_stored_weights(refused: Refused, make_model: Callable[..., Path], tmp_path: Path) -> None:
    profile = ModelProfile.from_config(make_model(), weight_dtype="int8")
    save_plan(make_plan(profile, Cluster.homogeneous("cpu", 2), Workload(batch=4, sequence=64)), tmp_path / "plan.json")
    said = refused("--plan", tmp_path / "plan.json", stages=None)
    assert "was made with --weights, which a run can't carry out" in said


def test_processes_that_share_a_stage(refused: Refused, plans: Path) -> None:
    assert "--tensor-parallel is 0; it must be at least 1" in refused("--tensor-parallel", 0)
    assert "3" in refused("--tensor-parallel", 3)  # of 4 heads
    said = refused("--plan", plans / "own.json", "--tensor-parallel", 2, stages=None)
    assert "was made for --tensor-parallel 1, but it is 2 here" in said


def test_no_replica(refused: Refused) -> None:
    assert "--data-parallel is 0; it must be at least 1" in refused("--data-parallel", 0)


def test_empty_input(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "documents.txt").write_text("\n \n", encoding="utf-8")
    assert "holds no document" in refused()


def test_missing_input(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.txt does not exist" in refused(**{"--input": tmp_path / "nowhere.txt"})


def test_document_longer_than_the_model_allows(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "documents.txt").write_text("ab\n" + "x" * 512 + "\n", encoding="utf-8")
    said = refused()
    assert "document 2 has 513 tokens, but the model allows 512" in said


def test_no_tokenizer(refused: Refused, model: Path) -> None:
    """transformers would make an empty one, and every document would have no tokens."""
    for file in model.glob("*token*"):
        file.unlink()
    said = refused()
    assert "has no tokenizer" in said
    assert "save_pretrained" in said


def test_no_weights(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "holds no weights" in refused()


def test_truncated_weights(refused: Refused, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors can't be read" in refused()


def test_float16_on_a_cpu(refused: Refused) -> None:
    assert "float16 needs a GPU" in refused("--dtype", "float16")


def test_unknown_precision(refused: Refused) -> None:
    assert "'int4'" in refused("--dtype", "int4")


@pytest.mark.parametrize("micro_batch", [0, -3])
def test_wrong_micro_batch(refused: Refused, micro_batch: int) -> None:
    assert f"--micro-batch is {micro_batch}" in refused("--micro-batch", micro_batch)


@pytest.mark.parametrize("option", ["--report", "--timeline", "--output"])
def test_files_that_could_not_be_written_at_the_end(refused: Refused, tmp_path: Path, option: str) -> None:
    said = refused(**{option: tmp_path / "nowhere" / "file.png"})
    assert "file.png can't be written" in said
    (tmp_path / "folder.png").mkdir()
    assert "it is a folder" in refused(**{option: tmp_path / "folder.png"})


def test_output_in_the_inputs_place(refused: Refused, tmp_path: Path) -> None:
    assert "would replace the input" in refused(**{"--output": tmp_path / "model" / ".." / "documents.txt"})


def test_timeline_that_is_no_picture(refused: Refused, tmp_path: Path) -> None:
    assert ".png, .svg or .pdf" in refused(**{"--timeline": tmp_path / "timeline.jpeg2000"})


# --- run: what is accepted ---------------------------------------------------------------------------------------


def test_a_model_without_a_longest_row_is_scored_at_any_length(tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "bloom"
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    config = BloomConfig(vocab_size=257, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    (tmp_path / "in.txt").write_text("a" * 5000, encoding="utf-8")
    unsaid = dict.fromkeys(inspect.signature(prepare).parameters)
    given = {"directory": directory, "input_path": tmp_path / "in.txt", "output": tmp_path / "out.jsonl"}
    job = prepare(**(unsaid | given | {"num_stages": 2, "data_parallel": 1}))
    assert pad_length(int(job.documents.lengths[0]), job.max_positions) > 5000
