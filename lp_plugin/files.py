"""Files whole or not at all: bounded reading, atomic writing, regular files only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lp_plugin.errors import InvalidInputError

__all__ = ["check_folder", "check_output", "check_target", "read_text", "write_atomically"]


def read_text(path: Path, most_bytes: int, remedy: str) -> str:
    """The text of a file in UTF-8.

    Args:
        path: The file.
        most_bytes: That it may have.
        remedy: What to do if it has more, for the message.

    Raises:
        OSError: If it is missing, no regular file (a device may never end), or larger than ``most_bytes``.
        ValueError: If it is not UTF-8, or the path can't be one.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is a folder or a special file, not a regular file")
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise OSError(f"it has more than {most_bytes:,} bytes; {remedy}")
    return raw.decode("utf-8")


def check_target(path: Path) -> None:
    """Refuses to replace what is no regular file.

    Raises:
        OSError: If the path is a folder, a device, a pipe, or names nothing.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is a folder or a special file; give the name of a regular file")


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
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InvalidInputError(f"{what} can't be written to {path}: its folder does not exist; make it.")
    try:
        check_target(path)
        check_folder(folder)
    except OSError as error:
        raise InvalidInputError(f"{what} can't be written to {path}: {error}.") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file through a temporary file beside it and a rename.

    Raises:
        OSError: If the folder can't be written, or the target is no regular file; nothing is left behind.
    """
    check_target(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a result is an ordinary file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
