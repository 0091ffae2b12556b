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
from lp_plugin.files import parse_json, read_bytes
from lp_plugin.quantity import said, shown

__all__ = ["Document", "TokenizedDocuments", "check_characters", "load_tokenizer", "read_documents", "tokenize"]

_MOST_BYTES = 4 * 2**30  # of a file
_MOST_CHARACTERS_PER_TOKEN = 256  # of a whole text; the longest tokens are runs of blanks or of one sign
_MOST_VALUES = 1_000_000  # in a line of .jsonl, commas of the text included


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
        lines = read_bytes(file, _MOST_BYTES, "split it into several").decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DocumentError(f"{file} does not exist; give the path of a .jsonl or .txt file.") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"{file} is not UTF-8 text (byte {error.start}); convert it first.") from None
    except (OSError, ValueError) as error:  # or no path at all
        raise DocumentError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}.") from None
    documents = list(parse(file, lines))
    if not documents:
        raise DocumentError(f"{file} holds no document: every line is empty. Give at least one line of text.")
    seen: set[str | int] = set()
    for document in documents:
        if document.id in seen:
            raise DocumentError(f"{file}: id {shown(document.id)} appears twice; ids must differ.")
        seen.add(document.id)
    return documents


def check_characters(documents: list[Document], max_positions: int) -> None:
    """Refuses texts that are too long for the model whatever the tokenizer, which would take long to say so.

    Args:
        documents: Texts.
        max_positions: Longest sequence the model allows, in tokens.

    Raises:
        DocumentError: Naming the document.
    """
    most = max_positions * _MOST_CHARACTERS_PER_TOKEN
    long = next((document for document in documents if len(document.text) > most), None)
    if long is not None:
        raise DocumentError(
            f"document {shown(long.id)} has {len(long.text):,} characters, but the model allows {max_positions} tokens "
            "(max_position_embeddings); split or shorten it."
        )


def load_tokenizer(directory: str | Path) -> Any:
    """The model directory's own tokenizer, as transformers loads it.

    Raises:
        ModelConfigError: If there is none, or it is empty.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import: only once the input is known to be good

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
            raise ValueError("it has no vocabulary.")  # noqa: TRY301 - what transformers makes of a missing file
    except Exception as error:  # noqa: BLE001 - a broken file raises anything
        raise ModelConfigError(
            f"{directory} has no tokenizer that transformers can load: {said(error)} "
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
    if max_positions is not None:
        check_characters(documents, max_positions)
    tokenizer = load_tokenizer(directory)
    encoded = _encoded(tokenizer, [document.text for document in documents], directory)
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    longest = int(np.argmax(lengths))
    if max_positions is not None and lengths[longest] > max_positions:
        raise DocumentError(
            f"document {shown(documents[longest].id)} has {lengths[longest]} tokens, but the model allows "
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


def _encoded(tokenizer: Any, texts: list[str], directory: str | Path) -> list[list[int]]:
    """Token ids of each text."""
    try:
        encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return list(encoded["input_ids"])
    except Exception as error:  # noqa: BLE001 - a setting that makes no sense raises anything
        raise ModelConfigError(
            f"the tokenizer in {directory} can't be used: {type(error).__name__}: {said(error)} "
            "Save the model's own tokenizer there (tokenizer.save_pretrained)."
        ) from None


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
            record = parse_json(line, _MOST_VALUES)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise DocumentError(f"{file}, line {number}: not valid JSON ({reason}).") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DocumentError(f'{file}, line {number}: needs an object with "id" and "text" (a string).')
        identity = record.get("id")
        if not isinstance(identity, (str, int)) or isinstance(identity, bool):
            raise DocumentError(
                f'{file}, line {number}: "id" is {shown(identity)}; it must be a string or a whole number.'
            )
        if not _is_unicode(str(identity) + record["text"]):
            raise DocumentError(f"{file}, line {number}: holds half a surrogate pair, which is no text; correct it.")
        yield Document(id=identity, text=record["text"])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
