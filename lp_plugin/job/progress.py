"""What a person sees while a job runs."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lp_plugin.plan import Plan
from lp_plugin.report import WIDTH, stage_table, summary

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; a line now and then in a log. Goes to the standard error output.

    Args:
        noun: What is counted, such as documents.
        num_all: All of them.
        num_done: Those that an earlier start of the job has finished.
        bar: Whether a terminal gets a bar; without, it gets the lines of a log.
    """

    def __init__(self, noun: str, num_all: int, num_done: int, *, bar: bool = True) -> None:
        self._console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
        self._noun, self._done, self._all = noun, num_done, num_all
        self._tokens, self._start = 0, time.monotonic()
        self._last_line = self._start
        self._has_bar = bar and self._console.is_terminal
        if num_done:
            self._console.print(f"resuming: {num_done} of {num_all} {noun} are finished already")
        columns = (noun, BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, TextColumn("{task.fields[rate]}"), console=self._console)
        self._task = self._bar.add_task(noun, total=num_all, completed=num_done, rate="")

    def show_plan(self, plan: Plan) -> None:
        """Prints the plan, then starts the bar."""
        self._console.print(stage_table(plan), summary(plan))
        self._start = time.monotonic()
        if self._has_bar:
            self._bar.start()

    def advance(self, finished: int, tokens: int) -> None:
        """Counts what has been finished, and tokens that have been computed since the last call."""
        self._done += finished
        self._tokens += tokens
        now = time.monotonic()
        rate = f"{self._tokens / (now - self._start):,.0f} tokens/s"
        self._bar.update(self._task, completed=self._done, rate=rate)
        ended = finished > 0 and self._done == self._all
        if not self._has_bar and (now - self._last_line > _SECONDS_BETWEEN_LINES or ended):
            self._last_line = now
            self._console.print(f"{self._done} of {self._all} {self._noun}, {rate}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._bar.stop()
