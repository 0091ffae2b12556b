"""Results on disk while a job runs: nothing lost, nothing done twice.

Results are appended to ``OUTPUT.partial`` as they come and forced to disk; when all are there, they are written to
``OUTPUT`` in input order through a rename, and the journal is removed. A job that is started again reads its
journal first. The first line names the job, so that results of different jobs never mix. Memory holds a number per
document, where its result begins: however long a job is, it needs no more.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from lp_plugin.errors import DocumentError
from lp_plugin.files import check_target, open_regular, parse_json, write_atomically
from lp_plugin.quantity import shown

__all__ = ["Journal"]

Record = TypeVar("Record", bound=Mapping[str, Any])

_MOST_BYTES = 2**26  # of a line; a few per token of a document
_MOST_VALUES = 10_000_000  # in a line; one or two per token
_NOWHERE = -1


class Journal(Generic[Record]):
    """The results of one job: a dict per document, of the same keys.

    Args:
        output: Where the finished file goes.
        job_digest: Names everything that the results depend on.
        ids: The documents' ids, in input order.
        kind: A TypedDict: the keys of a result, in the order of the output.

    Attributes:
        records: What is finished, by the document's number in the input; read from the disk, until `finish`.

    Raises:
        DocumentError: If the output can't be written there, or the journal belongs to another job.
    """

    def __init__(self, output: str | Path, job_digest: str, ids: tuple[str | int, ...], kind: type[Record]) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(f"{self.output.name}.partial")
        self._ids = ids
        self._keys = tuple(kind.__annotations__)
        self._starts = array("q", [_NOWHERE]) * len(ids)
        self._good_bytes = 0
        try:
            check_target(self.path)
            self._stream = self.path.open("a+b")
            self.records: Mapping[int, Record] = _Records(self._stream, self._starts, self._keys)
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
        return [index for index, start in enumerate(self._starts) if start == _NOWHERE]

    def append(self, records: Mapping[int, Record]) -> None:
        """Adds results; on return they are on disk."""
        starts = {}
        try:
            end = self._stream.seek(0, os.SEEK_END)
            for index, record in records.items():
                starts[index] = end
                end += self._write_line({"index": index, **record})
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise DocumentError(
                f"{self.path} can't be written: {error.strerror}; make room, then start the same command again."
            ) from None
        for index, start in starts.items():
            self._starts[index] = start

    def finish(self) -> None:
        """Writes the output in input order and removes the journal.

        Raises:
            DocumentError: If the output can't be written; the journal stays.
        """
        try:
            write_atomically(self.output, self._output_lines())
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

    def _write_line(self, record: Mapping[str, Any]) -> int:
        """Bytes of the line."""
        return self._stream.write(json.dumps(record).encode() + b"\n")

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
                _result(record, self._keys)
                self._starts[self._checked(record["index"])] = self._good_bytes
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


class _Records(Mapping[int, Record]):
    """What a journal holds, read when it is asked for."""

    def __init__(self, stream: IO[bytes], starts: array[int], keys: tuple[str, ...]) -> None:
        self._stream, self._starts, self._keys = stream, starts, keys

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self._starts) or self._starts[index] == _NOWHERE:
            raise KeyError(index)
        self._stream.seek(self._starts[index])
        return cast("Record", _result(json.loads(self._stream.readline()), self._keys))

    def __iter__(self) -> Iterator[int]:
        return (index for index, start in enumerate(self._starts) if start != _NOWHERE)

    def __len__(self) -> int:
        return len(self._starts) - self._starts.count(_NOWHERE)


def _result(line: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: line[key] for key in keys}
