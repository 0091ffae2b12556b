"""Loading a stage's own tensors from a local safetensors directory, key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lp_plugin.errors import WeightsError
from lp_plugin.integrations.transformers.decoder import DecoderStage

__all__ = ["load_stage", "weight_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD_ALIASES = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
"""GPT-NeoX checkpoints and models name the head differently, depending on the version of transformers."""


def weight_files(directory: str | Path) -> Mapping[str, Path]:
    """Which file of a model directory holds each tensor.

    Raises:
        WeightsError: If there are no safetensors, or a file that the index names is missing or truncated.
    """
    folder = Path(directory)
    if (folder / _INDEX).is_file():
        try:
            names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{folder / _INDEX} is broken: {error}; save the model again.") from None
        for file in sorted(set(files.values())):
            _check_readable(file)
        return files
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(_check_readable(folder / _SINGLE), folder / _SINGLE)
    raise WeightsError(
        f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}. "
        "Only safetensors are read; save the model with save_pretrained()."
    )


def load_stage(stage: DecoderStage, directory: str | Path, device: torch.device | str, dtype: torch.dtype) -> None:
    """Materialises a stage and fills it from the checkpoint; nothing else of the checkpoint is read.

    Args:
        stage: Still on the meta device.
        directory: The model directory.
        device: Where the stage will run.
        dtype: Precision to convert to.

    Raises:
        WeightsError: If a tensor is missing or has another shape.
    """
    files = weight_files(directory)
    sources = {name: _source(stage, name, files, directory) for name, _ in _tensors(stage)}
    head, embedding = f"{stage.head_name}.weight", stage.embedding_name
    own_head = head in sources and sources[head] != sources.get(f"{stage.decoder_name}.{embedding}")
    stage.materialize(device, dtype, tie=stage.tied and not own_head)  # a file may hold a head of its own all the same
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, tensor in _tensors(stage):
            source = sources[name]
            file = files[source]
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
            try:
                loaded = opened[file].get_tensor(source)
            except SafetensorError as error:
                raise WeightsError(f"{file} doesn't give {source}: {error}. Copy or save the model again.") from None
            if loaded.shape != tensor.shape:
                raise WeightsError(
                    f"{file}: {source} has shape {tuple(loaded.shape)}, but the config asks for {tuple(tensor.shape)}."
                )
            tensor.data.copy_(loaded)


def _tensors(stage: DecoderStage) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers."""
    persistent = stage.model.state_dict(keep_vars=True)
    return iter(persistent.items())


def _source(stage: DecoderStage, name: str, files: Mapping[str, Path], directory: str | Path) -> str:
    """The checkpoint's name for a tensor of the stage."""
    whole = stage.checkpoint_name(name)
    candidates = [whole, whole.removeprefix(f"{stage.decoder_name}."), _HEAD_ALIASES.get(whole, whole)]
    if stage.tied and name == f"{stage.head_name}.weight":
        candidates += [f"{stage.decoder_name}.{stage.embedding_name}", stage.embedding_name]
    for candidate in candidates:
        if candidate in files:
            return candidate
    raise WeightsError(
        f"{directory} has no tensor {whole!r} (looked for {', '.join(dict.fromkeys(candidates))}); "
        "the weights belong to another config, or the checkpoint is incomplete."
    )


def _check_readable(file: Path) -> list[str]:
    """The file's tensor names; safetensors compares the header with the file's length."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except FileNotFoundError:
        raise WeightsError(f"{file} is missing, but the index names it; copy the whole model directory.") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} can't be read: {error}; it may be truncated. Copy or save it again.") from None
