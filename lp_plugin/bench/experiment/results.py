"""What an experiment found out: plain data, as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lp_plugin.errors import InvalidInputError
from lp_plugin.files import check_values, read_text, write_atomically
from lp_plugin.measured import Counters, LayerTimes, Links, Memory, RankClocks, TimeSplit
from lp_plugin.quantity import is_plain, shown

__all__ = [
    "CaseResult",
    "Environment",
    "Prediction",
    "Results",
    "Row",
    "SimulatedRow",
    "load_results",
    "save_results",
]

_MOST_BYTES = 16 * 2**20  # real ones have some hundred thousand
_MOST_VALUES, _MOST_OBJECTS = 300_000, 20_000  # in it
_MOST_PROBLEMS = 1000  # that are made into messages, of which one is shown
SCHEMA_VERSION = 1
"""Raised when a field changes its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where it ran."""

    devices: tuple[str, ...]
    """Names of the GPUs; the CPU's name once if there are none."""
    backend: str
    """``nccl`` or ``gloo``."""
    host: str
    """Operating system and machine type; no host name."""
    cores: int
    """CPU cores."""
    versions: dict[str, str]
    """Python, torch, cuda, nccl, driver, deepspeed, transformers, lp_plugin."""
    variables: dict[str, str]
    """Environment variables that matter: OMP_NUM_THREADS, NCCL_*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a configuration was expected to take, by what was known before its trials."""

    source: Literal["catalogue", "calibrated", "timed layers"]
    """Device and links from the catalogue, from a calibration file, or layers timed alone on this machine."""
    seconds: float
    """One trial."""
    stage_seconds: tuple[float, ...]
    """Each stage's compute for one micro-batch (decode: one token of each row of a slot), all-reduces included."""
    hop_seconds: tuple[float, ...]
    """Each boundary's transfer of one micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration's figures."""

    name: str
    """Of the configuration; a second run of the baseline, the A/A control, is called ``NAME (again)``."""
    data_parallel: int
    """Replicas."""
    tensor_parallel: int
    """Ranks that share a layer."""
    pipeline_parallel: int
    """Stages."""
    partition: str
    """As asked."""
    boundaries: tuple[int, ...] = ()
    """Of layers; ``pipeline_parallel + 1`` numbers."""
    catalogue_boundaries: tuple[int, ...] = ()
    """Cache-aware: what the planner chooses from the catalogue's figures alone; empty if it was not asked."""
    micro_batch: int = 1
    """Sequences of a micro-batch of its own."""
    execution: str = ""
    """As it was chosen, or expected where there were too few GPUs: eager, graphs, compiled or stock."""
    reason: str = ""
    """Why it did not run, or not to the end; empty if all went well."""
    seconds: tuple[float, ...] = ()
    """Of each trial: prefill, the whole batch; decode, all tokens but each sequence's first, at the pace of those that
    come after the last sequence's first token."""
    first_token_seconds: tuple[float, ...] = ()
    """Of each trial: until the first result (prefill: the first micro-batch's; decode: median first token)."""
    token_seconds: tuple[float, ...] = ()
    """Decode, of each trial: a sequence's own time per token, the median sequence."""
    alone_seconds: tuple[float, ...] = ()
    """Prefill: each stage's pass over one micro-batch by itself, without pipeline, in the chosen execution."""
    clocks: tuple[RankClocks, ...] = ()
    """Of each rank used; empty where they are not known, as on CPUs."""
    flops: float = 0.0
    """Floating-point operations of one trial, counted."""
    peak_flops: float = 0.0
    """Of all devices used, from the catalogue; 0 if unknown."""
    traffic_bytes: float = 0.0
    """Bytes moved to and from device memory in one trial, counted with the predicted hits taken out."""
    peak_bandwidth: float = 0.0
    """Of all devices used, nominal, bytes per second; 0 if unknown."""
    predictions: tuple[Prediction, ...] = ()
    """Made before its trials; none of layers timed alone for DeepSpeed's own ``eval_batch``."""
    memory: tuple[Memory, ...] = ()
    """Of each rank used."""
    split: tuple[TimeSplit, ...] = ()
    """Of each rank used; empty if not asked for."""
    counters: tuple[Counters, ...] = ()
    """Of each stage; empty if not asked for."""

    @property
    def median_seconds(self) -> float:
        """Of the trials."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One case: its rows, measured in turns."""

    name: str
    """Of the case."""
    model: dict[str, Any]
    """transformers' configuration."""
    dtype: str
    """Precision."""
    phase: Literal["prefill", "decode"]
    """As asked."""
    processes: int
    """As asked."""
    batch: int
    """Sequences."""
    micro_batch: int | None
    """Sequences per micro-batch; None decoding a micro-batch per stage."""
    sequence: int
    """Tokens of a sequence, or of a prompt."""
    new_tokens: int
    """Per sequence."""
    tokens: int
    """Counted by tokens per second, in one trial."""
    baseline: str
    """What ratios refer to."""
    reason: str = ""
    """Why there are no rows; empty if there are."""
    note: str = ""
    """In words that follow the name: what went wrong after the trials, so that what comes later is missing."""
    rows: tuple[Row, ...] = ()
    """In the order of the file, the A/A control last."""
    turns: tuple[str, ...] = ()
    """Names in the order in which trials were run."""
    layers: tuple[LayerTimes, ...] = ()
    """Timed alone before the trials."""
    links: Links = field(default_factory=Links)
    """Timed before the trials, over all processes."""
    group_links: tuple[Links, ...] = ()
    """The same over the first ranks, as many as share a layer where these are some of all."""
    environment: Environment | None = None
    """Of the processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRow:
    """A cluster that we do not have, by the schedule simulator fed with what was measured."""

    case: str
    """Whose layers were timed."""
    devices: int
    """GPUs."""
    strategy: str
    """Such as ``TP=8 x PP=2``."""
    granularity: Literal["layer", "sublayer"]
    """Where it may cut."""
    boundaries: tuple[int, ...]
    """Of one pipeline."""
    tokens_per_second: float
    """Simulated."""
    seconds: float
    """The whole batch, simulated."""
    bubble_fraction: float
    """Share of device time in which stages wait."""
    communication_fraction: float
    """Share of device time in all-reduces and transfers that nothing hides."""
    assumed: tuple[str, ...]
    """What of it was not measured: wider all-reduces, the network between nodes."""
    reason: str = ""
    """Why there are no figures; empty if there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything."""

    command: str
    """That made it."""
    experiment: str
    """Name of the file."""
    title: str
    """Heading."""
    trials: int
    """Turns of each configuration."""
    cases: tuple[CaseResult, ...]
    """In order."""
    simulated: tuple[SimulatedRow, ...] = ()
    """Larger clusters."""
    schema_version: int = SCHEMA_VERSION
    """Of the file."""


_RESULTS = TypeAdapter(Results)
_VERSION = TypeAdapter(dict[str, Any])


def save_results(results: Results, path: str | Path) -> None:
    """Writes everything but spans as JSON, whole or not at all; spans are in the report's timelines."""
    cases = tuple(
        dataclasses.replace(case, rows=tuple(_without_spans(row) for row in case.rows)) for case in results.cases
    )
    plain = dataclasses.asdict(dataclasses.replace(results, cases=cases))
    write_atomically(Path(path), json.dumps(plain, indent=1) + "\n")


