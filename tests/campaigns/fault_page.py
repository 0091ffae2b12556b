"""What a campaign of faults leaves: every case as JSON, and a page with times."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from lp_plugin.files import write_atomically
from lp_plugin.job.watch.verdict import own_versions

__all__ = ["write_page"]


def write_page(folder: Path, results: list[dict[str, Any]], *, ranks: int, timeout: float, command: list[str]) -> None:
    """Writes ``results.json`` and ``README.md``.

    Args:
        folder: Where to; made if it is not there.
        results: Of `faults.run_case`.
        ranks: Of each job.
        timeout: Of each job, seconds.
        command: That was given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": " ".join(["python", *command]),
        "ranks": ranks,
        "timeout_seconds": timeout,
        "devices": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": own_versions(),
        "cases": results,
    }
    write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write_atomically(folder / "README.md", _page(content))


def _page(content: dict[str, Any]) -> str:
    cases = content["cases"]
    failed = [case for case in cases if case["problems"]]
    backend = "NCCL" if content["devices"] != "CPU" else "Gloo"
    lines = [
        f"# {len(cases)} faults, {content['ranks']} ranks, {backend}",
        "",
        f"`{content['command']}`, {content['devices']}; `--timeout {content['timeout_seconds']:g}`; no launcher looks",
        "after the ranks. Seconds from the fault until the other ranks said who was at fault, and where.",
        "",
        f"**{len(cases)} injections, {len(failed)} with problems** (a rank that hung, said nothing or ended with 0; a",
        "result lost, doubled or changed after the second start; a process, file, shared memory or port left).",
        "",
        "| job | fault | places | injections | median | longest | problems |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[case["job"], case["fault"]].append(case)
    for (job, fault), group in groups.items():
        seconds = [case["seconds"] for case in group if case["seconds"] is not None]
        median, longest = (f"{statistics.median(seconds):.2f} s", f"{max(seconds):.2f} s") if seconds else ("", "")
        places = ", ".join(dict.fromkeys(case["place"] for case in group))
        problems = sum(bool(case["problems"]) for case in group)
        lines.append(f"| {job} | {fault} | {places} | {len(group)} | {median} | {longest} | {problems} |")
    examples = {case["said"][0] for case in cases if case["said"] and case["fault"] in {"SIGKILL", "SIGSTOP"}}
    lines += ["", "What survivors say, for example:", "", "```", *sorted(examples)[:4], "```", ""]
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    return "\n".join([*lines, f"Versions: {versions}.", ""])
