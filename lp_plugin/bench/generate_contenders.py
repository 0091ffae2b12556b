"""Who takes part in the benchmark of generation: lp_plugin, and what else runs a Hugging Face model on a few GPUs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lp_plugin.errors import WorkloadError

__all__ = ["CONTENDERS", "REFERENCE", "Contender", "Request", "chosen_contenders"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to generate."""

    name: str
    """In ``--baselines`` and in the results."""
    what: str
    """In words; ``{stages}`` stands for the number of devices."""
    has_ranks: bool = True
    """Whether torchrun starts it; else it is one plain process."""
    on_one: bool = False
    """Whether it uses one device, whatever the number of stages."""
    needs_gpu: str = ""
    """Why it makes no sense on CPUs; empty if it does."""

    def devices(self, stages: int) -> int:
        """GPUs, or CPU processes, that it uses."""
        return 1 if self.on_one else stages


_COMPILED = "lp_plugin compiles a decode step on GPUs alone"
CONTENDERS = {
    each.name: each
    for each in (
        Contender(name="ours", what="lp_plugin, {stages} stages"),
        Contender(
            name="ours-compiled",
            what="lp_plugin, {stages} stages, compiled",
            needs_gpu=_COMPILED,
        ),
        Contender(name="native-pp", what="transformers' own pipeline, {stages} ranks"),
        Contender(
            name="accelerate",
            what='accelerate, device_map="balanced", {stages} devices',
            has_ranks=False,
            needs_gpu="accelerate balances over GPUs alone",
        ),
        Contender(name="tp", what="transformers' tensor parallelism, {stages} ranks"),
        Contender(name="one-gpu", what="transformers on one device, eager", has_ranks=False, on_one=True),
        Contender(
            name="one-gpu-compiled",
            what="transformers on one device, compiled, static cache",
            has_ranks=False,
            on_one=True,
            needs_gpu="transformers compiles a decode step on GPUs alone",
        ),
        Contender(name="ours-one-gpu", what="lp_plugin on one device", on_one=True),
        Contender(
            name="ours-one-gpu-compiled",
            what="lp_plugin on one device, compiled",
            on_one=True,
            needs_gpu=_COMPILED,
        ),
        Contender(name="ours-replicas", what="lp_plugin, {stages} replicas on a device each"),
    )
}
"""In the order of the turns."""
REFERENCE = "one-gpu"
"""Whose tokens the others' are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What each of them is to do; travels to the processes as a file."""

    directory: str
    """Model directory."""
    stages: int
    """Devices of those that use several."""
    requests: int
    """Prompts, all in one batch."""
    prompt_tokens: int
    """Tokens of each prompt."""
    new_tokens: int
    """Tokens to make for each, whatever they are."""

    def save(self, path: Path) -> None:
        """Writes all fields as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Request:
        """What `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def chosen_contenders(names: str) -> Sequence[Contender]:
    """Ours, and those that the user names.

    Args:
        names: ``all``, or names with commas between them.

    Raises:
        WorkloadError: If a name is unknown; lists those known.
    """
    wanted = set(CONTENDERS) if names == "all" else {name.strip() for name in names.split(",")} | {"ours"}
    if unknown := sorted(wanted - set(CONTENDERS)):
        raise WorkloadError(
            f"--baselines {unknown[0]!r} is unknown; write all, or some of {', '.join(CONTENDERS)} with commas between."
        )
    return [each for name, each in CONTENDERS.items() if name in wanted]
