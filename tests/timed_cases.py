"""A small case, and what its layers and links take: made up, so that plain loops can tell what follows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from lp_plugin import Cluster
from lp_plugin.bench.experiment.predict import predictions
from lp_plugin.bench.experiment.results import Prediction
from lp_plugin.bench.experiment.settings import Case, Configuration
from lp_plugin.measured import LayerTimes, Links

DENSE = json.loads((Path(__file__).parents[1] / "examples/dense16/config.json").read_text(encoding="utf-8"))
LINKS = Links(
    send_bytes=(1024, 65536, 16 * 2**20),
    send_seconds=(30e-6, 40e-6, 80e-6),
    reduce_bytes=(1024, 65536, 16 * 2**20),
    reduce_seconds=(40e-6, 50e-6, 120e-6),
    ranks=2,
)
FOUR = Cluster.homogeneous("h200", 4)


def a_case(phase: str = "prefill", *, blocks: int = 5, hidden: int = 1024, **changes: object) -> Case:
    """The reference model, smaller."""
    config = DENSE | {"num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    fields = {
        "name": "case",
        "config": config,
        "dtype": "float16",
        "processes": 4,
        "phase": phase,
        "batch": 12,
        "micro_batch": 2,
        "sequence": 128,
        "new_tokens": 9 if phase == "decode" else 0,
        "baseline": "1",
    }
    return Case(**(fields | changes))


def some_times(
    case: Case, tensor_parallel: int = 1, execution: str = "graphs", granularity: str = "layer", scale: float = 1e-4
) -> LayerTimes:
    """A block takes one unit, a half half of it, embedding and norm next to nothing, the head a third."""
    units = {"block": 1.0, "attention": 0.5, "mlp": 0.5, "head": 1 / 3}
    profile = case.profile(granularity)
    seconds = tuple(scale / tensor_parallel * units.get(layer.kind, 0.02) for layer in profile.layers)
    return LayerTimes(
        tensor_parallel=tensor_parallel,
        execution=execution,
        granularity=granularity,
        rows=case.micro_batch,
        seconds=seconds,
        resident_seconds=(None,) * len(seconds),
        weight_bytes=(0,) * len(seconds),
        peak_bytes=(None,) * len(seconds),
        launch_seconds=0.0,
    )


def of_stages(values: Sequence[float], boundaries: Sequence[int]) -> list[float]:
    """Sums over each stage's layers."""
    return [sum(values[start:stop]) for start, stop in itertools.pairwise(boundaries)]


def the_timed(
    case: Case, text: str, boundaries: Sequence[int], times: Sequence[LayerTimes], links: Links = LINKS
) -> Prediction:
    """What four devices are predicted to take by timed layers."""
    configuration = Configuration.parse(text)
    *_, last = predictions(case, configuration, boundaries, times, links, FOUR, None, configuration.execution)
    assert last.source == "timed layers"
    return last
