"""Files whole or not at all: bounded reading, atomic writing, regular files only."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from lp_plugin.errors import InvalidInputError

__all__ = [
    "check_folder",
    "check_output",
    "check_target",
    "check_values",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_text",
    "real_path",
    "write_atomically",
]


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading without ever waiting: a pipe may never begin, a device never end.

    Raises:
        OSError: If it is missing, or no regular file.
        ValueError: If the path can't be one.
    """
    _check_regular(path.stat())  # first, because opening a device can have effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor))  # again, because it may be another file by now
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most_bytes: int, remedy: str) -> bytes:
    """The contents of a file.

    Args:
        path: The file.
        most_bytes: That it may have; looked at before it is read.
        remedy: What to do if it has more, for the message.

    Raises:
        OSError: If it is missing, no regular file, or larger than ``most_bytes``; says its size.
        ValueError: If the path can't be one.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(f"it has {size:,} bytes, but at most {most_bytes:,} are read; {remedy}")
        return file.read(size)  # more takes memory for as much, and a file that grows is read as it was


def read_text(path: Path, most_bytes: int, remedy: str) -> str:
    """The text of a file in UTF-8.

    Args:
        path: The file.
        most_bytes: That it may have; looked at before it is read.
        remedy: What to do if it has more, for the message.

    Raises:
        OSError: If it is missing, no regular file, or larger than ``most_bytes``.
        ValueError: If it is not UTF-8, or the path can't be one.
    """
    return read_bytes(path, most_bytes, remedy).decode("utf-8")


def check_values(text: str, most_values: int, most_objects: int) -> None:
    """Refuses JSON that would take much more memory than its text, before it is parsed.

    Args:
        text: All of it.
        most_values: That it may hold: a value can be two characters of text, and takes up to a hundred bytes of memory.
        most_objects: Of them, that may be objects: what is made of one is larger, and so is what it lacks.

    Raises:
        ValueError: If it holds more; commas and brackets in strings are counted, too.
    """
    objects = text.count("{")
    values = 1 + objects + text.count(",") + text.count("[")
    if values > most_values:
        raise ValueError(f"it holds some {values:,} values, but at most {most_values:,} are read")
    if objects > most_objects:
        raise ValueError(f"it holds some {objects:,} objects, but at most {most_objects:,} are read")


def parse_json(text: str, most_values: int) -> Any:
    """What a JSON text holds.

    Args:
        text: All of it.
        most_values: As for `check_values`.

    Raises:
        ValueError: If it is no JSON, holds more values, or is nested too deeply.
    """
    check_values(text, most_values, most_values)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is a folder or a special file, not a regular file")


def check_target(path: Path) -> None:
    """Refuses to replace what is no regular file.

    Raises:
        OSError: If the path is a folder, a device, a pipe, or names nothing.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is a folder or a special file; give the name of a regular file")


def real_path(path: str | Path) -> Path:
    """Where a path leads, links followed; `Path.resolve` raises RuntimeError for circular ones."""
    return Path(os.path.realpath(path))


def check_folder(folder: Path) -> None:
    """Refuses a folder in which no file can be made; leaves nothing behind.

    Raises:
        OSError: If it is missing, is none, or can't be written.
    """
    with tempfile.TemporaryFile(dir=folder):
        return


def check_output(path: Path, what: str) -> None:
    """Refuses a place for results before the work for them is done.

    Args:
        path: The file.
        what: Will be written there, for the message.

    Raises:
        InvalidInputError: If it is no regular file, or its folder is missing or can't be written.
    """
    folder = real_path(path).parent
    if not folder.is_dir():
        raise InvalidInputError(f"{what} can't be written to {path}: its folder does not exist; make it.")
    try:
        check_target(path)
        check_folder(folder)
    except OSError as error:
        raise InvalidInputError(f"{what} can't be written to {path}: {error}.") from None


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text file through a temporary file beside it and a rename.

    Args:
        path: The file.
        text: All of it, or its parts.

    Raises:
        OSError: If the folder can't be written, or the target is no regular file; nothing is left behind.
    """
    check_target(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines([text] if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a result is an ordinary file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
