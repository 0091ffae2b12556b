"""Interval arithmetic against a grid, messages matched between ranks, traces read, and real processes profiled."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import split_case
from hypothesis import given
from hypothesis import strategies as st
from strategies import STEADY

from lp_plugin.measure.intervals import Intervals, difference, intersection, make_intervals, measure, shares, union
from lp_plugin.measure.messages import Message, operation_of, transfers
from lp_plugin.measure.traces import MOST_EVENTS, Event, merge_events, read_trace
from lp_plugin.measured import TimeSplit

END = 30
SETS = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)).map(sorted), max_size=12).map(make_intervals)


def grid(intervals: Intervals) -> set[int]:
    """The whole numbers that are covered, one by one."""
    return {moment for start, stop in intervals.tolist() for moment in range(start, stop)}


@STEADY
@given(SETS, SETS)
def test_intervals_are_sets_of_moments(first: Intervals, second: Intervals) -> None:
    expected = {
        "union": (union(first), grid(first)),
        "both": (intersection(first, second), grid(first) & grid(second)),
        "one": (difference(first, second), grid(first) - grid(second)),
    }
    for got, moments in expected.values():
        assert grid(got) == moments
        assert measure(got) == len(moments)
        edges = got.ravel().tolist()
        assert edges == sorted(set(edges)), "sorted, not empty, with gaps between"


def message(operation: str, start: int, stop: int, lane: str = "a") -> Message:
    return Message(operation=operation, lane=lane, start=start, stop=stop)


def met(messages: dict[int, list[Message]], **groups: list[list[int]]) -> dict[int, list[list[int]] | None]:
    given_groups = {"tensor_groups": [], "pipelines": [list(messages)]} | groups
    found = transfers(
        {rank: sorted(own, key=lambda each: each.start) for rank, own in messages.items()}, **given_groups
    )
    return {rank: None if own is None else own.tolist() for rank, own in found.items()}


@st.composite
def hops(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Stages, and (sender, when it begins, when the next stage begins to receive, when both end), in order."""
    stages = draw(st.integers(2, 4))
    made = []
    for sender in range(stages):
        moment = 0
        for _ in range(draw(st.integers(0, 3))):
            starts = [moment + draw(st.integers(1, 5)) for _ in range(2)]
            moment = max(starts) + draw(st.integers(1, 5))
            made.append((sender, *starts, moment))
    return stages, made


@STEADY
@given(SETS, st.integers(1, 7), st.integers(1, 9))
def test_shares_of_columns(intervals: Intervals, columns: int, width: int) -> None:
    moments = grid(intervals)
    expected = [len(moments & set(range(place * width, (place + 1) * width))) / width for place in range(columns)]
    assert shares(intervals, columns * width, columns).tolist() == pytest.approx(expected)


@STEADY
@given(hops())
def test_both_are_there_from_the_later_start_on(drawn: tuple[int, list[tuple[int, int, int, int]]]) -> None:
    stages, made = drawn
    messages: dict[int, list[Message]] = {rank: [] for rank in range(stages)}
    expected: dict[int, set[int]] = {rank: set() for rank in range(stages)}
    for sender, sends, receives, stop in made:
        receiver = (sender + 1) % stages
        messages[sender].append(message("send", sends, stop))
        messages[receiver].append(message("recv", receives, stop))
        for rank in (sender, receiver):
            expected[rank] |= set(range(max(sends, receives), stop))
    found = met(messages)
    assert {rank: grid(make_intervals(own)) for rank, own in found.items() if own is not None} == expected


def test_two_stages_on_one_stream_meet_in_order() -> None:
    first = [message("SendRecv", 0, 10), message("SendRecv", 20, 30)]
    second = [message("SendRecv", 4, 10), message("SendRecv", 15, 31)]
    assert met({0: first, 1: second}) == {0: [[4, 10], [20, 30]], 1: [[4, 10], [20, 30]]}


def test_two_stages_with_a_stream_for_each_message_as_graphs_have_them_meet_in_order() -> None:
    first = [message("SendRecv", start, start + 6, f"stream {start}") for start in (10, 20, 30)]
    second = [message("SendRecv", start, start + 9, f"stream {start}") for start in (7, 17, 27)]
    both = [[10, 16], [20, 26], [30, 36]]
    assert met({0: first, 1: second}) == {0: both, 1: both}


def test_streams_tell_who_is_at_the_other_end() -> None:
    """A ring of three: each rank sends on one stream and receives on another."""
    ring = {
        0: [message("SendRecv", 0, 10, "x"), message("SendRecv", 25, 40, "y")],
        1: [message("SendRecv", 5, 10, "p"), message("SendRecv", 14, 22, "q")],
        2: [message("SendRecv", 1, 22, "r"), message("SendRecv", 30, 40, "s")],
    }
    assert met(ring) == {0: [[5, 10], [30, 40]], 1: [[5, 10], [14, 22]], 2: [[14, 22], [30, 40]]}


