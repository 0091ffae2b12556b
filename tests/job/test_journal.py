"""Results on disk: whatever a crash leaves behind, nothing is lost, done twice or mixed with another job."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import pytest

from lp_plugin.errors import DocumentError
from lp_plugin.job.journal import Journal

IDS = ("a", 7, "c", "é")


class Score(TypedDict):
    num_tokens: int
    log_likelihood: float


SCORES = {index: Score(num_tokens=3 * index, log_likelihood=-1.1 * index) for index in range(len(IDS))}
Open = Callable[..., Journal[Score]]
Write = Callable[..., Journal[Score]]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "scores.jsonl"


@pytest.fixture
def partial(output: Path) -> Path:
    return output.with_name("scores.jsonl.partial")


@pytest.fixture
def opened(output: Path) -> Iterator[Open]:
    """Opens the job's journal, the one before as a crash leaves it."""
    journals: list[Journal[Score]] = []

    def crash() -> None:
        for journal in journals:
            journal._stream.close()

    def opened(job: str = "job") -> Journal[Score]:
        crash()
        journals.append(Journal(output, job, IDS, Score))
        return journals[-1]

    yield opened
    crash()


@pytest.fixture
def written(opened: Open) -> Write:
    """A journal with some scores."""

    def written(*indices: int) -> Journal[Score]:
        journal = opened()
        journal.append({index: SCORES[index] for index in indices})
        return journal

    return written


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finished() -> list[dict[str, object]]:
    return [{"id": identity, **SCORES[index]} for index, identity in enumerate(IDS)]


def test_scores_are_on_disk_as_soon_as_they_are_appended(output: Path, partial: Path, opened: Open) -> None:
    journal = opened()
    assert journal.missing() == [0, 1, 2, 3]
    journal.append({2: SCORES[2], 0: SCORES[0]})
    assert journal.missing() == [1, 3]
    job, *lines = records(partial)
    assert job == {"job": "job"}
    assert [line["index"] for line in lines] == [2, 0]
    assert not output.exists()


def test_output_is_in_input_order_and_the_journal_goes(output: Path, partial: Path, written: Write) -> None:
    written(3, 1, 0, 2).finish()
    assert records(output) == finished()
    assert not partial.exists()
    assert "é" in output.read_text(encoding="utf-8")
    assert output.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_an_old_output_is_replaced_only_at_the_end(output: Path, written: Write) -> None:
    output.write_text("old\n", encoding="utf-8")
    journal = written(0, 1, 2, 3)
    assert output.read_text(encoding="utf-8") == "old\n"
    journal.finish()
    assert records(output) == finished()
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


def test_the_same_job_goes_on(output: Path, written: Write, opened: Open) -> None:
    written(1, 3)
    journal = opened()
    assert journal.records == {1: SCORES[1], 3: SCORES[3]}
    assert journal.missing() == [0, 2]
    journal.append({0: SCORES[0], 2: SCORES[2]})
    journal.finish()
    assert records(output) == finished()


def test_an_output_that_can_not_be_written_at_the_end_loses_nothing(output: Path, written: Write, opened: Open) -> None:
    output.mkdir()
    with pytest.raises(DocumentError, match=r"can't be written: .* all results are in scores\.jsonl\.partial"):
        written(0, 1, 2, 3).finish()
    output.rmdir()
    journal = opened()
    assert journal.missing() == []
    journal.finish()
    assert records(output) == finished()


def test_a_finished_but_not_renamed_job_goes_on(output: Path, written: Write, opened: Open) -> None:
    written(0, 1, 2, 3)
    journal = opened()
    assert journal.missing() == []
    journal.finish()
    assert records(output) == finished()


def test_log_likelihoods_survive_to_the_last_bit(opened: Open) -> None:
    values = {0: Score(num_tokens=1, log_likelihood=-0.1 - 0.2), 1: Score(num_tokens=1, log_likelihood=-1e-300)}
    opened().append(values)
    assert opened().records == values


