"""Who sits in which slot, and whose turn it is: against a plain simulation of rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_plugin.integrations.deepspeed.generation.slots import Group, Pass, Turn, make_groups, take_turns


@dataclass
class PlainSlot:
    """What a slot still has to do, written out beforehand."""

    to_do: list[Pass | None] = field(default_factory=list)
    done: Pass | None = None


def simulated(ends: list[int], num_slots: int, max_passes: int) -> list[Turn]:
    """Rounds over all slots: a slot without plans takes the next group, and plans all of its passes at once.

    Args:
        ends: For each group the pass after which all its rows have ended.
        num_slots: Slots.
        max_passes: Passes at most.
    """
    waiting = list(enumerate(ends))
    slots = [PlainSlot() for _ in range(min(num_slots, len(ends)))]
    turns = []
    while any(slot.to_do or slot.done for slot in slots) or waiting:
        for number, slot in enumerate(slots):
            if not slot.to_do:
                if waiting:
                    group, end = waiting.pop(0)
                    passes = min(max_passes, end + 1)  # an end is known after one more pass
                    slot.to_do = [Pass(group=group, number=age) for age in range(1, passes + 1)]
                elif slot.done:
                    slot.to_do = [None]
                else:
                    continue
            run = slot.to_do.pop(0)
            turns.append(Turn(slot=number, run=run, returns=slot.done))
            slot.done = run
    return turns


@given(
    max_passes=st.integers(1, 6),
    ends=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    num_slots=st.integers(1, 5),
)
def test_turns_are_those_of_the_simulation(max_passes: int, ends: list[int], num_slots: int) -> None:
    asked: list[Turn] = []

    def arrived(turn: Turn) -> bool:
        asked.append(turn)
        return turn.returns is not None and turn.returns.number >= ends[turn.returns.group]

    taken = []
    for turn in take_turns(len(ends), num_slots, max_passes, arrived):
        # what came with a slot's turn is asked for before its next one and never later
        assert [each for each in taken if each.slot == turn.slot] == [each for each in asked if each.slot == turn.slot]
        taken.append(turn)
    assert taken == simulated(ends, num_slots, max_passes)
    assert sorted(map(taken.index, asked)) == list(range(len(taken)))


@given(
    max_passes=st.integers(1, 6),
    ends=st.lists(st.integers(1, 8), min_size=1, max_size=12),
    num_slots=st.integers(1, 5),
)
def test_every_needed_pass_is_run_once_and_returned_once(max_passes: int, ends: list[int], num_slots: int) -> None:
    turns = simulated(ends, num_slots, max_passes)
    runs = [turn.run for turn in turns if turn.run is not None]
    assert sorted(map(repr, runs)) == sorted(repr(turn.returns) for turn in turns if turn.returns is not None)
    for group, end in enumerate(ends):
        ages = [run.number for run in runs if run.group == group]
        assert ages == list(range(1, len(ages) + 1))
        assert min(end, max_passes) <= len(ages) <= min(end + 1, max_passes)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), rows=st.integers(1, 6))
def test_groups_hold_every_prompt_once_and_longest_first(lengths: list[int], rows: int) -> None:
    groups = make_groups(lengths, rows)
    assert sorted(prompt for group in groups for prompt in group.prompts) == list(range(len(lengths)))
    assert [len(group.prompts) for group in groups[:-1]] == [rows] * (len(groups) - 1)
    flat = [lengths[prompt] for group in groups for prompt in group.prompts]
    assert flat == sorted(lengths, reverse=True)
    assert all(group.tokens == max(lengths[prompt] for prompt in group.prompts) for group in groups)


@pytest.mark.parametrize(
    ("lengths", "rows", "expected"),
    [
        ([3, 9, 5], 2, (Group(prompts=(1, 2), tokens=9), Group(prompts=(0,), tokens=3))),
        ([4, 4], 1, (Group(prompts=(0,), tokens=4), Group(prompts=(1,), tokens=4))),
    ],
)
def test_groups(lengths: list[int], rows: int, expected: tuple[Group, ...]) -> None:
    assert make_groups(lengths, rows) == expected
