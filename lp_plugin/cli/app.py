"""The typer application that the commands join, and where they print."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from lp_plugin._version import __version__
from lp_plugin.errors import MissingDependencyError
from lp_plugin.report import console

__all__ = ["app", "bench", "console", "require"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decides which layers of a transformer go on which device, and runs the result.",
)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks, each side by side in one run.")
app.add_typer(bench, name="bench")


def require(extra: str, *modules: str) -> None:
    """Refuses a command that needs what is not installed.

    Args:
        extra: The extra that installs it.
        modules: What the command imports.

    Raises:
        MissingDependencyError: If one of them is not there; names the extra.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed; install it with: pip install 'lp-plugin[{extra}]'")


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