def test_memory_does_not_grow_with_the_results(tmp_path: Path) -> None:
    count = 5_000
    journal: Journal[Score] = Journal(tmp_path / "scores.jsonl", "job", tuple(range(count)), Score)
    tracemalloc.start()
    try:
        for index in range(count):
            journal.append({index: Score(num_tokens=index, log_likelihood=-0.1 * index)})
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < count  # bytes; as objects they would take two hundred each
    assert journal.records[count // 2] == Score(num_tokens=count // 2, log_likelihood=-0.1 * (count // 2))
    journal.finish()


def test_every_truncation_resumes(output: Path, partial: Path, written: Write, opened: Open) -> None:
    """A crash may leave any number of bytes: whole lines count, the torn one is scored again, each once."""
    written(2, 0, 3, 1)
    content = partial.read_bytes()
    for kept in range(len(content) + 1):
        partial.write_bytes(content[:kept])
        whole = content[:kept].decode().split("\n")[1:-1]  # without the job's line and what follows the last end
        journal = opened()
        assert list(journal.records) == sorted(json.loads(line)["index"] for line in whole), kept
        assert len(journal.records) == len(whole)
        assert journal.records == {index: SCORES[index] for index in journal.records}
        journal.append({index: SCORES[index] for index in journal.missing()})
        indices = [line["index"] for line in records(partial)[1:]]
        assert sorted(indices) == [0, 1, 2, 3], kept
        journal.finish()
        assert records(output) == finished()


def test_a_torn_line_is_cut_off_before_anything_is_added(partial: Path, written: Write, opened: Open) -> None:
    written(0)
    whole = partial.read_bytes()
    partial.write_bytes(whole + b'{"index": 1, "num_tokens": 3, "log_lik')
    opened().append({2: SCORES[2]})
    assert partial.read_bytes().startswith(whole)
    assert [line.get("index") for line in records(partial)] == [None, 0, 2]


def test_another_job_is_refused_and_its_scores_stay(partial: Path, written: Write, opened: Open) -> None:
    written(0)
    before = partial.read_bytes()
    with pytest.raises(DocumentError, match="another job"):
        opened("other")
    assert partial.read_bytes() == before


def test_two_jobs_never_write_one_journal(output: Path, partial: Path, written: Write) -> None:
    written(0)
    before = partial.read_bytes()
    with pytest.raises(DocumentError, match="in use: another job"):
        Journal(output, "job", IDS, Score)
    assert partial.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        b"{\n",
        b"\n",
        b"\x00\x00\x00\n",
        b"\xff\n",
        b"[1]\n",
        b"3\n",
        b"{}\n",
        b'{"index": 1}\n',
        b'{"index": 4, "num_tokens": 1, "log_likelihood": -1.0}\n',
        b'{"index": -1, "num_tokens": 1, "log_likelihood": -1.0}\n',
        b'{"index": "0", "num_tokens": 1, "log_likelihood": -1.0}\n',
    ],
)
def test_a_damaged_middle_line_is_refused(partial: Path, damage: bytes, written: Write, opened: Open) -> None:
    written(0, 1)
    first, second, third = partial.read_bytes().splitlines(keepends=True)
    content = first + second + damage + third
    partial.write_bytes(content)
    with pytest.raises(DocumentError, match=r"scores\.jsonl\.partial, line 3 is damaged"):
        opened()
    assert partial.read_bytes() == content


@pytest.mark.parametrize("first", [b"{}\n", b"[]\n", b"hello\n", b'{"index": 0}\n'])
def test_a_file_that_is_no_journal_is_refused(partial: Path, first: bytes, opened: Open) -> None:
    partial.write_bytes(first)
    with pytest.raises(DocumentError, match="line 1 is damaged"):
        opened()
    assert partial.read_bytes() == first


def test_a_folder_in_the_journals_place(output: Path, partial: Path, opened: Open) -> None:
    partial.mkdir()
    with pytest.raises(DocumentError, match="choose another --output"):
        opened()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="can't be written"):
        Journal(tmp_path / "nowhere" / "scores.jsonl", "job", IDS, Score)
