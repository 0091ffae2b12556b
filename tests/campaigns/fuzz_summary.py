"""What a campaign of damaged files came to: JSON and a page."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuzz_isolation import LIMIT_BYTES, LIMIT_SECONDS, Ended

__all__ = ["Result", "page", "summarized"]

_OUTCOMES = ("valid", "refused", "defect")
_PACKAGES = ("lp-plugin", "numpy", "pydantic", "safetensors", "tokenizers", "torch", "transformers", "deepspeed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case, without its file."""

    number: int
    """Of the case."""
    kind: str
    """Of the file."""
    by_command: bool
    """Whether the command line read it."""
    ended: Ended
    """How."""


def summarized(results: Sequence[Result], command: str, seed: int) -> dict[str, Any]:
    """Counts by kind of file, the slowest and the largest case of each, and what it was run with."""
    rows = {}
    for kind in sorted({each.kind for each in results}):
        own = [each for each in results if each.kind == kind]
        slowest = max(own, key=lambda each: each.ended.seconds)
        largest = max(own, key=lambda each: each.ended.peak_bytes)
        rows[kind] = {
            "cases": len(own),
            "by_command": sum(each.by_command for each in own),
            **{outcome: sum(each.ended.outcome == outcome for each in own) for outcome in _OUTCOMES},
            "slowest": {"case": slowest.number, "seconds": round(slowest.ended.seconds, 3)},
            "largest": {"case": largest.number, "bytes": largest.ended.peak_bytes},
        }
    said = {re.sub(r"\d+|'[^']*'", "", each.ended.text) for each in results if each.ended.outcome == "refused"}
    return {
        "command": command,
        "seed": seed,
        "cases": len(results),
        "outcomes": dict(Counter(each.ended.outcome for each in results)),
        "different_messages": len(said),
        "limit_seconds": LIMIT_SECONDS,
        "limit_bytes": LIMIT_BYTES,
        "kinds": rows,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


_ABOVE = """\
# Damaged files

{cases:,} files, changed in bytes, values, keys, nesting, names of other files and headers, or with a folder, a pipe, a
device, a circular link or a file of 64 GiB in their place, through the functions that read them and through the command
line, up to where ranks would start.

- `valid`: read, with a result;
- `refused`: one message, on the command line with exit code 2;
- `defect`: anything else, more than a second, more than 200 MB beyond the process before, a message of more than 2,000
  characters, or characters that act on a terminal.

```
{command}
```

| file | cases | by command line | valid | refused | defect | slowest | most memory |
|---|--:|--:|--:|--:|--:|--:|--:|
"""


def page(summary: dict[str, Any]) -> str:
    """The README beside the JSON."""
    lines = []
    for name, row in summary["kinds"].items():
        figures = " | ".join(f"{row[key]:,}" for key in ("cases", "by_command", *_OUTCOMES))
        slow, large = row["slowest"]["seconds"], row["largest"]["bytes"] / 1e6
        lines.append(f"| {name} | {figures} | {slow:.2f} s | {large:.0f} MB |")
    total = " | ".join(
        f"{sum(row[key] for row in summary['kinds'].values()):,}" for key in ("cases", "by_command", *_OUTCOMES)
    )
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines += [
        f"| all | {total} | | |",
        "",
        f"Different messages, numbers and quoted values aside: {summary['different_messages']:,}. A case that took",
        "more than a second was repeated alone twice, and the shortest time counts; waiting for a processor that",
        "others had is not counted. A case's file is made of the seed and its number alone.",
        "",
        textwrap.fill(f"With {versions}.", 120),
    ]
    return _ABOVE.format(**summary) + "\n".join(lines) + "\n"
