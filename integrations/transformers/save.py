"""Saving a model that is spread over stages as a plain Hugging Face directory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from lp_plugin.errors import InvalidInputError, RuntimeEnvironmentError
from lp_plugin.integrations.transformers.decoder import DecoderStage
from lp_plugin.integrations.transformers.tensor_parallel import whole_tensor

__all__ = ["save_model"]

_T = TypeVar("_T")
_Written = dict[str, tuple[str, int, int]]
"""Name of a tensor -> its file, bytes and number of elements."""
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""What a model directory holds beside configuration and weights, as file name patterns."""


def save_model(
    stage: DecoderStage,
    directory: str | Path,
    *,
    source: str | Path,
    part: int = 0,
    num_parts: int = 1,
    tensor_rank: int = 0,
    replica: int = 0,
) -> None:
    """Writes the whole model, one file per stage, so that ``from_pretrained`` gives identical tensors.

    Collective: every process of the job calls it, on a file system that all share. Names and layout are those of the
    checkpoint that was loaded, as in ``save_pretrained``; tied matrices are written once. Everything is written under
    another name first, so that the directory is whole as soon as it is there.

    Args:
        stage: This process's layers, loaded.
        directory: Where to; must not exist yet, or be empty.
        source: The directory that was loaded; generation configuration and tokenizer are copied from it.
        part: Number of the stage.
        num_parts: Stages.
        tensor_rank: Number of this process among those that share the stage's tensors.
        replica: Number of the pipeline that the stage belongs to.

    Raises:
        InvalidInputError: If the directory has contents.
        RuntimeEnvironmentError: If a process can't write; names it. All processes raise.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidInputError(f"{target} is there already; save to a directory that is new or empty.")
    unfinished = target.with_name(f".{target.name}.unfinished")
    leads = part == tensor_rank == replica == 0

    def prepare() -> None:
        if leads:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write() -> _Written:
        own = _tensors(stage) if replica == 0 else {}
        file = _file_name(part, num_parts)
        if own and tensor_rank == 0:
            save_file(own, unfinished / file, metadata={"format": "pt"})
        return {name: (file, tensor.nbytes, tensor.numel()) for name, tensor in own.items()}

    def finish() -> None:
        if leads:
            _write_rest(stage, unfinished, Path(source), {name: each for one in written for name, each in one.items()})
            if target.is_dir():
                target.rmdir()
            unfinished.rename(target)

    try:
        _together("prepare the directory", prepare)
        written = _together("write weights", write)
        _together("finish the directory", finish)
    except RuntimeEnvironmentError:
        if leads:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _file_name(part: int, num_parts: int) -> str:
    return "model.safetensors" if num_parts == 1 else f"model-{part + 1:05d}-of-{num_parts:05d}.safetensors"


def _tensors(stage: DecoderStage) -> dict[str, torch.Tensor]:
    """The stage's tensors as a checkpoint names and lays them out, whole, on the CPU; collective in a tensor group."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in stage.model.state_dict().items():
        if stage.tied and stage.has_head and name == f"{stage.head_name}.weight":
            continue
        whole = whole_tensor(tensor, stage.cuts[name]) if name in stage.cuts else tensor
        found[stage.checkpoint_name(name)] = whole.cpu()
    prefix = "" if stage.with_head else f"{stage.decoder_name}."
    reverted = revert_weight_conversion(stage.model, found).items()
    return {name.removeprefix(prefix): _alone(tensor) for name, tensor in reverted}


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with memory of its own, as safetensors wants it: a conversion may have made many of one."""
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _write_rest(stage: DecoderStage, folder: Path, source: Path, written: _Written) -> None:
    """Index, configuration and what is copied."""
    if not (folder / "model.safetensors").is_file():
        sizes, counts = zip(*((size, count) for _, size, count in written.values()), strict=True)
        index = {
            "metadata": {"total_parameters": sum(counts), "total_size": sum(sizes)},
            "weight_map": {name: written[name][0] for name in sorted(written)},
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config = copy.deepcopy(stage.config)
    config.dtype = next(stage.parameters()).dtype
    config.architectures = [type(stage.model if stage.with_head else stage.model.base_model).__name__]
    config.save_pretrained(folder)
    for file in {file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}:
        shutil.copy2(file, folder / file.name)


def _together(what: str, action: Callable[[], _T]) -> list[_T]:
    """All processes' results of a step that each of them takes; where it fails in one, all raise."""
    report: tuple[Any, str | None]
    try:
        report = (action(), None)
    except Exception as error:  # noqa: BLE001 - the other processes wait to be told, whatever it is
        report = (None, f"{type(error).__name__}: {error}")
    reports = [report]
    if dist.is_initialized():
        reports = [report] * dist.get_world_size()
        dist.all_gather_object(reports, report)
    for rank, (_, failed) in enumerate(reports):
        if failed is not None:
            raise RuntimeEnvironmentError(f"saving: process {rank} couldn't {what}: {failed}.")
    results: list[Any] = [each for each, _ in reports]
    return results
