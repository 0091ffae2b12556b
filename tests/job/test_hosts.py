"""One job on two hosts: under each launcher, and when a host's rank, model or cable is not as it should be."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns.fault_training import rows
from hosts import Host, find_process, run_on, two_hosts, wait_for_lines
from plain_training import plain_losses
from ports import free_port

from lp_plugin.job.watch.watch import EXIT_LOST_PEER

BIN = Path(sys.executable).parent
DOCUMENTS = 1500
KILLED_AFTER = 200
"""Documents that are finished before a rank is killed."""
STEPS, ACCUMULATION = 24, 2
"""Of training."""
Hosts = tuple[Host, Host]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two of them."""
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 1 to 40 characters."""
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    records = ({"id": at, "text": ("abcdefghij" * 4)[: 1 + at % 40]} for at in range(DOCUMENTS))
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def scores(
    tiny: Path, documents: Path, command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    """Of one process."""
    output = tmp_path_factory.mktemp("one") / "scores.jsonl"
    ended = command("run", tiny, "--input", documents, "--output", output, "--stages", 1)
    assert ended.returncode == 0, ended.stderr
    return read(output)


def read(file: Path) -> list[Any]:
    """Its records."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def torchrun(hosts: Hosts, *arguments: object, restarts: int = 0) -> Any:
    """The command for each host."""
    meeting = f"{hosts[0].name}:{free_port()}"

    def command(number: int) -> list[object]:
        one_machine = ("--local-addr", hosts[number].address, "--rdzv-conf", f"is_host={number == 0}")
        return [
            *(BIN / "torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", restarts),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, *(() if hosts[number].is_real else one_machine)),
            *("--no-python", BIN / "lp-plugin", *arguments),
        ]

    return command


def check(output: Path, expected: list[Any]) -> None:
    """Every document once, in order, with the score of one process."""
    found = read(output)
    assert [(each["id"], each["num_tokens"]) for each in found] == [(e["id"], e["num_tokens"]) for e in expected]
    likelihoods = [each["log_likelihood"] for each in expected]
    assert [each["log_likelihood"] for each in found] == pytest.approx(likelihoods, rel=1e-5)


def run_arguments(tiny: Path, documents: Path, output: Path) -> tuple[object, ...]:
    """Of a scoring job with two stages."""
    return ("run", tiny, "--input", documents, "--output", output, "--stages", 2, "--micro-batch", 2, "--timeout", 3)


def test_torchrun(
    hosts: Hosts, tiny: Path, documents: Path, scores: list[Any], environment: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "scores.jsonl"
    ended = run_on(hosts, torchrun(hosts, *run_arguments(tiny, documents, output)), environment)
    assert [code for code, _ in ended] == [0, 0], "".join(said for _, said in ended)
    check(output, scores)


def test_deepspeed_with_a_hostfile(
    hosts: Hosts, tiny: Path, documents: Path, scores: list[Any], environment: dict[str, str], tmp_path: Path
) -> None:
    """As its own launcher starts it on each host through ssh."""
    output, hostfile, port = tmp_path / "scores.jsonl", tmp_path / "hosts", free_port()
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))

    def deepspeed(number: int) -> list[object]:
        meeting = ("--no_ssh", "--node_rank", number, "--master_addr", hosts[0].address, "--master_port", port)
        launcher = (BIN / "deepspeed", "--hostfile", hostfile, *meeting, "--no_python", "--no_local_rank")
        return [*launcher, BIN / "lp-plugin", *run_arguments(tiny, documents, output)]

    ended = run_on(hosts, deepspeed, environment)
    assert [code for code, _ in ended] == [0, 0], "".join(said for _, said in ended)
    check(output, scores)


def kill_first_rank(output: Path) -> None:
    """Of a scoring job when some documents are finished."""
    process = find_process("RANK=0", output)
    wait_for_lines(output.with_name(f"{output.name}.partial"), KILLED_AFTER + 1)
    os.kill(process, signal.SIGKILL)


