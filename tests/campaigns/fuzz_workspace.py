"""The folder that a case runs in: the changed file, a model directory where one is needed, and traps beside them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "TRICKS", "lay", "make_model", "shards"]

ROOT = Path(__file__).parents[2]
TRICKS = ("missing", "folder", "pipe", "/dev/zero", "/dev/stdin", "/dev/full", "/nowhere", "loop", "sparse")
"""What can lie in the place of a file."""
_SHRUNK = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
_SHRUNK |= {"num_attention_heads": 2, "num_key_value_heads": 2}
_SPARSE_BYTES = 2**36


def make_model(folder: Path, **changes: Any) -> Path:
    """A model directory with a tokenizer: 2 blocks of width 16, bytes as tokens."""
    sys.path.insert(0, str(ROOT / "examples" / "dense16"))
    try:
        from make_model import main  # the example's own script
    finally:
        sys.path.pop(0)
    config = json.loads((ROOT / "examples" / "dense16" / "small" / "config.json").read_text(encoding="utf-8"))
    (folder / "small").mkdir(parents=True)
    (folder / "small" / "config.json").write_text(json.dumps(config | _SHRUNK | changes), encoding="utf-8")
    with contextlib.redirect_stdout(None):
        main([str(folder / "small"), str(folder / "model")])
    return folder / "model"


def shards(model: Path, folder: Path) -> Path:
    """The same model in two files and an index."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(each.nbytes for each in tensors.values())},
        "weight_map": {},
    }
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).symlink_to(file)
    return folder


def lay(folder: Path, file: str, raw: bytes, *, trick: str = "", model: Path | None = None) -> Path:
    """Makes a case's folder.

    Args:
        folder: New.
        file: Name in it of what is changed; in ``model/``, it takes the place of that model's own.
        raw: What it holds.
        trick: One of `TRICKS`, to lie in its place.
        model: What ``model/`` is a copy of, by links; left out, there is none.

    Returns:
        The folder.
    """
    target = folder / file
    target.parent.mkdir(parents=True)
    if model is not None:
        (folder / "model").mkdir(exist_ok=True)
        for each in model.iterdir():
            if folder / "model" / each.name != target:
                (folder / "model" / each.name).symlink_to(each)
    (folder / "text.txt").write_text("One line.\n\nAnother.\n", encoding="utf-8")
    (folder / "nothing.py").touch()
    _set_traps(target.parent)
    if not trick:
        target.write_bytes(raw)
    elif trick == "folder":
        target.mkdir()
    elif trick == "pipe":
        os.mkfifo(target)
    elif trick == "loop":
        target.symlink_to(target.name)
    elif trick == "sparse":
        with target.open("wb") as sparse:
            sparse.truncate(_SPARSE_BYTES)
    elif trick != "missing":
        target.symlink_to(trick)
    return folder


def _set_traps(folder: Path) -> None:
    """What `fuzz_mutations.NAMES` names."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "outside.safetensors").symlink_to("/etc/passwd")