def test_two_directions_on_two_streams_are_not_mixed_up() -> None:
    first = [message("SendRecv", 0, 10, "on"), message("SendRecv", 1, 40, "back"), message("SendRecv", 20, 30, "on")]
    second = [message("SendRecv", 2, 10, "on"), message("SendRecv", 12, 30, "on"), message("SendRecv", 35, 40, "back")]
    assert met({0: first, 1: second}) == {0: [[2, 10], [20, 30], [35, 40]], 1: [[2, 10], [20, 30], [35, 40]]}


def test_groups_reduce_and_pipelines_send_apart() -> None:
    ranks = {
        0: [message("AllReduce", 0, 9), message("SendRecv", 10, 22)],
        1: [message("AllReduce", 3, 9), message("SendRecv", 11, 21)],
        2: [message("SendRecv", 12, 22), message("AllReduce", 50, 59)],
        3: [message("SendRecv", 13, 21), message("AllReduce", 51, 60)],
    }
    found = met(ranks, tensor_groups=[[0, 1], [2, 3]], pipelines=[[0, 2], [1, 3]])
    assert found == {
        0: [[3, 9], [12, 22]],
        1: [[3, 9], [13, 21]],
        2: [[12, 22], [51, 59]],
        3: [[13, 21], [51, 59]],
    }


def test_ranks_alone_in_their_groups_reduce_with_all() -> None:
    ranks = {0: [message("all_reduce", 0, 9)], 1: [message("all_reduce", 3, 9)]}
    assert met(ranks, tensor_groups=[[0], [1]], pipelines=[[0], [1]]) == {0: [[3, 9]], 1: [[3, 9]]}


@pytest.mark.parametrize(
    ("ranks", "unmatched"),
    [
        ({0: [message("AllReduce", 0, 9)], 1: []}, {0}),
        ({0: [message("AllReduce", 0, 9)], 1: [message("AllReduce", 10**6, 10**6 + 9)]}, {0, 1}),
        ({0: [message("send", 10**6, 2 * 10**6)], 1: [message("recv", 0, 9)]}, {0, 1}),
        ({0: [], 1: [message("SendRecv", 0, 9)], 2: []}, {1}),
    ],
    ids=["one has more", "done before all began", "received before it was sent", "one stream in the middle"],
)
def test_what_can_not_be_the_same_message_is_not_matched(ranks: dict[int, list[Message]], unmatched: set[int]) -> None:
    assert {rank for rank, own in met(ranks).items() if own is None} == unmatched


def test_names_of_operations() -> None:
    names = ["ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_AllReduce_Sum_f16_RING_LL(x)"]
    assert [operation_of(name) for name in [*names, "gloo:all_reduce"]] == ["SendRecv", "AllReduce", "all_reduce"]