def _without_spans(row: Row) -> Row:
    return dataclasses.replace(row, split=tuple(dataclasses.replace(each, spans=()) for each in row.split))


def _check_texts(content: Any) -> None:
    """Refuses what would act on the terminal that it is shown on.

    Raises:
        ValueError: Quoting it.
    """
    left = [content]
    while left:
        each = left.pop()
        if isinstance(each, str) and not is_plain(each):
            raise ValueError(f"{shown(each)} has control characters")
        if isinstance(each, dict):
            left += (*each, *each.values())
        elif isinstance(each, list):
            left += each


def load_results(path: str | Path) -> Results:
    """What `save_results` wrote; without spans.

    Raises:
        InvalidInputError: If the file is missing, truncated, or no results; names the first problem.
    """
    try:
        text = read_text(Path(path), _MOST_BYTES, "it can't be a results file")
        check_values(text, _MOST_VALUES, _MOST_OBJECTS)
        content = _VERSION.validate_json(text)
        _check_texts(content)
        version = content.get("schema_version")
        if version == SCHEMA_VERSION:
            return _RESULTS.validate_json(text)
    except ValidationError as error:
        if error.error_count() > _MOST_PROBLEMS:
            raise InvalidInputError(f"results file {path}: {error.error_count():,} values are wrong.") from None
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        place = place if place.isprintable() and len(place) <= 80 else shown(place)
        raise InvalidInputError(f"results file {path}: {place or 'the file'}: {first['msg']}.") from error
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"results file {path} can't be read: {error}.") from error
    raise InvalidInputError(
        f"results file {path} has schema {shown(version)}; this version reads {SCHEMA_VERSION}. Run the benchmark "
        "again, or take the version that made it."
    )
