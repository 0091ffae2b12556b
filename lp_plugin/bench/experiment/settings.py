"""What an experiment is: the cases of a TOML file, each with its model, its work and the configurations to compare."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lp_plugin.errors import InvalidInputError, WorkloadError
from lp_plugin.files import read_text
from lp_plugin.model import ModelProfile
from lp_plugin.model.architecture import read_config
from lp_plugin.model.layers import Granularity
from lp_plugin.problems import problems_of
from lp_plugin.quantity import shown
from lp_plugin.strategy.layouts import Strategy
from lp_plugin.workload import Workload

__all__ = ["Case", "Configuration", "Execution", "Experiment", "Partition", "WantedTimes", "read_experiment"]

Partition = Literal["cache-aware", "uniform", "parameters"]
"""How layers are shared out among stages: by our planner, or by DeepSpeed's own methods."""
Execution = Literal["auto", "eager", "graphs", "compiled", "stock"]
"""How a rank runs its stage: ours, eagerly, as CUDA graphs, as either (auto), as CUDA graphs of compiled stages, or by
DeepSpeed's own ``eval_batch`` (stock)."""

_MAX_FILE_BYTES = 2**17
_COUNTS = {"dp": "data_parallel", "tp": "tensor_parallel", "pp": "pipeline_parallel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One way to run a case.

    Example:
        >>> Configuration.parse("tp=2 pp=2 uniform").strategy.label
        'TP=2 x PP=2'
    """

    name: str
    """As the file writes it; unique within a case."""
    strategy: Strategy
    """Which devices do what."""
    partition: Partition = "cache-aware"
    """How layers are shared out among stages."""
    execution: Execution = "auto"
    """How a rank runs its stage."""

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """From words such as ``tp=2``, ``pp=2 uniform``, ``pp=2 stock``, ``dp=2 eager``, ``1``.

        Raises:
            WorkloadError: If a word is unknown or comes twice.
        """
        counts: dict[str, int] = {}
        chosen: dict[str, Any] = {}
        for place, word in enumerate(text.split()):
            match = re.fullmatch(r"(dp|tp|pp)=([1-9]\d{0,4})", word)
            if match and _COUNTS[match[1]] not in counts:
                counts[_COUNTS[match[1]]] = int(match[2])
            elif word in get_args(Partition) and "partition" not in chosen:
                chosen["partition"] = word
            elif word in get_args(Execution) and "execution" not in chosen:
                chosen["execution"] = word
            elif word == "1" and "1" not in text.split()[:place] and "=" not in text:
                continue
            else:
                known = "dp=N, tp=N, pp=N, 1, " + ", ".join((*get_args(Partition), *get_args(Execution)))
                raise WorkloadError(f"configuration {shown(text)}: {shown(word)} is not understood; write of: {known}.")
        if not text.split():
            raise WorkloadError('a configuration is empty; write for example "pp=2", or "1" for one device.')
        return cls(name=" ".join(text.split()), strategy=Strategy(**counts), **chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and one piece of work, run by several configurations in the same processes."""

    name: str
    """Unique within the experiment."""
    config: Mapping[str, Any]
    """transformers' configuration, with the case's changes."""
    dtype: str
    """Precision of weights and activations."""
    processes: int
    """Processes (GPUs, or Gloo ranks) of the case."""
    phase: Literal["prefill", "decode"]
    """``prefill``: whole sequences, no cache. ``decode``: prompts of ``sequence`` tokens, then new tokens."""
    batch: int
    """Sequences, shared by all replicas."""
    micro_batch: int | None
    """Sequences per micro-batch (decode: rows of a slot); None for 1, decoding for a slot per stage of a replica."""
    sequence: int
    """Tokens of each sequence; decoding, of each prompt."""
    new_tokens: int = 0
    """To make for each sequence; 0 for prefill."""
    configurations: tuple[Configuration, ...] = ()
    """To compare."""
    baseline: str
    """Name of the configuration that ratios refer to."""
    counters: bool = False
    """Whether to read hardware counters of the baseline's and the first configuration's stages."""

    def profile(self, granularity: Granularity = "layer") -> ModelProfile:
        """The model's layers, not sharded.

        Raises:
            ModelConfigError, UnsupportedModelError: If the configuration can't be described.
        """
        return ModelProfile.from_config(dict(self.config), dtype=self.dtype, granularity=granularity)

    def workload(self, configuration: Configuration) -> Workload:
        """What one replica of a configuration does, for the planner."""
        batch = -(-self.batch // configuration.strategy.data_parallel)
        slots = configuration.strategy.pipeline_parallel
        default = 1 if self.phase == "prefill" else -(-batch // slots)
        return Workload(
            phase=self.phase,
            batch=batch,
            sequence=self.sequence + self.new_tokens,
            micro_batch=min(self.micro_batch or default, batch),
        )

    @property
    def tokens(self) -> int:
        """Counted by tokens per second: those of all sequences; decoding, all new tokens but each sequence's first."""
        return self.batch * (self.sequence if self.phase == "prefill" else self.new_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTimes:
    """Layers to time alone before the trials."""

    tensor_parallel: int
    """Ranks that share each layer."""
    granularity: Granularity
    """Whether blocks are whole or attention and MLP apart."""
    rows: int
    """Sequences of a micro-batch."""
    execution: Execution
    """As a configuration asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOut:
    """Simulated larger clusters, for the model and work of one case."""

    case: str
    """Whose layers are timed."""
    devices: tuple[int, ...]
    """Numbers of GPUs."""
    cluster: str
    """What they are, as ``--cluster`` writes it without the number: a name of the catalogue."""
    batch: int
    """Sequences."""
    micro_batch: int
    """Sequences per micro-batch."""
    widest_tensor_parallel: int
    """Tensor-parallel ranks of the baseline, in few stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Everything that a file asks for."""

    name: str
    """Of the file."""
    title: str
    """Heading of the report."""
    trials: int
    """Turns of each configuration."""
    calibration: Path | None
    """Cluster file of `lp-plugin calibrate` for predictions; None takes the catalogue's figures."""
    cases: tuple[Case, ...]
    """In order."""
    scale_out: tuple[ScaleOut, ...]
    """To simulate."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_Count = Annotated[int, Field(ge=1, le=10**9)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,79}$")]


class _CaseTable(_Table):
    name: _Name
    model: str | None = None
    changes: dict[str, Any] = {}
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    processes: _Count
    phase: Literal["prefill", "decode"]
    batch: _Count
    micro_batch: _Count | None = None
    sequence: _Count
    new_tokens: Annotated[int, Field(ge=0, le=10**9)] = 0
    configurations: Annotated[list[str], Field(min_length=1, max_length=64)]
    baseline: str | None = None
    counters: bool = False


class _ScaleOutTable(_Table):
    case: str
    devices: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=64)]
    cluster: str
    batch: _Count
    micro_batch: _Count = 1
    widest_tensor_parallel: _Count = 8


class _File(_Table):
    title: str = "Experiment"
    model: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    trials: Annotated[int, Field(ge=2, le=1000)] = 5
    calibration: str | None = None
    case: Annotated[list[_CaseTable], Field(min_length=1, max_length=256)]
    scale_out: list[_ScaleOutTable] = []


def read_experiment(path: str | Path) -> Experiment:
    """The experiment of a TOML file; paths in it are relative to its folder.

    Raises:
        WorkloadError: If the file can't be read, or a value is missing, unknown or out of bounds; names the place.
        ModelConfigError, UnsupportedModelError: If a model's configuration can't be described.
    """
    path = Path(path)
    try:
        file = _File.model_validate(tomllib.loads(read_text(path, _MAX_FILE_BYTES, "split it into several")))
    except ValidationError as error:
        raise WorkloadError(f"{path}: {problems_of(error, _known)}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WorkloadError(f"experiment file {path} can't be read: {error}.") from error
    cases = tuple(_case(file, table, path) for table in file.case)
    _check_unique(path, "case", [case.name for case in cases])
    for simulated in file.scale_out:
        if simulated.case not in {case.name for case in cases}:
            raise WorkloadError(f"{path}: scale_out.case is {shown(simulated.case)}; there is no case of that name.")
    return Experiment(
        name=path.stem,
        title=file.title,
        trials=file.trials,
        calibration=None if file.calibration is None else path.parent / file.calibration,
        cases=cases,
        scale_out=tuple(ScaleOut(**table.model_dump() | {"devices": tuple(table.devices)}) for table in file.scale_out),
    )


def _case(file: _File, table: _CaseTable, path: Path) -> Case:
    model = table.model or file.model
    if model is None:
        raise WorkloadError(f'{path}: case {table.name}: no model; add model = "DIRECTORY or config.json".')
    config = dict(read_config(path.parent / model)) | table.changes
    try:
        configurations = tuple(Configuration.parse(text) for text in table.configurations)
    except WorkloadError as error:
        raise WorkloadError(f"{path}: case {table.name}: {error}") from error
    _check_unique(path, f"case {table.name}: configuration", [each.name for each in configurations])
    meant: dict[Configuration, str] = {}
    for each in configurations:
        twin = meant.setdefault(dataclasses.replace(each, name=""), each.name)
        if twin != each.name:
            raise WorkloadError(f"{path}: case {table.name}: {each.name!r} is the same as {twin!r}; leave one out.")
    if (table.phase == "decode") != (table.new_tokens > 1):
        bound = "at least 2 when decoding, and left out for prefill"
        raise WorkloadError(f"{path}: case {table.name}: new_tokens is {table.new_tokens}; it must be {bound}.")
    baseline = table.baseline or configurations[0].name
    if baseline not in {each.name for each in configurations}:
        names = ", ".join(each.name for each in configurations)
        raise WorkloadError(f"{path}: case {table.name}: baseline is {shown(baseline)}; it must be one of: {names}.")
    for each in configurations:
        _check_configuration(f"{path}: case {table.name}: {each.name}", each, table)
    case = Case(
        name=table.name,
        config=config,
        dtype=table.dtype or file.dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        processes=table.processes,
        phase=table.phase,
        batch=table.batch,
        micro_batch=table.micro_batch,
        sequence=table.sequence,
        new_tokens=table.new_tokens,
        configurations=configurations,
        baseline=baseline,
        counters=table.counters,
    )
    try:
        case.profile()
    except InvalidInputError as error:
        raise type(error)(f"{path}: case {table.name}: {error}") from error
    return case


def _check_configuration(where: str, configuration: Configuration, table: _CaseTable) -> None:
    strategy = configuration.strategy
    if strategy.num_devices not in {1, table.processes}:
        raise WorkloadError(
            f"{where} takes {strategy.num_devices} devices, but the case has {table.processes} processes; "
            "let a configuration take all of them, or one."
        )
    if strategy.data_parallel > table.batch:
        raise WorkloadError(f"{where} has {strategy.data_parallel} replicas for a batch of {table.batch}; lower dp.")
    if table.phase == "decode" and configuration.execution == "stock":
        raise WorkloadError(f"{where}: DeepSpeed's eval_batch can't decode; take stock out.")


def _check_unique(path: Path, what: str, names: list[str]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise WorkloadError(f"{path}: {what} {shown(name)} comes twice; give each a name of its own.")


def _known(place: tuple[int | str, ...]) -> list[str]:
    tables: dict[str, type[_Table]] = {"case": _CaseTable, "scale_out": _ScaleOutTable}
    return list(tables.get(str(place[0]) if len(place) > 1 else "", _File).model_fields)
