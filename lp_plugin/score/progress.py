"""What a person sees while a scoring job runs."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lp_plugin.job.documents import TokenizedDocuments
from lp_plugin.plan import Plan
from lp_plugin.report import WIDTH, stage_table, summary
from lp_plugin.score.batches import Step

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; a line now and then in a log. Goes to the standard error output."""

    def __init__(self, num_documents: int, num_done: int) -> None:
        self._console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else WIDTH)
        self._done, self._all = num_done, num_documents
        self._tokens, self._start = 0, time.monotonic()
        self._last_line = self._start
        if num_done:
            self._console.print(f"resuming: {num_done} of {num_documents} documents are scored already")
        columns = ("documents", BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, TextColumn("{task.fields[rate]}"), console=self._console)
        self._task = self._bar.add_task("documents", total=num_documents, completed=num_done, rate="")

    def show_plan(self, plan: Plan) -> None:
        """Prints the plan, then starts the bar."""
        self._console.print(stage_table(plan), summary(plan))
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()

    def advance(self, step: Step, documents: TokenizedDocuments) -> None:
        """Counts a finished step."""
        self._done += len(step.documents)
        self._tokens += sum(len(documents[index]) for index in step.documents)
        now = time.monotonic()
        rate = f"{self._tokens / (now - self._start):,.0f} tokens/s"
        self._bar.update(self._task, completed=self._done, rate=rate)
        if not self._console.is_terminal and (
            now - self._last_line > _SECONDS_BETWEEN_LINES or self._done == self._all
        ):
            self._last_line = now
            self._console.print(f"{self._done} of {self._all} documents, {rate}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._bar.stop()
