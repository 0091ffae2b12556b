"""What a soak leaves: every rank's memory as JSON, as a picture, and a page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lp_plugin.files import write_atomically
from lp_plugin.job.watch.verdict import own_versions

__all__ = ["write_page"]


def write_page(folder: Path, results: list[dict[str, Any]], *, ranks: int, command: list[str]) -> None:
    """Writes ``results.json``, ``memory.png`` and ``README.md``.

    Args:
        folder: Where to; made if it is not there.
        results: Of `soak.soak`.
        ranks: Of each job.
        command: That was given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": " ".join(["python", *command]),
        "ranks": ranks,
        "versions": own_versions(),
        "jobs": results,
    }
    write_atomically(folder / "results.json", json.dumps(content) + "\n")
    (folder / "memory.png").write_bytes(_picture(results))
    write_atomically(folder / "README.md", _page(content))


def _picture(results: list[dict[str, Any]]) -> bytes:
    """Memory over micro-batches, a line per rank, above what it held early on."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for job in results:
        for rank in job.get("ranks", []):
            counts = [count / 1e3 for count, _ in rank["samples"]]
            above = [(held - rank["early_bytes"]) / 1e6 for _, held in rank["samples"]]
            axes.plot(counts, above, label=f"{job['job']}, rank {rank['rank']}", linewidth=1)
    axes.set(xlabel="thousand micro-batches", ylabel="MB above the median at 20-40%")
    axes.set_title("Memory of ranks over long jobs, Gloo")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120)
    return target.getvalue()


def _page(content: dict[str, Any]) -> str:
    lines = [
        f"# Long jobs, {content['ranks']} ranks, Gloo",
        "",
        f"`{content['command']}`, CPU. Anonymous and shared memory of each rank's process,",
        "medians of samples taken twice a second, at 20-40% (early) and at 80-100% (late) of the micro-batches.",
        "",
        "| job | rank | micro-batches | early | late | growth per micro-batch | files | threads | results | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job in content["jobs"]:
        for rank in job.get("ranks", []):
            files, threads = (_change(rank[key]) for key in ("open_files", "threads"))
            lines.append(
                f"| {job['job']} | {rank['rank']} | {rank['micro_batches']:,} | {rank['early_bytes'] / 1e6:.1f} MB "
                f"| {rank['late_bytes'] / 1e6:.1f} MB | {rank['growth_bytes_per_micro_batch']:.1f} bytes | {files} "
                f"| {threads} | {job['results']:,} | {job['seconds']:.0f} s |"
            )
    problems = [f"- {job['job']}: {problem}" for job in content["jobs"] for problem in job["problems"]]
    lines += ["", "Problems:", "", *problems] if problems else ["", "No problems: complete, and flat."]
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    return "\n".join([*lines, "", "![Memory over micro-batches](memory.png)", "", f"Versions: {versions}.", ""])


def _change(pair: list[float]) -> str:
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g}, {pair[1]:g}"
