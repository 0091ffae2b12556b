"""Results on disk while a job runs: nothing lost, nothing done twice.

Results are appended to ``OUTPUT.partial`` as they come and forced to disk; when all are there, they are written to
``OUTPUT`` in input order through a rename, and the journal is removed. A job that is started again reads its
journal first. The first line names the job, so that results of different jobs never mix.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from lp_plugin.errors import DocumentError
from lp_plugin.files import check_target, open_regular, parse_json, write_atomically
from lp_plugin.quantity import shown

__all__ = ["Journal"]

Record = TypeVar("Record", bound=Mapping[str, Any])

_MOST_BYTES = 2**26  # of a line; a few per token of a document
_MOST_VALUES = 10_000_000  # in a line; one or two per token


class Journal(Generic[Record]):
    """The results of one job: a dict per document, of the same keys.

    Args:
        output: Where the finished file goes.
        job_digest: Names everything that the results depend on.
        ids: The documents' ids, in input order.
        kind: A TypedDict: the keys of a result, in the order of the output.

    Attributes:
        records: What is finished, by the document's number in the input.

    Raises:
        DocumentError: If the output can't be written there, or the journal belongs to another job.
    """

    def __init__(self, output: str | Path, job_digest: str, ids: tuple[str | int, ...], kind: type[Record]) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(f"{self.output.name}.partial")
        self._ids = ids
        self._keys = tuple(kind.__annotations__)
        self.records: dict[int, Record] = {}
        self._good_bytes = 0
        try:
            check_target(self.path)
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
            raise DocumentError(
                f"{self.path} can't be written: {error.strerror or error}; choose another --output."
            ) from None

    def missing(self) -> list[int]:
        """Documents that have no result yet, in input order."""
        return [index for index in range(len(self._ids)) if index not in self.records]

    def append(self, records: Mapping[int, Record]) -> None:
        """Adds results; on return they are on disk."""
        try:
            for index, record in records.items():
                self._write_line({"index": index, **record})
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise DocumentError(
                f"{self.path} can't be written: {error.strerror}; make room, then start the same command again."
            ) from None
        self.records.update(records)

    def finish(self) -> None:
        """Writes the output in input order and removes the journal.

        Raises:
            DocumentError: If the output can't be written; the journal stays.
        """
        try:
            write_atomically(self.output, "".join(self._output_lines()))
        except OSError as error:
            raise DocumentError(
                f"{self.output} can't be written: {error.strerror or error}; all results are in {self.path.name}: "
                "make room, then start the same command again."
            ) from None
        self._stream.close()
        self.path.unlink()

    def _output_lines(self) -> Iterable[str]:
        for index, identity in enumerate(self._ids):
            yield json.dumps({"id": identity, **self.records[index]}, ensure_ascii=False) + "\n"

    def _write_line(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record).encode() + b"\n")

    def _read(self, job_digest: str) -> None:
        with open_regular(self.path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_BYTES), b""), start=1):
                if not line.endswith(b"\n"):
                    return  # a crash cut it short
                self._take(number, line, job_digest)

    def _take(self, number: int, line: bytes, job_digest: str) -> None:
        """Takes over what an earlier run wrote in a line."""
        try:
            record = parse_json(line.decode(), _MOST_VALUES)
            if number > 1:
                result = {key: record[key] for key in self._keys}
                self.records[self._checked(record["index"])] = cast("Record", result)
            named = record["job"] if number == 1 else job_digest
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(
                f"{self.path}, line {number} is damaged ({error}); delete the file to start again."
            ) from None
        if named != job_digest:
            raise DocumentError(
                f"{self.path} holds unfinished results of another job (other model, precision, options or input); "
                "choose another --output, or delete it."
            )
        self._good_bytes += len(line)

    def _checked(self, index: Any) -> int:
        if type(index) is not int or not 0 <= index < len(self._ids):
            raise ValueError(f"index {shown(index)} of {len(self._ids)} documents")
        return index
