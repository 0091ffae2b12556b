"""The typer application that the commands join, and where they print."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lp_plugin._version import __version__
from lp_plugin.errors import MissingDependencyError
from lp_plugin.report import console

__all__ = ["EXPERIMENT", "app", "bench", "console", "require"]

EXPERIMENT = "FILE.toml"
"""What help calls the command that takes a file in place of its own name."""


class Benchmarks(TyperGroup):
    """Subcommands, and a command for everything else: that of an experiment's file."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The experiment's command for the name of a file, or for options that come before it."""
        first = args[0]
        is_file = Path(first).suffix == ".toml" or (first not in self.commands and Path(first).exists())
        if is_file or first.startswith("-"):
            return "", self.commands[EXPERIMENT], args
        return super().resolve_command(ctx, args)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decides which layers of a transformer go on which device, and runs the result.",
)
bench = typer.Typer(
    cls=Benchmarks,
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},  # options of an experiment may come before its file
    help="Benchmarks, each side by side in one run. 'lp-plugin bench FILE.toml' runs the experiment of a file.",
)
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
