"""Where a case's processes are: lines for the user, a note for the parent, and an end for those that stall."""

from __future__ import annotations

import faulthandler
import time

from deepspeed import comm as dist

from lp_plugin.bench.experiment.job import STALLED_SECONDS, CaseJob, Doing
from lp_plugin.report import console

__all__ = ["Steps"]


class Steps:
    """Told by every rank what comes next.

    Args:
        job: The case.
    """

    def __init__(self, job: CaseJob) -> None:
        self._job = job
        self._console = console() if dist.get_rank() == 0 else None

    def begin(self, what: str, configuration: str | None = None) -> None:
        """Something starts that must not take longer than ten minutes; a process that does not come out of it ends.

        Args:
            what: In words that follow "while".
            configuration: Which is to blame if it fails.
        """
        faulthandler.dump_traceback_later(STALLED_SECONDS, exit=True)  # works while the interpreter is held up
        if self._console is not None:
            Doing(what=what, configuration=configuration).note(self._job.folder)

    def say(self, text: str) -> None:
        """A line on rank 0."""
        if self._console is not None:
            passed = time.time() - self._job.start
            self._console.print(f"{passed:6.1f} s  {self._job.case.name}: {text}", highlight=False, markup=False)

    def end(self) -> None:
        """Nothing is left but to part from the others, which must not take longer either."""
        self.begin("ending")
