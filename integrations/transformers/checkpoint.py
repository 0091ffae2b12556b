"""A local safetensors checkpoint: which tensors its files hold, and reading one in pieces.

Only headers are kept; a tensor's bytes are read into a small buffer and copied on, so that loading needs hardly more
memory than what is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lp_plugin.errors import WeightsError
from lp_plugin.files import open_regular, parse_json, read_text
from lp_plugin.quantity import said, shown

__all__ = ["StoredTensor", "new_buffer", "read_headers", "weight_files"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_BUFFER_BYTES = 1 << 24
"""Most that is read at once: large enough for a file system's full speed, small beside any stage."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the precisions that a weight can be converted from."""
_MOST_INDEX_BYTES = 32 * 2**20
_MOST_INDEX_VALUES = 300_000  # in an index: one per tensor
_MOST_FILES = 10_000  # that an index names; the largest models have some hundreds
_MOST_NAME = 255  # characters of a file's or tensor's name
_MOST_HEADER_BYTES = 16 * 2**20  # of a file's header: of 100,000 tensors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    name: str
    """In the checkpoint."""
    file: Path
    """Of the checkpoint."""
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    """As stored."""
    offset: int
    """Of its first byte in the file, bytes."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision.

        Raises:
            WeightsError: If it is none that weights can be converted from.
        """
        if self.dtype not in _DTYPES:
            raise WeightsError(
                f"{self.file}: {self.name} is stored as {self.dtype}, but only {', '.join(_DTYPES)} can be loaded; "
                "convert the checkpoint to one of them."
            )
        return _DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def copy_to(self, target: torch.Tensor, buffer: torch.Tensor, *, dim: int = 0, start: int = 0) -> None:
        """Fills ``target`` with ``self.narrow(dim, start, target.shape[dim])``, converted to its precision and device.

        Of a cut along dimension 0 only those bytes are read; of any other whole rows.

        Args:
            target: Where to.
            buffer: Of `new_buffer`, to read into.
            dim: Dimension that is cut.
            start: First element along it.

        Raises:
            WeightsError: If the file can't be read or has become shorter.
        """
        first, count = (start, target.shape[0]) if dim == 0 else (0, self.shape[0])
        row = self.shape[1:]
        row_bytes = math.prod(row) * self.torch_dtype.itemsize
        if row_bytes > len(buffer):
            for index in range(count):
                inner = self._at((first + index) * row_bytes, row)
                inner.copy_to(target[index], buffer, dim=max(dim - 1, 0), start=start if dim else 0)
            return
        step = max(len(buffer) // max(row_bytes, 1), 1)
        for done in range(0, count, step):
            rows = min(step, count - done)
            block = self._read(buffer[: rows * row_bytes], (first + done) * row_bytes).view(rows, *row)
            target[done : done + rows].copy_(block.narrow(dim, start, target.shape[dim]) if dim else block)

    def same_values(self, other: StoredTensor) -> bool:
        """Whether both hold the same numbers in the same precision."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        mine, theirs = new_buffer(), new_buffer()
        return all(
            torch.equal(self._read(mine[:size], start), other._read(theirs[:size], start))
            for start, size in _pieces(self.num_bytes)
        )

    def _at(self, start: int, shape: tuple[int, ...]) -> StoredTensor:
        """The part of ``shape`` that begins ``start`` bytes into this one."""
        return dataclasses.replace(self, offset=self.offset + start, shape=shape)

    def _read(self, buffer: torch.Tensor, start: int) -> torch.Tensor:
        """Fills the buffer with the bytes from ``start``; a flat view of it in the tensor's precision."""
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                into = memoryview(buffer.numpy())
                done = 0
                while done < len(into):
                    got = file.readinto(into[done:])
                    if not got:
                        raise WeightsError(f"{self.file} ended inside {self.name}; copy or save the model again.")
                    done += got
        except OSError as error:
            raise WeightsError(f"{self.file} can't be read at {self.name}: {error}.") from None
        return buffer.view(self.torch_dtype)


def new_buffer() -> torch.Tensor:
    """Memory to read into; one will do for many tensors."""
    return torch.empty(_BUFFER_BYTES, dtype=torch.uint8)


def weight_files(directory: str | Path) -> Mapping[str, Path]:
    """Which file of a model directory holds each tensor; one file goes before shards, as in transformers.

    Raises:
        WeightsError: If there are no safetensors, or a file that the index names is missing or truncated.
    """
    return {name: tensor.file for name, tensor in read_headers(directory).items()}


def read_headers(directory: str | Path) -> Mapping[str, StoredTensor]:
    """All tensors of a model directory, by name.

    Raises:
        WeightsError: If there are no safetensors, if a file is missing or truncated, or if the index is broken or names
            a tensor that its file lacks.
    """
    folder = Path(directory)
    if (folder / _SINGLE).is_file():
        return _header(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        found = f" It holds {', '.join(pickled[:3])}, which are not safetensors." if pickled else ""
        raise WeightsError(
            f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}.{found} "
            "Only safetensors are read; save the model with save_pretrained()."
        )
    files = _indexed(folder)
    headers = {file: _header(file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file]:
            named = name if _is_name(name) else shown(name)
            raise WeightsError(f"{folder / _INDEX} says that {file.name} holds {named}, but it doesn't; save it again.")
    return {name: headers[file][name] for name, file in files.items()}


def _indexed(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, by the index."""
    try:
        index = parse_json(read_text(folder / _INDEX, _MOST_INDEX_BYTES, "save the model again"), _MOST_INDEX_VALUES)
        names = index["weight_map"]
        if len(set(names.values())) > _MOST_FILES:
            raise ValueError(f"it names {len(set(names.values())):,} files")  # noqa: TRY301
        places = {file: _place(folder, file) for file in set(names.values())}
        return {name: places[file] for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder / _INDEX} is broken: {said(error)}; save the model again.") from None


def _place(folder: Path, file: str) -> Path:
    """A file of the directory or of a folder in it; links are followed, because the hub's cache is made of them."""
    if Path(file).is_absolute() or ".." in Path(file).parts or not _is_name(file):
        raise ValueError(f"it names the file {shown(file)}, which is not in the model directory")
    return folder / file


def _is_name(text: str) -> bool:
    """Whether a message can quote it as it is."""
    return 0 < len(text) <= _MOST_NAME and text.isprintable()


def _header(file: Path) -> dict[str, StoredTensor]:
    """A file's tensors; safetensors compares the header with the file's length."""
    try:
        with open_regular(file) as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > _MOST_HEADER_BYTES:
                raise ValueError(  # noqa: TRY301 - one message for all that is wrong with it
                    f"its header has {size:,} bytes, but at most {_MOST_HEADER_BYTES:,} are read"
                )
            with safe_open(file, framework="pt"):
                header = json.loads(opened.read(size))
    except FileNotFoundError:
        raise WeightsError(f"{file} is missing, but the index names it; copy the whole model directory.") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} can't be read: {said(error)}; it may be truncated. Copy or save again.") from None
    header.pop("__metadata__", None)
    odd = next((name for name in header if not _is_name(name)), None)
    if odd is not None:
        raise WeightsError(f"{file} holds a tensor called {shown(odd)}, which is no name; save the model again.")
    return {
        name: StoredTensor(
            name=name,
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + size + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """``size`` bytes as starts and lengths of at most a buffer."""
    for start in range(0, size, _BUFFER_BYTES):
        yield start, min(_BUFFER_BYTES, size - start)
