"""The typer application that the commands join, and where they print."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from lp_plugin._version import __version__
from lp_plugin.report import WIDTH

__all__ = ["app", "bench", "console"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decides which layers of a transformer go on which device, and runs the result.",
)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks, each side by side in one run.")
app.add_typer(bench, name="bench")


def console() -> Console:
    """The terminal, or a wide enough page where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lp_plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version
