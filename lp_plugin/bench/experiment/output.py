"""An experiment's folder: results, and the report that is made of them, as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lp_plugin.bench.experiment.report import TABLES, print_tables, write_report
from lp_plugin.bench.experiment.results import Results, load_results
from lp_plugin.errors import InvalidInputError

__all__ = ["RESULTS", "chosen_tables", "made_folder", "report", "report_again"]

RESULTS = "results.json"
"""Name of the file with everything that was measured."""


def report_again(console: Console, folder: Path, *, tables: Sequence[str]) -> None:
    """Makes the report from the results in a folder, which were measured before.

    Raises:
        InvalidInputError: If they can't be read, a table's name is wrong, or the folder can't be written.
    """
    report(console, load_results(folder / RESULTS), folder, chosen_tables(tables))


def report(console: Console, results: Results, folder: Path, tables: Sequence[str]) -> None:
    """Shows the tables, and writes the report into the folder.

    Raises:
        InvalidInputError: If a file can't be written.
    """
    print_tables(console, results, tables)
    written = write_report(results, folder, tables)
    console.print(f"written: {', '.join(map(str, (folder / RESULTS, *written)))}", highlight=False, markup=False)


def chosen_tables(tables: Sequence[str]) -> tuple[str, ...]:
    """The tables that were asked for, all if none were, in the order of the report.

    Raises:
        InvalidInputError: If a name is unknown.
    """
    for name in tables:
        if name not in TABLES:
            raise InvalidInputError(f"--table {name!r} is unknown; give of: {', '.join(TABLES)}.")
    return tuple(name for name in TABLES if name in tables or not tables)


def made_folder(folder: Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        InvalidInputError: If it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"folder {folder} can't be made: {error}.") from error
    return folder
