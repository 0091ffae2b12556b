"""Commands that speak to other engines: ``score`` their partitions, ``export`` ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lp_plugin.cli import request as ask
from lp_plugin.cli.app import app, console
from lp_plugin.errors import InvalidInputError, PartitionFormatError, PlanFileError, WorkloadError
from lp_plugin.exchange.counts import MAX_CHARACTERS
from lp_plugin.exchange.handwritten import score_partitions, score_table
from lp_plugin.exchange.rules import RULES, boundaries_of_rule
from lp_plugin.files import read_text, write_atomically
from lp_plugin.integrations.formats import FORMATS, export_partition, import_partition
from lp_plugin.model import ModelProfile
from lp_plugin.planfile import load_plan, save_plan
from lp_plugin.report import stage_table
from lp_plugin.workload import Workload

__all__ = ["export", "score"]


@app.command()
def score(
    model: ask.Model,
    cluster: ask.ClusterSpec,
    batch: ask.Batch,
    sequence: ask.Sequence,
    partition: Annotated[
        list[str] | None,
        typer.Option(help=f"FORMAT:TEXT or FORMAT:@FILE, FORMAT one of {', '.join(FORMATS)}; may be repeated."),
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help=f"How an engine would split: {', '.join(RULES)}, or all; may be repeated.")
    ] = None,
    stages: ask.Stages = None,
    phase: ask.PhaseName = "prefill",
    micro_batch: ask.MicroBatch = None,
    dtype: ask.Dtype = None,
    weights: ask.Weights = None,
    granularity: ask.Granularity = "layer",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the (single) partition as a plan file.")
    ] = None,
) -> None:
    """Score partitions written by hand or by another engine's rule against the best one; needs no GPU."""
    profile, devices = ask.described(model, cluster, dtype=dtype, weights=weights, granularity=granularity)
    workload = Workload(phase=phase, batch=batch, sequence=sequence, micro_batch=micro_batch)
    named = [_imported(text, profile, stages) for text in partition or ()]
    found = len(named[0][1]) - 1 if named else len(devices.devices)
    count = found if stages is None else stages
    named += _ruled(rule or [], profile, count)
    if not named:
        raise WorkloadError("nothing to score; give --partition FORMAT:TEXT or --rule NAME.")
    if output is not None and len(named) > 1:
        raise WorkloadError(f"-o writes one partition, but {len(named)} are scored; give one.")
    scored = score_partitions(profile, devices, workload, named)
    chosen = scored[-1].plan.workload
    console().print(
        f"{profile.name} in {profile.dtype}, {phase}: batch {batch} x sequence {sequence}, "
        f"micro-batch {chosen.chosen_micro_batch}, {count} stages"
    )
    console().print(score_table(scored))
    if len(named) == 1:
        console().print(stage_table(scored[-1].plan))
    if output is not None:
        save_plan(scored[-1].plan, output)
        console().print(f"plan written to {output}")


@app.command()
def export(
    plan_file: Annotated[Path, typer.Argument(help="A plan made by 'lp-plugin plan -o'.")],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to a file.")] = None,
) -> None:
    """Print a plan's partition as another engine takes it."""
    plan = load_plan(plan_file)
    text = export_partition(plan, to, model_type=plan.model_type)
    if output is None:
        typer.echo(text)
        return
    try:
        write_atomically(output, text + "\n")
    except OSError as error:
        raise PlanFileError(f"the partition can't be written to {output}: {error.strerror or error}.") from None
    console().print(f"partition written to {output}")


def _imported(text: str, profile: ModelProfile, stages: int | None) -> tuple[str, tuple[int, ...]]:
    name, colon, value = text.partition(":")
    if not colon or name not in FORMATS:
        raise PartitionFormatError(
            f"--partition {text[:80]!r} is not understood; write FORMAT:TEXT or FORMAT:@FILE with one of the formats "
            f"{', '.join(FORMATS)}, as in vllm:5,4,4,3."
        )
    if value.startswith("@"):
        value = _file_text(Path(value[1:]))
    family = profile.architecture.model_type if profile.architecture is not None else None
    return name, import_partition(value, profile.layers, name, num_stages=stages, model_type=family)


def _file_text(path: Path) -> str:
    try:
        return read_text(path, MAX_CHARACTERS, "no partition needs that many")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--partition: {path} can't be read: {error}.") from None


def _ruled(names: list[str], profile: ModelProfile, stages: int) -> list[tuple[str, tuple[int, ...]]]:
    """Partitions by rule; with ``all``, rules that can't split this model are left out."""
    found = []
    for name in RULES if "all" in names else names:
        try:
            found.append((f"rule {name}", boundaries_of_rule(name, profile.layers, stages)))
        except (WorkloadError, PartitionFormatError):
            if "all" not in names:
                raise
    return found
