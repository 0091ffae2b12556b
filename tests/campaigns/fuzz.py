"""Damaged files of every kind through the functions that read them and the command line: an answer or a clear error.

    python tests/campaigns/fuzz.py --count 10000 --seed 0 --output docs/results/fuzz
    python tests/campaigns/fuzz.py --replay docs/results/fuzz/failures/0-1234.json

Each case is a sound file, changed; it ends as ``valid``, ``refused`` (a `LpPluginError`; on the command line exit code
2 and one message) or ``defect``: anything else, more than a second, or more than 200 MB. No ranks are started.
"""

from __future__ import annotations

import argparse
import base64
import functools
import itertools
import json
import os
import random
import sys
import tempfile
import traceback
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fuzz_paths  # noqa: F401 - first
import torch
from fuzz_inputs import all_kinds
from fuzz_isolation import LIMIT_BYTES, LIMIT_SECONDS, Ended, captured, run_each
from fuzz_kind import Kind
from fuzz_mutations import mutate
from fuzz_summary import Result, page, summarized
from fuzz_workspace import TRICKS, lay

from lp_plugin import cli
from lp_plugin.bench.experiment import command
from lp_plugin.errors import InfeasibleError, LpPluginError
from lp_plugin.job import launch

__all__ = ["Case", "all_kinds", "main", "make_case", "run_cases"]

_BATCH = 20
"""Cases of one process."""
_MOST_CHARACTERS = 2000
"""Of a message, of those without a table."""
_TRICKED = 0.06
"""Share of the cases in which something else lies in the place of the file."""
_COMMANDED = 0.4
"""Share of the cases that go through the command line, of kinds that it reads."""
_REPEATS = 2
"""Of a case that took too long, alone: the machine may have been busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One file and what reads it."""

    number: int
    """Of the campaign."""
    kind: str
    """Of the file."""
    way: int
    """0: the function; else that command of the kind."""
    trick: str
    """What lies in the place of the file; empty: ``raw``."""
    raw: bytes
    """Contents."""


def make_case(kinds: Sequence[Kind], number: int, seed: int) -> Case:
    """The same for the same number, seed, kinds and sound files."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311 - to be repeated
    kind = rng.choices(kinds, [each.weight for each in kinds])[0]
    trick = rng.choice(TRICKS) if rng.random() < _TRICKED else ""
    raw = b"" if trick else mutate(rng.choice(kind.seeds), kind.form, rng)
    way = rng.randint(1, len(kind.commands)) if kind.commands and rng.random() < _COMMANDED else 0
    return Case(number=number, kind=kind.name, way=way, trick=trick, raw=raw)


def run_cases(kinds: Sequence[Kind], cases: Iterable[Case]) -> Iterator[tuple[Case, Ended]]:
    """How each case ends; those that take too long are repeated alone, and the shortest time counts."""
    by_name = {kind.name: kind for kind in kinds}
    left = iter(cases)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        while some := list(itertools.islice(left, _BATCH)):
            tasks = [functools.partial(_run, by_name[case.kind], case, Path(scratch)) for case in some]
            for case, task, first in zip(some, tasks, run_each(tasks), strict=True):
                slow = first.outcome != "died" and first.seconds > LIMIT_SECONDS
                again = [run_each([task])[0] for _ in range(_REPEATS if slow else 0)]
                yield case, _judged(min([first, *again], key=lambda each: each.seconds))


def _judged(ended: Ended) -> Ended:
    fields = asdict(ended)
    if ended.outcome in {"killed", "died"}:
        return Ended(**fields | {"outcome": "defect", "text": f"{ended.outcome}, {ended.text}"})
    if ended.seconds > LIMIT_SECONDS:
        return Ended(
            **fields | {"outcome": "defect", "text": f"took {ended.seconds:.2f} s; {ended.outcome}: {ended.text}"}
        )
    if ended.peak_bytes > LIMIT_BYTES:
        size = f"{ended.peak_bytes / 1e6:.0f} MB"
        return Ended(**fields | {"outcome": "defect", "text": f"took {size}; {ended.outcome}: {ended.text}"})
    return ended


def _started(*arguments: object, **options: object) -> None:
    """In place of what starts ranks: everything before went well."""
    del arguments, options
    raise SystemExit(0)


def _run(kind: Kind, case: Case, scratch: Path) -> tuple[str, str]:
    """In a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = lay(Path(name) / "case", kind.file, case.raw, trick=case.trick, model=kind.model)
        for other, raw in kind.beside:
            (folder / other).write_bytes(raw)
        os.chdir(folder)
        with captured(Path(name)) as (stdout, stderr):
            code, error = _called(kind, case.way, Path(kind.file))
        printed = stdout.read_bytes().decode("utf-8", "replace"), stderr.read_bytes().decode("utf-8", "replace")
        return _function_outcome(code, error) if not case.way else _command_outcome(code, *printed)


