"""Plan files damaged in every way: each is refused with an error that names what is wrong, or is a plan."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_solve import FREE, device

from lp_plugin import Cluster, ModelProfile, Plan, PlanFileError, Workload, load_plan, make_plan, save_plan
from lp_plugin.objective import Constraints
from lp_plugin.report import as_text, stage_table

MUTATIONS = 10_000
TOKENS = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1e400",
        "-1",
        "-0.0",
        "0",
        "1.0",
        "1.5",
        "1e999999",
        "5e-324",
        "1e308",
    ),
    *("true", "false", "null", '""', '"8"', '"\\ud800"', '"\\u0000"', '"nan"', "[]", "{}", "[[]]", '{"a": 1}', "", "}"),
    *(
        "9" * 30,
        "9" * 400,
        "9" * 5000,
        "-" + "9" * 5000,
        "0x10",
        "01",
        "1_000",
        "'text'",
        "[" * 100_000,
        '{"a":' * 50_000,
    ),
    '"' + "x" * 2**20 + '"',
)
"""What takes the place of a value in the JSON text."""


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    """One per phase, of different objectives and constraints."""
    profile = ModelProfile.from_costs([1, 2, 3, 4], weight_bytes=[4, 5, 6, 7], output_bytes=[1, 0.5, 1, 1])
    cluster = Cluster.homogeneous(device(10, 10_000), 2, FREE)
    asked = Constraints(max_latency_seconds=1e6, min_tokens_per_second=1e-6, max_memory_bytes=10_000, tier="tier1")
    return [
        make_plan(profile, cluster, Workload(batch=4, sequence=2)),
        make_plan(profile, cluster, Workload(phase="decode", batch=4, sequence=2), constraints=asked),
        make_plan(
            profile,
            cluster,
            Workload(phase="train", batch=4, sequence=2, checkpointing=True, zero_stage=1, data_parallel=2),
            objective="memory",
        ),
    ]


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys or indices."""
    if isinstance(content, dict):
        keys = list(content.items())
    elif isinstance(content, list):
        keys = list(enumerate(content))
    else:
        return []
    return [(content, key) for key, _ in keys] + [place for _, value in keys for place in places(value)]


def swap_token(rng: random.Random, text: str) -> bytes:
    """A value somewhere is replaced by a token, which need not be JSON."""
    content = json.loads(text)
    container, key = rng.choice(places(content))
    container[key] = "@place@"
    return json.dumps(content).replace('"@place@"', rng.choice(TOKENS)).encode("utf-8", "surrogatepass")


def change_keys(rng: random.Random, text: str) -> bytes:
    """A key is dropped, renamed, doubled with another value, or moved elsewhere; an entry repeated or reversed."""
    content = json.loads(text)
    container, key = rng.choice(places(content))
    way, other = rng.randrange(5), rng.choice(places(content))
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[rng.choice([key.upper(), "", key + " ", "\ud800", "x" * 10_000, "schema_version"])] = container.pop(
            key
        )
    elif way == 2 and isinstance(container, dict):
        doubled = json.dumps({key: container[key]})[:-1] + f", {json.dumps(key)}: {rng.choice(['1', 'null', '[]'])}}}"
        return json.dumps(content).replace(json.dumps({key: container[key]})[1:-1], doubled[1:-1], 1).encode()
    elif way == 3:
        container[key] = json.loads(json.dumps(other[0][other[1]]))
    elif isinstance(container, list):
        container.extend([container[key]] * rng.choice([1, 1000]))
        container.reverse()
    return json.dumps(content).encode()


def damage_bytes(rng: random.Random, text: str) -> bytes:
    """Bits flipped, bytes inserted or taken away, the end or the beginning cut off, zeros, another encoding."""
    raw = bytearray(text.encode())
    way = rng.randrange(6)
    if way == 0:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif way == 1:
        raw.insert(rng.randrange(len(raw)), rng.randrange(256))
    elif way == 2:
        first = rng.randrange(len(raw))
        del raw[first : first + rng.choice([1, 2, 100])]
    elif way == 3:
        del raw[rng.randrange(len(raw)) :]
    elif way == 4:
        first = rng.randrange(len(raw))
        raw[first : first + 20] = bytes(20)
    else:
        return rng.choice([text.encode("utf-16"), text.encode("utf-32"), text.encode("utf-8-sig"), raw[::-1], raw * 2])
    return bytes(raw)


@pytest.mark.parametrize("part", range(5))
def test_ten_thousand_damaged_files(plans: list[Plan], tmp_path: Path, part: int) -> None:
    rng = random.Random(part)  # noqa: S311 - the same files in every run
    file, outcomes = tmp_path / "plan.json", Counter()
    texts = []
    for plan in plans:
        save_plan(plan, file)
        texts.append(file.read_text())
    names = {key for _, key in places(json.loads(texts[0])) if isinstance(key, str)}
    for _ in range(MUTATIONS // 5):
        change = rng.choice([swap_token, swap_token, change_keys, damage_bytes])
        file.write_bytes(change(rng, rng.choice(texts)))
        try:
            plan = load_plan(file)
        except PlanFileError as error:
            outcomes["refused"] += 1
            message = str(error)
            assert message.startswith(f"{file}")
            told = message.removeprefix(str(file))
            assert any(name in told for name in (*names, "not valid JSON", "can't be read", "schema version", "a key"))
            assert len(message) < 2000
            message.encode()  # can be printed
        else:
            outcomes["a plan"] += 1
            assert_sound(plan, tmp_path / "again.json")
    assert outcomes["refused"] > 1000
    assert outcomes["a plan"] > 50


def assert_sound(plan: Plan, file: Path) -> None:
    """What was accepted can be used: written, read, shown and computed with."""
    save_plan(plan, file)
    assert load_plan(file) == plan
    assert plan.tokens_per_second >= 0
    assert plan.makespan_seconds >= plan.bottleneck_seconds >= plan.lower_bound_seconds
    assert plan.memory_share >= 0
    assert plan.dram_bytes_per_token >= 0
    assert as_text(stage_table(plan))
