"""What is wrong with an experiment although its file reads well; found out before processes start or torch is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from lp_plugin.bench.experiment.settings import Case, Experiment, ScaleOut, read_experiment
from lp_plugin.errors import InvalidInputError, LpPluginError, WorkloadError
from lp_plugin.hardware import Cluster
from lp_plugin.integrations.transformers.runnable import check_runnable
from lp_plugin.model import ModelProfile

__all__ = ["checked_experiment"]

_MOST_TOKENS = 10**9
"""Of a batch, which lies whole on the devices of its first and last stage."""


def checked_experiment(file: Path, tables: Collection[str]) -> Experiment:
    """The experiment of a file, if every case can be run by enough devices and every cluster can be simulated.

    Args:
        file: TOML; see `read_experiment`.
        tables: What is asked for.

    Raises:
        InvalidInputError: If not; names the file, the case and the configuration.
    """
    experiment = read_experiment(file)
    if experiment.calibration is not None:
        Cluster.from_toml(experiment.calibration)
    for case in experiment.cases:
        problem = next(_problems(case), None)
        if problem:
            raise WorkloadError(f"{file}: case {case.name}: {problem}")
    if "scaling" in tables:
        for scale_out in experiment.scale_out:
            _check_simulated(file, scale_out)
    return experiment


def _problems(case: Case) -> Iterator[str]:
    """One after the other."""
    try:
        check_runnable(case.config, encodes=case.phase == "prefill")
    except InvalidInputError as error:
        yield str(error)
    profile = case.profile()
    yield from _too_long(case, profile)
    for configuration in case.configurations:
        strategy = configuration.strategy
        try:
            profile.sharded(strategy.tensor_parallel)
        except InvalidInputError as error:
            yield f"{configuration.name}: {error}"
        if strategy.pipeline_parallel > profile.num_layers:
            yield (
                f"{configuration.name} has {strategy.pipeline_parallel} stages for {profile.num_layers} layers; "
                f"lower pp to at most {profile.num_layers}."
            )


def _too_long(case: Case, profile: ModelProfile) -> Iterator[str]:
    if case.batch * case.sequence > _MOST_TOKENS:
        yield (
            f"batch {case.batch} of sequence {case.sequence} has {case.batch * case.sequence} tokens, "
            f"more than {_MOST_TOKENS:,}; lower batch or sequence."
        )
    most, longest = profile.max_positions, case.sequence + case.new_tokens
    if most is not None and longest > most:
        what = f"sequence is {case.sequence}"
        if case.new_tokens:
            what += f" and new_tokens {case.new_tokens}, together {longest}"
        yield (
            f"{what}, but the model allows {most} positions (max_position_embeddings); "
            "lower it, or raise the model's limit in changes."
        )


def _check_simulated(file: Path, scale_out: ScaleOut) -> None:
    try:
        for count in scale_out.devices:
            Cluster.homogeneous(scale_out.cluster, count)
    except LpPluginError as error:
        raise WorkloadError(f"{file}: scale_out of case {scale_out.case}: {error}") from error
    if scale_out.micro_batch > scale_out.batch:
        raise WorkloadError(
            f"{file}: scale_out of case {scale_out.case}: micro_batch is {scale_out.micro_batch}, more than the batch "
            f"of {scale_out.batch}; lower it."
        )