def trace(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "trace.json"
    rows = [{"ph": "X", "pid": 7, "tid": 7} | row for row in rows]
    path.write_text(json.dumps({"baseTimeNanoseconds": 1_000, "traceEvents": [*rows, {"ph": "i", "name": "mark"}]}))
    return path


def test_a_gpu_trace_gives_kernels_copies_and_messages(tmp_path: Path) -> None:
    rows = [
        {"cat": "kernel", "name": "ncclDevKernel_SendRecv(a)", "ts": 4.0, "dur": 2.0, "args": {"stream": 20}},
        {"cat": "kernel", "name": "nvjet", "ts": 2.5, "dur": 1.25, "args": {"stream": 7}},
        {"cat": "kernel", "name": "before", "ts": 0.5, "dur": 9.0, "args": {"stream": 7}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 9.0, "dur": 1.0, "args": {"stream": 7}},
        {"cat": "gpu_user_annotation", "name": "nccl:send", "ts": 4.0, "dur": 2.0, "args": {"stream": 20}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 2.0, "dur": 0.5},
    ]
    assert read_trace(trace(tmp_path, rows), on_gpu=True, since=3_000) == [
        Event(kind="compute", name="nvjet", lane="stream 7", start=3_500, stop=4_750),
        Event(kind="communication", name="ncclDevKernel_SendRecv(a)", lane="stream 20", start=5_000, stop=7_000),
        Event(kind="compute", name="Memcpy DtoD", lane="stream 7", start=10_000, stop=11_000),
    ]


def test_what_waits_for_a_message_inside_does_not_compute_and_a_message_begins_with_its_call(tmp_path: Path) -> None:
    rows = [
        {"cat": "cpu_op", "name": "aten::linear", "ts": 1.0, "dur": 9.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 2.0, "dur": 2.0},
        {"cat": "cpu_op", "name": "_c10d_functional::wait_tensor", "ts": 5.0, "dur": 3.0},
        {"cat": "user_annotation", "name": "gloo:all_reduce", "ts": 4.0, "dur": 4.0, "tid": 9},
        {"cat": "cpu_op", "name": "aten::copy_", "ts": 7.0, "dur": 1.0, "tid": 9},
        {"cat": "cpu_op", "name": "aten::add", "ts": 3.0, "dur": 1.0, "tid": 8},
        {"cat": "cpu_op", "name": "c10d::send", "ts": 12.0, "dur": 2.0},
        {"cat": "user_annotation", "name": "gloo:send", "ts": 13.0, "dur": 6.0},
        {"cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0.0, "dur": 20.0},
    ]
    assert read_trace(trace(tmp_path, rows), on_gpu=False, since=0) == [
        Event(kind="compute", name="aten::linear", lane="main", start=2_000, stop=6_000),
        Event(kind="compute", name="aten::add", lane="thread 8", start=4_000, stop=5_000),
        Event(kind="communication", name="gloo:all_reduce", lane="gloo all_reduce", start=5_000, stop=9_000),
        Event(kind="compute", name="aten::linear", lane="main", start=9_000, stop=11_000),
        Event(kind="communication", name="gloo:send", lane="gloo send", start=13_000, stop=20_000),
    ]


def kernels(count: int, every: int, lasting: int) -> list[Event]:
    return [
        Event(kind="compute", name=f"kernel {number}", lane="stream 7", start=start, stop=start + lasting)
        for number, start in enumerate(range(0, count * every, every))
    ]


def test_all_events_are_drawn_if_they_are_few() -> None:
    few = kernels(MOST_EVENTS, 1_000, 900)
    assert merge_events(few) == few


def test_of_many_events_neighbours_are_drawn_as_one_over_the_whole_run() -> None:
    many = kernels(3 * MOST_EVENTS, 1_000, 900)
    drawn = merge_events(many)
    assert len(drawn) == 3 * MOST_EVENTS // 4
    assert [(event.start, event.stop) for event in drawn[:2]] == [(0, 3_900), (4_000, 7_900)]
    assert drawn[1].name == "kernel 4"
    assert drawn[-1].stop == many[-1].stop


def test_what_lies_far_apart_is_never_drawn_as_one() -> None:
    turns = [
        dataclasses.replace(event, kind="compute" if number % 2 else "communication")
        for number, event in enumerate(kernels(MOST_EVENTS - 1, 100_000, 90_000))
    ]
    apart = [dataclasses.replace(turns[0], lane="stream 17", start=start, stop=start + 1) for start in (1, 10**8)]
    drawn = merge_events(sorted([*turns, *apart], key=lambda event: event.start))
    assert [event for event in drawn if event.lane == "stream 17"] == apart


def test_what_alternates_is_not_merged_but_cut_off() -> None:
    turns = [
        dataclasses.replace(event, kind="compute" if number % 2 else "communication")
        for number, event in enumerate(kernels(MOST_EVENTS + 5, 10, 10))
    ]
    assert merge_events(turns) == turns[:MOST_EVENTS]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[TimeSplit]]]:
    """What each of three processes got; see `split_case`."""
    store = tmp_path_factory.mktemp("split") / "store"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["split_case"])  # torch is imported once
    with context.Pool(split_case.PROCESSES) as pool:
        return pool.starmap(split_case.profiled, [(rank, str(store)) for rank in range(split_case.PROCESSES)])


def test_all_processes_learn_the_same(profiled: list[dict[str, list[TimeSplit]]]) -> None:
    assert profiled[0] == profiled[1] == profiled[2]
    assert {name: [split.rank for split in splits] for name, splits in profiled[0].items()} == {
        "pipeline": [0, 1, 2],
        "tensor": [0, 1],
        "alone": [0],
    }


def test_real_messages_are_matched_on_one_clock(profiled: list[dict[str, list[TimeSplit]]]) -> None:
    for splits in profiled[0].values():
        assert len({split.wall_seconds for split in splits}) == 1
        for split in splits:
            assert split.transfer_seconds is not None
            assert split.exposed_transfer_seconds is not None
            assert 0 <= split.exposed_transfer_seconds <= split.transfer_seconds <= split.communication_seconds
            assert 0 <= split.overlap_seconds <= min(split.compute_seconds, split.communication_seconds)
            busy = split.compute_seconds + split.communication_seconds - split.overlap_seconds
            assert busy + split.idle_seconds == pytest.approx(split.wall_seconds)


def test_spans_show_what_ran(profiled: list[dict[str, list[TimeSplit]]]) -> None:
    first, middle, last = profiled[0]["pipeline"]
    for split, messages in ((first, {"gloo:send"}), (middle, {"gloo:send", "gloo:recv"}), (last, {"gloo:recv"})):
        assert {span.name for span in split.spans if span.kind == "communication"} == messages
        assert any(span.kind == "compute" and "mm" in span.name for span in split.spans)
        assert all(0 <= span.start_seconds <= span.stop_seconds <= split.wall_seconds for span in split.spans)
    (alone,) = profiled[0]["alone"]
    assert alone.communication_seconds == 0
    assert {span.kind for span in alone.spans} == {"compute"}
