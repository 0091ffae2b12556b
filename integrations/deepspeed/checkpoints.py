"""Going on with training from DeepSpeed's checkpoints under another partition.

A checkpoint of a pipeline holds weights by layer, but the optimizer's states by rank, flattened: the same partition
alone can use them. DeepSpeed's universal checkpoint holds them by parameter; here it is made, loaded and removed again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from lp_plugin.errors import DeepSpeedConfigError, RuntimeEnvironmentError
from lp_plugin.files import read_text
from lp_plugin.integrations.deepspeed.engine import quiet
from lp_plugin.quantity import shown

__all__ = ["resume"]

_MOST_BYTES = 4096  # of a name


def resume(engine: Any, directory: str | Path) -> int:
    """Loads the newest checkpoint of a directory, whatever partition, number of stages or replicas saved it.

    Collective: every process calls it, on a file system that all share; there has to be room for weights and optimizer
    states in float32 once more. DeepSpeed unpickles checkpoints: load only those you trust.

    Args:
        engine: A ``PipelineEngine`` whose configuration has ZeRO stage 1, without which there is no universal
            checkpoint, and ``"checkpoint": {"load_universal": true}``.
        directory: What ``engine.save_checkpoint`` was given.

    Returns:
        Steps that the engine had taken when it was saved; 0 if the directory holds no checkpoint, and none is loaded.

    Raises:
        DeepSpeedConfigError: If the engine's configuration lacks one of the two.
        RuntimeEnvironmentError: If the checkpoint can't be converted. All processes raise.
    """
    if not engine.zero_optimization() or not engine.load_universal_checkpoint():
        raise DeepSpeedConfigError(
            "to go on under another partition, optimizer states are loaded from a universal checkpoint, which takes "
            '"zero_optimization": {"stage": 1} and "checkpoint": {"load_universal": true}; add both, also where the '
            "checkpoint is saved."
        )
    source, converted = Path(directory), Path(directory) / "universal"
    tags = [_newest(source)]
    torch.distributed.broadcast_object_list(tags)
    tag = tags[0]
    if not tag:
        return 0
    _on_first(lambda: _convert(source / tag, converted / tag), tag)
    with quiet():
        engine.load_checkpoint(str(converted), tag=tag)
    torch.distributed.barrier()
    _on_first(lambda: shutil.rmtree(converted), tag)
    return int(engine.global_steps)


def _newest(directory: Path) -> str:
    """Name of the newest checkpoint, as DeepSpeed notes it last; empty if there is none."""
    file = directory / "latest"
    if not file.is_file():
        return ""
    remedy = "it holds the name of a checkpoint; write one of the folder's there."
    try:
        tag = read_text(file, _MOST_BYTES, remedy).strip()
    except (OSError, ValueError) as error:
        raise RuntimeEnvironmentError(f"{file} can't be read: {error}; {remedy}") from None
    if Path(tag).name != tag:
        raise RuntimeEnvironmentError(f"{file} names {shown(tag)}, which is no folder in {directory}; {remedy}")
    return tag


def _convert(source: Path, target: Path) -> None:
    """By DeepSpeed's own script, in this process."""
    shutil.rmtree(target.parent, ignore_errors=True)
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its bars of progress
        ds_to_universal.main(arguments)


def _on_first(action: Callable[[], None], tag: str) -> None:
    """Runs something in the first process alone; where it fails, all raise."""
    failures: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the other processes wait to be told, whatever it is
            failures = [f"{type(error).__name__}: {error}"]
    torch.distributed.broadcast_object_list(failures)
    if failures[0] is not None:
        raise RuntimeEnvironmentError(
            f"the checkpoint {tag} can't be made universal: {failures[0]}. Is it whole, and of a run with ZeRO stage 1?"
        )
