"""Finished prompts on their way to disk, and to the screen, beside the computation.

The pipeline's turns must not wait for a disk, a tokenizer or a terminal: a thread of rank 0 takes what is finished,
decodes it, and adds it to the journal, all that is there at a time with one wait for the disk. Other replicas of the
pipeline hand their results over through the job's key-value store, so that one process writes.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypedDict

from lp_plugin.generate.stream import Stream
from lp_plugin.job.journal import Journal
from lp_plugin.job.progress import Progress

__all__ = ["Generated", "Relay", "Results"]

_POLL_SECONDS = 0.02
"""Between looks at what has come: often enough for the eye, seldom enough not to disturb the turns."""
_STORE_SECONDS = 0.25
"""Between looks into the store for other replicas' results."""


class Generated(TypedDict):
    """One prompt's result, as it is written."""

    text: str
    """The new tokens' text, special tokens left out."""
    token_ids: list[int]
    """The new tokens alone, the end-of-sequence token included."""


class Relay:
    """Hands results of one replica over to rank 0.

    Args:
        store: The job's key-value store.
        replica: Number of the replica; not 0, whose results rank 0 has itself.
    """

    def __init__(self, store: Any, replica: int) -> None:
        self._store, self._replica, self._sent = store, replica, 0

    def finished(self, index: int, token_ids: list[int]) -> None:
        """Sends a finished prompt."""
        self._store.set(_result_key(self._replica, self._sent), json.dumps([index, token_ids]))
        self._sent += 1
        self._store.add(_count_key(self._replica), 1)


class Results:
    """Collects results on rank 0; leaving its ``with`` block waits until all that are expected are on disk.

    Args:
        journal: Where they go.
        decode: Token ids -> text.
        progress: What is told of them.
        expected: Results to come, of all replicas.
        store: The job's key-value store.
        num_replicas: Replicas of the pipeline.
        stream: Prints texts as they come; None does not.
    """

    def __init__(
        self,
        journal: Journal[Generated],
        decode: Callable[[list[int]], str],
        progress: Progress,
        *,
        expected: int,
        store: Any,
        num_replicas: int,
        stream: Stream | None,
    ) -> None:
        self._journal, self._decode, self._progress, self._stream = journal, decode, progress, stream
        self._expected, self._store = expected, store
        self._taken = dict.fromkeys(range(1, num_replicas), 0)
        self._last_look = 0.0
        self._waiting: queue.SimpleQueue[tuple[int, list[int], bool]] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stopped.set()  # what has come is written all the same
        self._thread.join()
        if kind is None:
            self._check()

    def tokens(self, index: int, token_ids: list[int]) -> None:
        """Takes new tokens of a prompt of this replica.

        Raises:
            LpPluginError: If an earlier result could not be written.
        """
        self._check()
        self._waiting.put((index, token_ids, False))

    def finished(self, index: int, token_ids: list[int]) -> None:
        """Takes all new tokens of a finished prompt of this replica.

        Raises:
            LpPluginError: If an earlier result could not be written.
        """
        self._check()
        self._waiting.put((index, token_ids, True))

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while self._expected and not self._stopped.wait(_POLL_SECONDS):
                self._write(self._of_this_replica() | self._of_replicas())
            self._write(self._of_this_replica())
        except Exception as failure:  # noqa: BLE001 - the main thread raises it
            self._failure = failure

    def _of_this_replica(self) -> dict[int, list[int]]:
        """Finished prompts that have come since the last look; other tokens are shown."""
        finished: dict[int, list[int]] = {}
        fresh = 0
        while not self._waiting.empty():
            index, token_ids, ended = self._waiting.get()
            if ended:
                finished[index] = token_ids
            else:
                fresh += len(token_ids)
            if self._stream is not None:
                self._stream.show(index, token_ids, ended=ended)
        if fresh:
            self._progress.advance(0, fresh)
        return finished

    def _of_replicas(self) -> dict[int, list[int]]:
        """Finished prompts of the other replicas, looked for now and then."""
        found: dict[int, list[int]] = {}
        now = time.monotonic()
        if not self._taken or now - self._last_look < _STORE_SECONDS:
            return found
        self._last_look = now
        for replica, taken in self._taken.items():
            sent = self._store.add(_count_key(replica), 0)
            for number in range(taken, sent):
                key = _result_key(replica, number)
                index, token_ids = json.loads(self._store.get(key))
                self._store.delete_key(key)
                found[index] = token_ids
                self._progress.advance(0, len(token_ids))
            self._taken[replica] = sent
        return found

    def _write(self, finished: dict[int, list[int]]) -> None:
        if not finished:
            return
        records = {
            index: Generated(text=self._decode(token_ids), token_ids=token_ids) for index, token_ids in finished.items()
        }
        self._journal.append(records)
        self._expected -= len(records)
        self._progress.advance(len(records), 0)


def _count_key(replica: int) -> str:
    return f"lp_plugin/generated/{replica}/count"


def _result_key(replica: int, number: int) -> str:
    return f"lp_plugin/generated/{replica}/{number}"
