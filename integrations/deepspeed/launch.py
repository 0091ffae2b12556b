"""``lp-plugin launch``: a user's unchanged script under the ``"lp_plugin"`` section of its own configuration."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lp_plugin.errors import DeepSpeedConfigError, InvalidInputError, RuntimeEnvironmentError
from lp_plugin.integrations.deepspeed import configure
from lp_plugin.job.memory import explained
from lp_plugin.job.watch.watch import announce, leave, report, watch

__all__ = ["config_argument", "launch_script"]

_FLAGS = ("--deepspeed_config", "--deepspeed-config")


def config_argument(arguments: Sequence[str]) -> str:
    """The path that follows ``--deepspeed_config`` in a script's arguments.

    Raises:
        DeepSpeedConfigError: If there is none.
    """
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in _FLAGS:
            if equals:
                return value
            if position + 1 < len(arguments):
                return arguments[position + 1]
    raise DeepSpeedConfigError(
        'the script\'s arguments have no --deepspeed_config FILE; its "lp_plugin" section says what to do.'
    )


def launch_script(script: str | Path, arguments: Sequence[str]) -> None:
    """Runs a script as ``__main__`` with the partition method of its DeepSpeed configuration.

    Args:
        script: Path of the script.
        arguments: The script's own arguments, with ``--deepspeed_config FILE`` among them.

    Raises:
        InvalidInputError: If the script does not exist.
        DeepSpeedConfigError: If the section is missing or wrong.
        RuntimeEnvironmentError: If no launcher started this process.
    """
    if not Path(script).is_file():
        raise InvalidInputError(f"{script} does not exist; give the path of the script to run.")
    settings = configure(config_argument(arguments))
    if settings.method is None:
        raise DeepSpeedConfigError(
            'the configuration has no "lp_plugin" section with a "method" or a "plan"; add, for example, '
            '"lp_plugin": {"method": "cache-aware"}, or start the script without lp-plugin launch.'
        )
    if "RANK" not in os.environ:
        raise RuntimeEnvironmentError(
            "no launcher started this process; use, for example, torchrun --nproc-per-node 4 --no-python "
            f"lp-plugin launch {script} ..., or deepspeed --no_python --no_local_rank lp-plugin launch {script} ..."
        )
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    watch(settings.section.timeout)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            report("failed", f"the script ended with {ended.code!r}.")
        raise
    except EOFError as error:  # say what it was: typer would take it for a closed terminal and print "Aborted."
        announce(error)
        traceback.print_exc()
        raise SystemExit(1) from None
    except BaseException as error:
        exhausted = explained(error)
        if exhausted is not None:
            report("failed", str(exhausted))
            raise exhausted from None
        announce(error)
        raise
    leave()
