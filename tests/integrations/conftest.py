"""Real processes for the tests: ranks of a job over Gloo, started by a launcher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import Saved
from commands import BIN, Start
from families import BERT, FAMILIES, GROUPED, make_config, make_model
from transformers import AutoConfig, AutoModel, PretrainedConfig


@pytest.fixture(scope="session")
def start() -> Start:
    """Runs a command to its end and returns what it printed; a bad exit or a hang fails the test with the output."""

    def run(*command: str | Path, seconds: int = 240) -> str:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        # a session of its own, so that a hung launcher ends together with its ranks
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            pytest.fail(f"{command} still ran after {seconds} s:\n{output}\n{errors}")
        if process.returncode != 0:
            pytest.fail(f"{command} ended with {process.returncode}:\n{output}\n{errors}")
        return output

    return run


@pytest.fixture(scope="session")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` and ``bert``: 3 blocks, 128 positions, bytes as tokens after one leading token."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "dense16"))
    try:
        from byte_tokenizer import make_byte_tokenizer
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("text models")
    sizes = {"vocab_size": 264, "num_hidden_layers": 3, "max_position_embeddings": 128, "eos_token_id": 256}
    make_model(AutoConfig.for_model("llama", **GROUPED | sizes)).save_pretrained(folder / "llama")
    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.for_model("bert", **BERT | sizes)).save_pretrained(folder / "bert")
    for name in ("llama", "bert"):
        make_byte_tokenizer(128).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def own_process() -> Iterator[None]:
    """Lets this process be a job of its own, and leaves it as it was."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        from deepspeed import comm

        comm.destroy_process_group()
        comm.comm.cdb = None  # else DeepSpeed would not start again
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Family -> directory and model with 3 blocks."""
    folder = tmp_path_factory.mktemp("three blocks")
    made = {}
    for family in FAMILIES:
        model = make_model(make_config(family, 3))
        model.save_pretrained(folder / family)
        made[family] = (folder / family, model)
    return made


@pytest.fixture
def single(saved: Saved, tmp_path: Path) -> tuple[Path, PretrainedConfig]:
    """A llama directory to spoil, and its configuration."""
    directory, model = saved["llama"]
    shutil.copytree(directory, tmp_path / "llama")
    return tmp_path / "llama", model.config
