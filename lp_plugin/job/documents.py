"""Reading documents and turning them into tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lp_plugin.errors import DocumentError, ModelConfigError

__all__ = ["Document", "TokenizedDocuments", "load_tokenizer", "read_documents", "tokenize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the input."""

    id: str | int
    """The file's own id, or the line number."""
    text: str
    """As written, without the line's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedDocuments:
    """All documents' tokens in one array."""

    ids: tuple[str | int, ...]
    """In input order."""
    tokens: NDArray[np.int32]
    """Token ids of all documents, one after the other."""
    offsets: NDArray[np.int64]
    """Document ``i`` is ``tokens[offsets[i] : offsets[i + 1]]``; shape [num_documents + 1]."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """Token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """SHA-256 over ids and tokens."""
        sha = hashlib.sha256(json.dumps(list(self.ids)).encode())
        sha.update(self.offsets.tobytes())
        sha.update(self.tokens.tobytes())
        return sha.hexdigest()


def read_documents(path: str | Path) -> list[Document]:
    """Reads ``.jsonl`` (an object with ``id`` and ``text`` per line) or ``.txt`` (a document per non-empty line).

    Raises:
        DocumentError: If the file is missing, of another kind, empty, or a line is broken; names the line.
    """
    file = Path(path)
    parse = {".jsonl": _parse_jsonl, ".txt": _parse_text}.get(file.suffix)
    if parse is None:
        ending = repr(file.suffix) if file.suffix else "in nothing"
        raise DocumentError(f"{file}: input files end in .jsonl or .txt, not {ending}.")
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DocumentError(f"{file} does not exist; give the path of a .jsonl or .txt file.") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"{file} is not UTF-8 text (byte {error.start}); convert it first.") from None
    except OSError as error:
        raise DocumentError(f"{file} can't be read: {error.strerror}.") from None
    documents = list(parse(file, lines))
    if not documents:
        raise DocumentError(f"{file} holds no document: every line is empty. Give at least one line of text.")
    seen: set[str | int] = set()
    for document in documents:
        if document.id in seen:
            raise DocumentError(f"{file}: id {document.id!r} appears twice; ids must differ.")
        seen.add(document.id)
    return documents


def load_tokenizer(directory: str | Path) -> Any:
    """The model directory's own tokenizer, as transformers loads it.

    Raises:
        ModelConfigError: If there is none, or it is empty.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import: only once the input is known to be good

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
            raise ValueError("it has no vocabulary.")  # noqa: TRY301 - what transformers makes of a missing file
    except Exception as error:  # noqa: BLE001 - a broken file raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelConfigError(
            f"{directory} has no tokenizer that transformers can load: {reason} "
            "Save the model's own tokenizer there (tokenizer.save_pretrained)."
        ) from None
    return tokenizer


def tokenize(
    documents: list[Document], directory: str | Path, max_positions: int | None, vocab_size: int
) -> TokenizedDocuments:
    """Turns texts into token ids with the model directory's own tokenizer, special tokens included.

    Args:
        documents: Texts.
        directory: The model directory.
        max_positions: Longest sequence the model allows, in tokens; None for no limit.
        vocab_size: Rows of the model's embedding.

    Raises:
        ModelConfigError: If there is no tokenizer, or it makes ids that the model has no embedding for.
        DocumentError: If a document is longer than the model allows; names it.
    """
    tokenizer = load_tokenizer(directory)
    encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    longest = int(np.argmax(lengths))
    if max_positions is not None and lengths[longest] > max_positions:
        raise DocumentError(
            f"document {documents[longest].id!r} has {lengths[longest]} tokens, but the model allows "
            f"{max_positions} (max_position_embeddings); split or shorten it."
        )
    tokens = np.fromiter((token for ids in encoded for token in ids), dtype=np.int32, count=int(lengths.sum()))
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise ModelConfigError(
            f"the tokenizer in {directory} makes token {int(tokens.max())}, but the model's vocabulary has "
            f"{vocab_size} rows; tokenizer and model don't belong together."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedDocuments(ids=tuple(document.id for document in documents), tokens=tokens, offsets=offsets)


def _parse_text(file: Path, lines: list[str]) -> Iterator[Document]:
    del file
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Document(id=number, text=line.removesuffix("\r"))


def _parse_jsonl(file: Path, lines: list[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DocumentError(f"{file}, line {number}: not valid JSON ({error.msg}).") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DocumentError(f'{file}, line {number}: needs an object with "id" and "text" (a string).')
        identity = record.get("id")
        if not isinstance(identity, (str, int)) or isinstance(identity, bool):
            raise DocumentError(f'{file}, line {number}: "id" is {identity!r}; it must be a string or a whole number.')
        if not _is_unicode(str(identity) + record["text"]):
            raise DocumentError(f"{file}, line {number}: holds half a surrogate pair, which is no text; correct it.")
        yield Document(id=identity, text=record["text"])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