def test_a_job_whose_rank_is_killed_goes_on_after_a_restart(
    hosts: Hosts, tiny: Path, documents: Path, scores: list[Any], environment: dict[str, str], tmp_path: Path
) -> None:
    output, report = tmp_path / "scores.jsonl", tmp_path / "report.json"
    arguments = (*run_arguments(tiny, documents, output), "--report", report)
    ended = run_on(
        hosts,
        torchrun(hosts, *arguments, restarts=1),
        environment,
        meanwhile=lambda: kill_first_rank(output),
    )
    assert [code for code, _ in ended] == [0, 0], "".join(said for _, said in ended)
    check(output, scores)
    scored = json.loads(report.read_text(encoding="utf-8"))["num_scored"]
    assert 0 < scored <= DOCUMENTS - KILLED_AFTER  # by the second start
    named = r"rank 1 stops: rank 0 on \S+ \(stage 0\b.*\) died\."
    assert re.search(named, ended[0][1] + ended[1][1]), ended


def test_training_goes_on_after_a_restart(
    hosts: Hosts, tiny: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """From its newest checkpoint, to the same losses."""
    config = tmp_path / "ds.json"
    content = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "steps_per_print": 10**6,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},
        "checkpoint": {"load_universal": True},
        "lp_plugin": {"method": "cache-aware", "timeout": 3},
    }
    config.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).parents[1] / "campaigns" / "fault_training.py"

    arguments = ("launch", script, tiny, tmp_path, "--steps", STEPS, "--deepspeed_config", config)
    losses = tmp_path / "losses.jsonl"

    def kill() -> None:
        process = find_process("RANK=1", tmp_path)
        wait_for_lines(losses, 5)
        os.kill(process, signal.SIGKILL)

    ended = run_on(hosts, torchrun(hosts, *arguments, restarts=1), environment, meanwhile=kill)
    said = "".join(each for _, each in ended)
    assert [code for code, _ in ended] == [0, 0], said
    assert re.search(r"rank 0 stops: rank 1 on \S+ \(stage 1\b.*\) died\.", said), said
    assert [each["id"] for each in read(losses)] == list(range(STEPS))
    data = (tokens for step in range(STEPS) for tokens, _ in itertools.islice(rows(step), ACCUMULATION))
    expected = plain_losses(tiny, data, steps=STEPS, accumulation=ACCUMULATION)
    assert [each["loss"] for each in read(losses)] == pytest.approx(expected, abs=5e-6)


def test_each_host_says_why_when_the_cable_is_cut(
    hosts: Hosts, tiny: Path, documents: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Nothing tells one host of the other's end: silence alone. No launcher, since torchrun's agents wait on."""
    if not hosts[1].is_real:
        pytest.skip("needs network namespaces, which this user may not make")
    output, port = tmp_path / "scores.jsonl", free_port()
    journal = output.with_name(f"{output.name}.partial")

    def alone(number: int) -> list[object]:
        launcher = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        variables = [f"{name}={value}" for name, value in (launcher | {"MASTER_ADDR": hosts[0].address}).items()]
        return ["env", *variables, BIN / "lp-plugin", *run_arguments(tiny, documents, output)]

    def cut() -> None:
        wait_for_lines(journal, KILLED_AFTER + 1)
        hosts[1].do("ip", "link", "set", "eth0", "down")

    try:
        ended = run_on(hosts, alone, environment, meanwhile=cut, seconds=40)
    finally:
        hosts[1].do("ip", "link", "set", "eth0", "up")
    for rank, (code, said) in enumerate(ended):
        assert code == EXIT_LOST_PEER
        other = rf"rank {rank} stops: rank {1 - rank} on node{1 - rank} \(.*\) hung: no sign of life for 3 s\."
        assert re.search(other, said), said
    assert len(read(journal)) > KILLED_AFTER


def test_a_host_with_another_model_is_named(
    hosts: Hosts,
    tiny: Path,
    make_model: Callable[..., Path],
    documents: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    if not hosts[1].is_real:
        pytest.skip("needs mount namespaces, which this user may not make")
    model, other = tmp_path / "model", make_model(initializer_range=0.5)
    shutil.copytree(tiny, model)
    hosts[1].do("mount", "--bind", other, model)
    try:
        output = tmp_path / "scores.jsonl"
        ended = run_on(hosts, torchrun(hosts, *run_arguments(model, documents, output)), environment)
    finally:
        hosts[1].do("umount", model)
    assert all(code != 0 for code, _ in ended)
    found = r"rank 1 on node1 has another model \(\S+\) than rank 0 on node0 \(\S+\); give all hosts the same plan"
    for _, each in ended:
        assert re.search(found, each), each
    assert not output.exists()
