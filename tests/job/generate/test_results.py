"""Results on their way to disk: of this replica, of others, and when something goes wrong."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch.distributed import HashStore

from lp_plugin.generate.results import Generated, Relay, Results
from lp_plugin.generate.stream import Stream
from lp_plugin.job.documents import TokenizedDocuments
from lp_plugin.job.journal import Journal
from lp_plugin.job.progress import Progress

IDS = ("a", "b", "c", "d", "e")
TOKENS = {index: [65 + index + step for step in range(index + 1)] for index in range(len(IDS))}


def decode(token_ids: list[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal[Generated]]:
    journal = Journal(tmp_path / "out.jsonl", "job", IDS, Generated)
    yield journal
    journal._stream.close()


@pytest.fixture
def results(journal: Journal[Generated]) -> Callable[..., Results]:
    def results(expected: int, store: Any = None, num_replicas: int = 1) -> Results:
        progress = Progress("prompts", len(IDS), 0, bar=False)
        return Results(
            journal, decode, progress, expected=expected, store=store, num_replicas=num_replicas, stream=None
        )

    return results


def on_disk(journal: Journal[Generated]) -> dict[int, list[int]]:
    lines = journal.path.read_text(encoding="utf-8").splitlines()[1:]
    return {record["index"]: record["token_ids"] for record in map(json.loads, lines)}


def test_a_finished_prompt_is_on_disk_while_the_others_go_on(
    journal: Journal[Generated], results: Callable[..., Results]
) -> None:
    with results(2) as open_results:
        open_results.tokens(3, [65])
        open_results.finished(3, TOKENS[3])
        deadline = time.monotonic() + 60
        while not on_disk(journal):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert on_disk(journal) == {3: TOKENS[3]}
        open_results.finished(0, TOKENS[0])
    assert on_disk(journal) == {3: TOKENS[3], 0: TOKENS[0]}
    assert journal.records[3] == Generated(text="DEFG", token_ids=TOKENS[3])


def test_other_replicas_hand_theirs_over(journal: Journal[Generated], results: Callable[..., Results]) -> None:
    store = HashStore()
    relays = [Relay(store, 1), Relay(store, 2)]

    def send(relay: Relay, indices: tuple[int, ...]) -> None:
        for index in indices:
            relay.finished(index, TOKENS[index])
            time.sleep(0.3)

    senders = [threading.Thread(target=send, args=pair) for pair in zip(relays, ((1, 4), (2, 3)), strict=True)]
    with results(5, store, 3) as open_results:
        for sender in senders:
            sender.start()
        open_results.finished(0, TOKENS[0])
    for sender in senders:
        sender.join()
    assert on_disk(journal) == TOKENS
    assert journal.missing() == []


def test_a_result_that_can_not_be_written_ends_the_job(
    journal: Journal[Generated], results: Callable[..., Results]
) -> None:
    def go_on() -> None:
        with results(2) as open_results:
            open_results.finished(0, TOKENS[0])
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # the next call that notices raises it
                open_results.tokens(1, [1])
                time.sleep(0.01)

    journal._stream.close()
    with pytest.raises(ValueError, match="closed file"):
        go_on()


def test_what_is_finished_is_kept_when_the_computation_fails(
    journal: Journal[Generated], results: Callable[..., Results]
) -> None:
    def fail() -> None:
        with results(2) as open_results:
            open_results.finished(1, TOKENS[1])
            raise RuntimeError("peer")

    with pytest.raises(RuntimeError, match="peer"):
        fail()
    assert on_disk(journal) == {1: TOKENS[1]}


# --- texts as they come ------------------------------------------------------------------------------------------


def shown(*events: tuple[int, list[int], bool]) -> str:
    page = io.StringIO()
    texts = [f"{identity} \n is" for identity in IDS]
    tokens = np.array([byte for text in texts for byte in text.encode()], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, texts)])
    prompts = TokenizedDocuments(ids=IDS, tokens=tokens, offsets=offsets)
    stream = Stream(Console(file=page, width=40), decode, prompts)
    for index, token_ids, ended in events:
        stream.show(index, token_ids, ended=ended)
    return page.getvalue()


def test_one_prompt_is_followed_and_the_others_come_after_it() -> None:
    events = [(1, [66], False), (0, [65], False), (1, [67], False), (0, [65, 66], True), (1, [66, 67], True)]
    assert shown(*events[:3]) == "▌ b  b is\nBC"
    assert shown(*events) == "▌ b  b is\nBC\n\n▌ a  a is\nAB\n\n"


def test_a_character_is_shown_once_all_its_bytes_are_there() -> None:
    first, second = "é".encode()
    assert shown((0, [65, first], False)) == "▌ a  a is\n"
    assert shown((0, [65, first], False), (0, [second], False)) == "▌ a  a is\nAé"
    assert shown((0, [65, first], False), (0, [65, first], True)) == "▌ a  a is\nA\N{REPLACEMENT CHARACTER}\n\n"


def test_long_texts_are_not_broken_and_markup_is_left_alone() -> None:
    text = "[bold]" + "x" * 100
    assert shown((0, list(text.encode()), True)) == f"▌ a  a is\n{text}\n\n"
