"""Tables of what was expected: predictions beside measurements, where the cut lies."""

from __future__ import annotations

from collections.abc import Sequence

from lp_plugin.bench.experiment.derived import error_summary, is_control, prediction_error, regrets, stage_errors
from lp_plugin.bench.experiment.document import Figures
from lp_plugin.bench.experiment.results import CaseResult
from lp_plugin.bench.experiment.wording import boundaries_text, change_text, missing_text, seconds_text, share_text

__all__ = ["cut_table", "error_table", "prediction_table"]

_MOST_STAGES = 8


def prediction_table(case: CaseResult) -> Figures | None:
    """A row per configuration and source: predicted beside measured, total and per stage; None without predictions."""
    rows = []
    for row in case.rows:
        for prediction in () if is_control(case, row) else row.predictions:
            stages = [change_text(error) for error in stage_errors(row, prediction)]
            more = ", ..." if len(stages) > _MOST_STAGES else ""
            rows.append(
                (
                    row.name,
                    prediction.source,
                    seconds_text(prediction.seconds),
                    seconds_text(row.median_seconds) if row.seconds else missing_text(row.reason),
                    change_text(prediction_error(row, prediction)) if row.seconds else "",
                    ", ".join(stages[:_MOST_STAGES]) + more,
                )
            )
    if not rows:
        return None
    notes = ["Error: predicted over measured, minus 1. Stages: the same of each stage alone, for one micro-batch."]
    for regret in regrets(case):
        if regret.chosen == regret.best:
            notes.append(f"By {regret.source}, {regret.chosen} was expected to be fastest, and was: regret 0.")
        else:
            notes.append(
                f"By {regret.source}, {regret.chosen} was expected to be fastest; {regret.best} was: regret "
                f"{regret.fraction:.1%}."
            )
    return Figures(
        title="Predicted beside measured",
        headings=("configuration", "from", "predicted", "measured", "error", "stages"),
        rows=tuple(rows),
        texts=frozenset({0, 1}),
        notes=tuple(notes),
    ).without_empty()


def cut_table(case: CaseResult) -> Figures | None:
    """Whether measured costs move the cut; None if the catalogue's cut was not asked for."""
    rows = tuple(
        (
            row.name,
            boundaries_text(row.boundaries),
            boundaries_text(row.catalogue_boundaries),
            "the same" if row.boundaries == row.catalogue_boundaries else "measured costs move it",
        )
        for row in case.rows
        if row.catalogue_boundaries and row.pipeline_parallel > 1 and not is_control(case, row)
    )
    if not rows:
        return None
    return Figures(
        title="Where it cuts",
        headings=("configuration", "from measured costs", "from the catalogue", ""),
        rows=rows,
        texts=frozenset({0, 1, 2, 3}),
    )


def error_table(cases: Sequence[CaseResult]) -> Figures | None:
    """Median and worst error of each source over all cases; None without predictions."""
    rows = tuple(
        (each.source, str(each.count), share_text(each.median), change_text(each.worst), each.where)
        for each in error_summary(cases)
    )
    if not rows:
        return None
    return Figures(
        title="Errors of the predictions, all cases",
        headings=("from", "configurations", "median of absolute errors", "worst", "where"),
        rows=rows,
        texts=frozenset({0, 4}),
        notes=("Catalogue and calibration know nothing of these runs; timed layers were timed in the same processes.",),
    )
