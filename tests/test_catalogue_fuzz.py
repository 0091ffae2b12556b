"""Broken cluster files: each gives a cluster or a typed error that says something, soon and in little memory."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Callable

import pytest

from lp_plugin.errors import InvalidInputError
from lp_plugin.hardware import Cluster

NUM_MUTANTS = 5000
SAMPLE = 20
"""Every how many mutants the peak of memory is looked at."""

TYPES = """
devices_per_node = 4  # of any type
[[device]]
type = "h100-sxm"
count = 8
[[device]]
type = "a100-40g"
count = 2
[link]
name = "wire"
bandwidth = "450 GB/s"
latency = "35 us"
[network]
bandwidth = 50e9
latency = 4e-5
collective_efficiency = 0.5
[[link_between]]
first = 7
bandwidth = "12.5 GB/s"
latency = "1 ms"
bandwidth_efficiency = 0.8
"""
OWN = """
[[device]]
name = "mycard"
count = 3
compute_efficiency = 0.6
layer_overhead = "300 us"
[[device.tier]]
name = "l2"
capacity = "40 MB"
bandwidth = "5 TB/s"
usable_fraction = 0.66
[[device.tier]]
name = "hbm"
capacity = 48_000_000_000
bandwidth = "1 TB/s"
bandwidth_efficiency = 0.9
[device.flops]
float16 = "300 TFLOP/s"
int8 = 6e14
[[device]]
type = 'cpu'
count = 2
[link]
bandwidth = "2 GB/s"
latency = 0
"""
INLINE = """
device = [{ type = "h200", count = 9 }, { type = "b200", count = 1 }]
network = { bandwidth = "25 GB/s", latency = "10 us" }
link_between = [{ first = 0, bandwidth = 1, latency = 1 }, { first = 8, bandwidth = 2, latency = 2 }]
"""
VALUES = ["nan", "-nan", "inf", "-inf", "-1", "0", "0.0", "-0.0", "1e400", "1e-400", "5e-324", "1e308", "65536",
          "65537", "1_000_000", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "true", "'x'", "''", "1979-05-27", "07:32:00",
          '"1e99 TB/s"', '"-3 GB/s"', '"1e-99 s"', '"h200"', '"\\u0000"', '"\\ud800"', "'''\n'''", "[]", "{}", "[1, 2]",
          "{a = 1}", "[[[[]]]]", "[" * 2000, "[" * 300 + "]" * 300, "{a = " * 150 + "1" + "}" * 150]  # fmt: skip
VALUE = re.compile(r'"[^"\n]*"|\'[^\'\n]*\'|(?<![\w.])-?[0-9][\w.]*')
KEY = re.compile(r"^ *\w+(?= *=)|(?<=[{,]) *\w+(?= *=)", re.MULTILINE)
NAMES = ["type", "count", "name", "tier", "flops", "first", "device", "link", "network", "link_between", "capacity",
         "bandwidth", "latency", "devices_per_node", "x",
         "''", '"a\\nb"', "a.b.c", "é", "." * 9, "a" * 3000]  # fmt: skip


def a_match(pattern: re.Pattern[str], text: str, draw: random.Random) -> tuple[int, int]:
    spans = [match.span() for match in pattern.finditer(text)]
    return draw.choice(spans) if spans else (0, 0)


def another_value(text: str, draw: random.Random) -> str:
    start, stop = a_match(VALUE, text, draw)
    return text[:start] + draw.choice(VALUES) + text[stop:]


def another_key(text: str, draw: random.Random) -> str:
    start, stop = a_match(KEY, text, draw)
    key = text[start:stop]
    near = key[:-1] + draw.choice("xs_") if key else "x"
    return text[:start] + draw.choice([near, key.upper(), draw.choice(NAMES)]) + text[stop:]


def tables_of(text: str) -> list[str]:
    return re.split(r"(?m)^(?=\[)", text)


def a_table_twice(text: str, draw: random.Random) -> str:
    tables = tables_of(text)
    tables.insert(draw.randrange(len(tables) + 1), draw.choice(tables) * draw.choice([1, 1, 50]))
    return "".join(tables)


def a_table_less(text: str, draw: random.Random) -> str:
    tables = tables_of(text)
    tables.pop(draw.randrange(len(tables)))
    return "".join(tables)


def other_brackets(text: str, draw: random.Random) -> str:
    start, stop = a_match(re.compile(r"^\[+|\]+$", re.MULTILINE), text, draw)
    return text[:start] + draw.choice(["", "[", "]", "[[", "]]", "[[[", "[device."]) + text[stop:]


def a_line_more_or_less(text: str, draw: random.Random) -> str:
    lines = text.split("\n")
    line = lines.pop(draw.randrange(len(lines)))
    if draw.random() < 0.5:
        for _ in range(2):
            lines.insert(draw.randrange(len(lines) + 1), line)
    return "\n".join(lines)


def cut_short(text: str, draw: random.Random) -> str:
    return text[: draw.randrange(len(text) + 1)]


CHANGES: list[Callable[[str, random.Random], str]] = [
    *(another_value,) * 3,
    *(another_key,) * 2,
    a_table_twice,
    a_table_less,
    other_brackets,
    a_line_more_or_less,
    cut_short,
]


def mutant(draw: random.Random) -> bytes:
    text = draw.choice([TYPES, OWN, INLINE])
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        text = draw.choice(CHANGES)(text, draw)
    raw = bytearray(text, "utf-8")
    for _ in range(draw.choice([0, 0, 0, 1, 4]) if raw else 0):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def outcome(path) -> Cluster | str:
    try:
        return Cluster.from_toml(path)
    except InvalidInputError as error:
        return str(error)


@pytest.mark.parametrize("text", [TYPES, OWN, INLINE])
def test_the_files_to_break_are_sound(tmp_path, text):
    (tmp_path / "cluster.toml").write_text(text, encoding="utf-8")
    assert isinstance(outcome(tmp_path / "cluster.toml"), Cluster)


def test_broken_files_give_a_cluster_or_say_what_is_wrong(tmp_path):
    draw = random.Random(20_260)  # noqa: S311 - the same mutants in every run
    path = tmp_path / "cluster.toml"
    messages: set[str] = set()
    clusters = 0
    for number in range(NUM_MUTANTS):
        raw = mutant(draw)
        path.write_bytes(raw)
        if number % SAMPLE == 0:
            tracemalloc.start()
        result = outcome(path)
        if number % SAMPLE == 0:
            assert tracemalloc.get_traced_memory()[1] < 50 * 2**20, raw
            tracemalloc.stop()
        if isinstance(result, Cluster):
            clusters += 1
            check(result, raw)
        else:
            messages.add(result.removeprefix(f"cluster file {path}"))
            assert result.startswith(f"cluster file {path}"), raw
            assert 20 < len(result) - len(str(path)) < 5000, raw
            assert "\n" not in result, raw
    assert clusters > NUM_MUTANTS // 20, "some mutants stay sound"
    assert len(messages) > NUM_MUTANTS // 20, "the mutants are wrong in many ways"


def check(cluster: Cluster, raw: bytes) -> None:
    """The cluster can be worked with: no figure in it is broken."""
    assert len(cluster.digest) == 64, raw
    assert sum(cluster.node_sizes()) == len(cluster.devices) <= 65_536, raw
    for link in {*cluster.links}:
        assert 0 <= link.seconds(1) <= link.seconds(1e30) < float("inf"), raw
        assert 0 <= link.all_reduce_seconds(1, 2) <= link.all_reduce_seconds(1e30, 65_536) < float("inf"), raw
    for device in {*cluster.devices}:
        assert 0 <= device.memory.usable_bytes <= device.memory.capacity_bytes, raw
        assert 0 < device.memory.achieved_bytes_per_second < float("inf"), raw
        assert all(0 < device.flops(dtype) < float("inf") for dtype, _ in device.peak_flops), raw
