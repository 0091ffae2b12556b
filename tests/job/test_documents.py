"""Reading documents and making tokens of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_plugin.errors import DocumentError, ModelConfigError
from lp_plugin.job.documents import Document, TokenizedDocuments, read_documents, tokenize

BEGIN = 256
"""The byte tokenizer's leading token; a byte is its own id."""


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- reading -----------------------------------------------------------------------------------------------------


def test_text_has_a_document_per_line_numbered_as_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "first\n\n  \nfourth é 日本 🐇  \n last")
    assert read_documents(path) == [
        Document(id=1, text="first"),
        Document(id=4, text="fourth é 日本 🐇  "),
        Document(id=5, text=" last"),
    ]


def test_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    assert [each.text for each in read_documents(written(tmp_path, "a.txt", "one\r\n\r\ntwo\r\n"))] == ["one", "two"]


@pytest.mark.parametrize("separator", ["\r", "\u2028", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path: Path, separator: str) -> None:
    """str.splitlines() would cut here."""
    assert len(read_documents(written(tmp_path, "a.txt", f"one{separator}two\n"))) == 1
    record = json.dumps({"id": 1, "text": f"one{separator}two"}, ensure_ascii=separator < " ")
    assert read_documents(written(tmp_path, "a.jsonl", record)) == [Document(id=1, text=f"one{separator}two")]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_documents(written(tmp_path, "a.txt", "\ufeffone")) == [Document(id=1, text="one")]
    line = '\ufeff{"id": 1, "text": "one"}'
    assert read_documents(written(tmp_path, "a.jsonl", line)) == [Document(id=1, text="one")]


def test_jsonl_keeps_ids_and_texts(tmp_path: Path) -> None:
    lines = [
        '{"id": "b", "text": "two\\nlines", "more": [1]}',
        "",
        '{"text": "", "id": -3}',
        '{"id": "1", "text": " "}',
        '{"id": 1, "text": "\\ud83d\\udc07"}',
    ]
    assert read_documents(written(tmp_path, "a.jsonl", "\n".join(lines))) == [
        Document(id="b", text="two\nlines"),
        Document(id=-3, text=""),
        Document(id="1", text=" "),
        Document(id=1, text="🐇"),
    ]


@settings(deadline=None, derandomize=True, database=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8))
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    lines = [json.dumps({"id": index, "text": text}, ensure_ascii=index % 2) for index, text in enumerate(texts)]
    path = written(tmp_path_factory.mktemp("any"), "a.jsonl", "\n".join(lines))
    assert [each.text for each in read_documents(path)] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text", r"a\.csv: input files end in \.jsonl or \.txt, not '\.csv'"),
        ("a", "text", r"end in \.jsonl or \.txt"),
        ("a.txt", "", r"a\.txt holds no document"),
        ("a.txt", "\n \n\t\n", r"a\.txt holds no document"),
        ("a.jsonl", "\n\n", r"a\.jsonl holds no document"),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 text \(byte 3\)"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": 2', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '["a"]', r'a\.jsonl, line 1: needs an object with "id" and "text"'),
        ("a.jsonl", '{"id": 1}', r'line 1: needs an object with "id" and "text"'),
        ("a.jsonl", '{"id": 1, "text": null}', r'line 1: needs an object with "id" and "text"'),
        ("a.jsonl", '{"id": 1, "text": ["a"]}', r'line 1: needs an object with "id" and "text"'),
        ("a.jsonl", '{"text": "a"}', r'line 1: "id" is None'),
        ("a.jsonl", '{"id": 1.5, "text": "a"}', r'line 1: "id" is 1\.5'),
        ("a.jsonl", '{"id": true, "text": "a"}', r'line 1: "id" is True'),
        ("a.jsonl", '{"id": "x", "text": "a"}\n\n{"id": "x", "text": "b"}', r"id 'x' appears twice"),
    ],
)
def test_broken_input_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        read_documents(written(tmp_path, name, content))


@pytest.mark.parametrize("line", ['{"id": 1, "text": "\\ud800"}', '{"id": "\\udfff", "text": "a"}'])
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, line: str) -> None:
    """It can be neither tokenized nor written; the end of the job would be late to say so."""
    with pytest.raises(DocumentError, match="line 1"):
        read_documents(written(tmp_path, "a.jsonl", line))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"nowhere\.txt does not exist"):
        read_documents(tmp_path / "nowhere.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DocumentError, match=r"folder\.txt can't be read"):
        read_documents(tmp_path / "folder.txt")


# --- tokens ------------------------------------------------------------------------------------------------------


def texts(*values: str) -> list[Document]:
    return [Document(id=index, text=text) for index, text in enumerate(values)]


def test_tokens_are_the_tokenizers_own(tiny: Path) -> None:
    documents = tokenize(texts("ab", "", "é 🐇", "x" * 511), tiny, 512, 264)
    assert len(documents) == 4
    assert documents.lengths.tolist() == [3, 1, 8, 512]
    assert documents[0].tolist() == [BEGIN, *b"ab"]
    assert documents[1].tolist() == [BEGIN]
    assert documents[2].tolist() == [BEGIN, *"é 🐇".encode()]


def test_too_long_a_document_is_named(tiny: Path) -> None:
    with pytest.raises(DocumentError, match=r"document 1 has 513 tokens, but the model allows 512 \(max_position"):
        tokenize(texts("a", "x" * 512), tiny, 512, 264)


def test_tokenizer_of_another_model(tiny: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"makes token 256, but the model's vocabulary has 256 rows"):
        tokenize(texts("a"), tiny, 512, 256)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": {"type": "BPE"}}'])
def test_no_tokenizer_or_a_broken_one(tiny: Path, tmp_path: Path, content: str | None) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        if content is None:
            file.unlink()
    if content is not None:
        (tmp_path / "model" / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelConfigError, match=r"has no tokenizer that transformers can load: \S+"):
        tokenize(texts("a"), tmp_path / "model", 512, 264)


def made(ids: tuple[str | int, ...], rows: list[list[int]]) -> TokenizedDocuments:
    return TokenizedDocuments(
        ids=ids,
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
    )


def test_digest_names_ids_tokens_and_where_documents_end() -> None:
    one = made((1, 2), [[5, 6], [7]])
    assert one.digest == made((1, 2), [[5, 6], [7]]).digest
    others = [
        made((1, 3), [[5, 6], [7]]),
        made(("1", 2), [[5, 6], [7]]),
        made((1, 2), [[5, 6], [8]]),
        made((1, 2), [[5], [6, 7]]),
        made((2, 1), [[5, 6], [7]]),
    ]
    assert len({each.digest for each in [one, *others]}) == 6