def _called(kind: Kind, way: int, file: Path) -> tuple[int, BaseException | None]:
    """Exit code and what was raised."""
    warnings.simplefilter("error", RuntimeWarning)
    launch.launch_local = command.run_experiment = _started
    os.environ["RANK"] = "0"
    if kind.name != "DeepSpeed configuration":
        del os.environ["RANK"]
    try:
        if not way:
            kind.api(file)
            return 0, None
        sys.argv = ["lp-plugin", *kind.commands[way - 1]]
        cli.main()
    except LpPluginError as error:
        return 2, error
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None), None
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a defect
        traceback.print_exc()
        return 1, error
    return 0, None


def _function_outcome(code: int, error: BaseException | None) -> tuple[str, str]:
    if not code:
        return "valid", ""
    if not isinstance(error, LpPluginError):
        return "defect", "".join(traceback.format_exception(error)[-6:])
    problem = _bad_message(str(error), isinstance(error, InfeasibleError))
    return ("defect", f"{problem}: {str(error)[:1000]!r}") if problem else ("refused", str(error))


def _command_outcome(code: int, stdout: str, stderr: str) -> tuple[str, str]:
    if not code:
        problem = _unprintable(stdout + stderr)
        return ("defect", f"{problem}: {stdout[:1000]!r}") if problem else ("valid", "")
    _, found, message = stderr.rpartition("error: ")
    if code != 2 or not found or "Traceback" in stderr:
        return "defect", f"exit code {code}: {stderr[-3000:]}"
    problem = _bad_message(message, "no partition fits" in message or "no strategy" in message)
    return ("defect", f"{problem}: {message[:1000]!r}") if problem else ("refused", message)


def _bad_message(message: str, has_table: bool) -> str:
    if not 10 <= len(message) <= _MOST_CHARACTERS * (10 if has_table else 1):
        return f"message of {len(message)} characters"
    return _unprintable(message)


def _unprintable(text: str) -> str:
    """Characters that would act on a terminal."""
    found = {each for each in text if each not in "\n\t" and unicodedata.category(each) in {"Cc", "Cs"}}
    return f"control characters {sorted(found)}" if found else ""


def _keep(folder: Path, seed: int, case: Case, ended: Ended) -> None:
    """What `--replay` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    content = asdict(case) | {"raw": base64.b64encode(case.raw).decode(), "said": ended.text, "seed": seed}
    (folder / f"{seed}-{case.number}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _kept(file: Path) -> Case:
    """A case that `_keep` has written."""
    content = json.loads(file.read_text(encoding="utf-8"))
    fields = {name: content[name] for name in ("number", "kind", "way", "trick")}
    return Case(**fields, raw=base64.b64decode(content["raw"]))


def main() -> int:
    """Runs the campaign, or cases that it has kept; 1 if there are defects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for results.json, README.md and failures")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="cases kept in OUTPUT/failures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        kinds = all_kinds(Path(folder))
        made = (make_case(kinds, number, options.seed) for number in range(options.count))
        for case, ended in run_cases(kinds, map(_kept, options.replay) if options.replay else made):
            results.append(Result(number=case.number, kind=case.kind, by_command=bool(case.way), ended=ended))
            if ended.outcome == "defect" or options.replay:
                what = f"seed {options.seed}, case {case.number}: {case.kind}, way {case.way} {case.trick}"
                size = f"{ended.seconds:.2f} s, {ended.peak_bytes / 1e6:.0f} MB"
                print(f"{ended.outcome}: {what}: {size}\n  {ended.text}", flush=True)
            if ended.outcome == "defect" and options.output and not options.replay:
                _keep(options.output / "failures", options.seed, case, ended)
    arguments = f"--count {options.count} --seed {options.seed} --output {options.output}"
    summary = summarized(results, f"python tests/campaigns/fuzz.py {arguments}", options.seed)
    print(json.dumps(summary["outcomes"]))
    if options.output and not options.replay:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (options.output / "README.md").write_text(page(summary), encoding="utf-8")
    return int("defect" in summary["outcomes"])


if __name__ == "__main__":
    sys.exit(main())
