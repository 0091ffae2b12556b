"""Scores on disk while a job runs: nothing lost, nothing scored twice.

Scores are appended to ``OUTPUT.partial`` step by step and forced to disk; when all are there, they are written to
``OUTPUT`` in input order through a rename, and the journal is removed. A job that is started again reads its
journal first. The first line names the job, so that scores of different jobs never mix.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lp_plugin.errors import DocumentError
from lp_plugin.files import write_atomically

__all__ = ["Journal", "Score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One document's result."""

    num_tokens: int
    """Tokens scored: all but the first, which has nothing before it."""
    log_likelihood: float
    """Sum of the natural logarithms of their probabilities."""


class Journal:
    """The scores of one job.

    Args:
        output: Where the finished file goes.
        job_digest: Names model, precision and input.
        ids: The documents' ids, in input order.

    Raises:
        DocumentError: If the output can't be written there, or the journal belongs to another job.
    """

    def __init__(self, output: str | Path, job_digest: str, ids: tuple[str | int, ...]) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(f"{self.output.name}.partial")
        self._ids = ids
        self.scores: dict[int, Score] = {}
        self._good_bytes = 0
        try:
            self._stream = self.path.open("ab")
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(job_digest)
                self._stream.truncate(self._good_bytes)  # a line that a crash cut short
                if not self._good_bytes:
                    self._write_line({"job": job_digest})
            except BaseException:
                self._stream.close()
                raise
        except BlockingIOError:
            raise DocumentError(
                f"{self.path} is in use: another job writes the same --output; wait for it, or choose another."
            ) from None
        except OSError as error:
            raise DocumentError(f"{self.path} can't be written: {error.strerror}; choose another --output.") from None

    def missing(self) -> list[int]:
        """Documents that have no score yet, in input order."""
        return [index for index in range(len(self._ids)) if index not in self.scores]

    def append(self, scores: Mapping[int, Score]) -> None:
        """Adds the scores of one step; on return they are on disk."""
        try:
            for index, score in scores.items():
                record = {"index": index, "num_tokens": score.num_tokens, "log_likelihood": score.log_likelihood}
                self._write_line(record)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise DocumentError(
                f"{self.path} can't be written: {error.strerror}; make room, then start the same command again."
            ) from None
        self.scores.update(scores)

    def finish(self) -> None:
        """Writes the output in input order and removes the journal."""
        write_atomically(self.output, "".join(self._output_lines()))
        self._stream.close()
        self.path.unlink()

    def _output_lines(self) -> Iterable[str]:
        for index, identity in enumerate(self._ids):
            score = self.scores[index]
            record = {"id": identity, "num_tokens": score.num_tokens, "log_likelihood": score.log_likelihood}
            yield json.dumps(record, ensure_ascii=False) + "\n"

    def _write_line(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record).encode() + b"\n")

    def _read(self, job_digest: str) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # a crash cut it short
            try:
                record = json.loads(line)
                if number > 1:
                    self.scores[self._checked(record["index"])] = Score(
                        num_tokens=record["num_tokens"], log_likelihood=record["log_likelihood"]
                    )
                named = record["job"] if number == 1 else job_digest
            except (ValueError, KeyError, TypeError) as error:
                raise DocumentError(
                    f"{self.path}, line {number} is damaged ({error}); delete the file to start again."
                ) from None
            if named != job_digest:
                raise DocumentError(
                    f"{self.path} holds unfinished scores of another job (other model, precision or input); "
                    "choose another --output, or delete it."
                )
            self._good_bytes += len(line)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self._ids):
            raise ValueError(f"index {index} of {len(self._ids)} documents")
        return index
