"""An experiment's folder: results, and the report that is made of them, as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lp_plugin.bench.experiment.report import chosen_tables, print_tables, write_report
from lp_plugin.bench.experiment.results import Results, load_results, save_results
from lp_plugin.errors import InvalidInputError
from lp_plugin.files import check_folder, check_target

__all__ = ["RESULTS", "keep", "made_folder", "report", "report_again"]

RESULTS = "results.json"
"""Name of the file with everything that was measured."""


def report_again(console: Console, folder: Path, *, tables: Sequence[str]) -> None:
    """Makes the report from the results in a folder, which were measured before.

    Raises:
        InvalidInputError: If they can't be read or make no sense, a table's name is wrong, or the folder can't be
            written.
    """
    chosen = chosen_tables(tables)
    results = load_results(folder / RESULTS)
    try:
        report(console, results, folder, chosen)
    except InvalidInputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"no report can be made of {folder / RESULTS}: its figures do not go together "
            f"({type(error).__name__}: {error}); has it been edited? Measure again."
        ) from error


def report(console: Console, results: Results, folder: Path, tables: Sequence[str]) -> None:
    """Shows the tables, and writes the report into the folder.

    Raises:
        InvalidInputError: If a file can't be written.
    """
    print_tables(console, results, tables)
    written = write_report(results, folder, tables)
    console.print(f"written: {', '.join(map(str, (folder / RESULTS, *written)))}", highlight=False, markup=False)


def made_folder(folder: Path) -> Path:
    """The folder, made if it is missing; files can be written into it.

    Raises:
        InvalidInputError: If it can't be made, or not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_target(folder / RESULTS)
        check_folder(folder)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"folder {folder} can't be written: {error}.") from error
    return folder


def keep(results: Results, folder: Path) -> None:
    """Writes the results into their folder, whole or not at all.

    Raises:
        InvalidInputError: If that can't be done, as when the disk is full.
    """
    try:
        save_results(results, folder / RESULTS)
    except OSError as error:
        raise InvalidInputError(f"the results can't be written to {folder / RESULTS}: {error}.") from error
