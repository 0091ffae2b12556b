"""One process of a contender in the benchmark of generation: builds the model, then generates when its turn comes.

    python -m lp_plugin.bench.baselines FOLDER NAME        (under torchrun where it has several ranks)

``FOLDER/request.json`` says what to do. In ``FOLDER/NAME`` each rank writes ``ready-RANK.json`` when it is warm, waits
for the files ``turn-0``, ``turn-1``, ..., and ends at ``stop``, or if nobody asks any more; rank 0 writes
``result-0.json``, ... for each turn, and every rank ``memory-RANK.json`` at the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, GenerationConfig

from lp_plugin.bench.generate_contenders import CONTENDERS, Request
from lp_plugin.files import write_atomically
from lp_plugin.job.launch import prepare_environment
from lp_plugin.measure.layers import synchronize

if TYPE_CHECKING:
    from lp_plugin.generate.planning import GenerationPlan

__all__ = ["make_prompts"]

WARM_UPS = 2
"""Generations before the first turn: kernels are loaded, graphs captured, code compiled."""
_POLL_SECONDS = 0.005
_MOST_IDLE_SECONDS = 900.0
"""Others have that long for a turn, or to get ready."""
_SEED = 0

Tokens = list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A model that is ready to generate."""

    generate: Callable[[Tokens], Tokens]
    """Prompts -> new tokens; called by all ranks together."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else goes into the results."""


def make_prompts(request: Request, vocab_size: int) -> Tokens:
    """The prompts, the same for everyone: uniformly random tokens, but for the first three of the vocabulary."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (request.requests, request.prompt_tokens)
    prompts: Tokens = torch.randint(min(3, vocab_size - 1), vocab_size, shape, generator=generator).tolist()
    return prompts


def main(folder: Path, name: str) -> None:
    """Runs one rank to its end."""
    prepare_environment(None)
    request, own = Request.load(folder / "request.json"), folder / name
    rank = int(os.environ.get("RANK", "0"))
    built = _BUILDERS[name](request, CONTENDERS[name].devices(request.stages))
    loaded = _memory(torch.cuda.memory_allocated)
    vocab_size = json.loads((Path(request.directory) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    prompts = make_prompts(request, vocab_size)
    for _ in range(WARM_UPS):
        _timed(built, prompts)
    ready = {"facts": built.facts, "environment": _environment()}
    write_atomically(own / f"ready-{rank}.json", json.dumps(ready))
    turn, last = 0, time.monotonic()
    while not (own / "stop").exists() and time.monotonic() - last < _MOST_IDLE_SECONDS:
        if not (own / f"turn-{turn}").exists():
            time.sleep(_POLL_SECONDS)
            continue
        _timed(built, prompts)  # idle clocks and caches belong to no one's time
        seconds, tokens = _timed(built, prompts)
        if rank == 0:
            write_atomically(own / f"result-{turn}.json", json.dumps({"seconds": seconds, "tokens": tokens}))
        turn, last = turn + 1, time.monotonic()
    memory = {
        "load_bytes": loaded,
        "peak_bytes": _memory(torch.cuda.max_memory_allocated),
        "reserved_bytes": _memory(torch.cuda.max_memory_reserved),
    }
    write_atomically(own / f"memory-{rank}.json", json.dumps(memory))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _timed(built: Built, prompts: Tokens) -> tuple[float, Tokens]:
    """Seconds from the common start until every rank has all tokens."""
    _meet()
    start = time.perf_counter()
    tokens = built.generate(prompts)
    _meet()
    return time.perf_counter() - start, tokens


def _meet() -> None:
    synchronize()
    if distributed.is_initialized():
        distributed.barrier()
        synchronize()


def _ours(request: Request, devices: int, *, compiled: bool = False, replicas: int = 1) -> Built:
    from lp_plugin.integrations.deepspeed import generation  # noqa: PLC0415 - only this contender needs DeepSpeed
    from lp_plugin.job.ranks import gather  # noqa: PLC0415

    chosen, engine = _our_engine(request, devices // replicas, compiled=compiled, replicas=replicas)
    config, replica = _generation_config(request), engine.grid.data_parallel_id

    def generate(prompts: Tokens) -> Tokens:
        made = generation.generate(
            engine,
            prompts[replica::replicas],
            generation_config=config,
            micro_batch=chosen.micro_batch,
            num_slots=chosen.num_slots,
            compiled=compiled,
        )
        if replicas == 1:
            return made
        parts = dict(gather((replica, made)))
        return [parts[index % replicas][index // replicas] for index in range(len(prompts))]

    facts = {
        "boundaries": list(chosen.plan.boundaries),
        "micro_batch": chosen.micro_batch,
        "num_slots": chosen.num_slots,
        "predicted_seconds": chosen.predicted_seconds,
        "predicted_stage_seconds": list(chosen.plan.stage_seconds),
        "predicted_load_bytes": list(chosen.weight_bytes) * replicas,
        "predicted_peak_bytes": list(chosen.stage_memory_bytes) * replicas,
    }
    return Built(generate=generate, facts=facts)


def _our_engine(request: Request, stages: int, *, compiled: bool, replicas: int) -> tuple[GenerationPlan, Any]:
    """The plan for one replica's prompts, and DeepSpeed's engine with the stages loaded."""
    from lp_plugin.generate.planning import plan_generation  # noqa: PLC0415
    from lp_plugin.hardware import Cluster  # noqa: PLC0415
    from lp_plugin.integrations.deepspeed.engine import build_engine, init_distributed  # noqa: PLC0415
    from lp_plugin.integrations.transformers.pipeline import HFPipelineModule  # noqa: PLC0415
    from lp_plugin.measure.device import detect_device  # noqa: PLC0415
    from lp_plugin.model import ModelProfile  # noqa: PLC0415

    init_distributed()
    profile = ModelProfile.from_config(request.directory)
    device = detect_device(int(os.environ["LOCAL_RANK"]), stages * replicas)
    chosen = plan_generation(
        profile,
        Cluster.homogeneous(device, stages),
        prompts=-(-request.requests // replicas),
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        num_stages=stages,
        compiled=compiled,
    )
    module = HFPipelineModule(
        request.directory,
        num_stages=stages,
        workload=chosen.plan.workload,
        plan=chosen.plan,
        cluster=Cluster.homogeneous(device, stages),
        dtype=profile.dtype,
        data_parallel=replicas,
    )
    rows, slots = chosen.micro_batch, chosen.num_slots
    return chosen, build_engine(module, micro_batch=rows, num_micro_batches=slots, dtype=profile.dtype)


def _native_pp(request: Request, devices: int) -> Built:
    return _distributed_model(request, pp_size=devices)


def _tp(request: Request, devices: int) -> Built:
    return _distributed_model(request, tp_size=devices)


def _distributed_model(request: Request, **sizes: int) -> Built:
    from transformers.distributed import DistributedConfig  # noqa: PLC0415 - not every contender needs it

    if torch.cuda.is_available():
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        distributed.init_process_group("nccl", device_id=own)
    else:
        distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        request.directory,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=False,
        distributed_config=DistributedConfig(**sizes),
    )
    return _plain(model, request, {"device": _device()})


def _accelerate(request: Request, devices: int) -> Built:
    del devices  # the parent lets it see as many GPUs as it may use
    model = AutoModelForCausalLM.from_pretrained(
        request.directory, dtype="auto", local_files_only=True, trust_remote_code=False, device_map="balanced"
    )
    placed = sorted({str(place) for place in model.hf_device_map.values()})
    return _plain(model, request, {"device": _device()}, facts={"placed_on": placed})


def _one(request: Request, devices: int) -> Built:
    del devices
    return _plain(_whole(request), request, {"device": _device()})


def _one_compiled(request: Request, devices: int) -> Built:
    del devices
    return _plain(_whole(request), request, {"device": _device()}, cache_implementation="static")


def _whole(request: Request) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        request.directory, dtype="auto", local_files_only=True, trust_remote_code=False
    )
    return model.to(_device())


def _plain(
    model: Any, request: Request, place: dict[str, str], *, facts: dict[str, Any] | None = None, **options: Any
) -> Built:
    """A model and its own ``generate``, all prompts in one batch."""
    model.eval()
    config = _generation_config(request, **options)

    def generate(prompts: Tokens) -> Tokens:
        ids = torch.tensor(prompts, **place)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens: Tokens = made[:, ids.shape[1] :].tolist()
        return tokens

    return Built(generate=generate, facts=facts or {})


def _generation_config(request: Request, **options: Any) -> GenerationConfig:
    """Greedy; the model's configuration names no token that ends a row."""
    return GenerationConfig(max_new_tokens=request.new_tokens, do_sample=False, pad_token_id=0, **options)


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _memory(counter: Callable[[int], int]) -> list[int]:
    """Bytes on this rank's GPU, or on all GPUs of the only process; none on CPUs."""
    if not torch.cuda.is_available():
        return []
    own = [torch.cuda.current_device()] if distributed.is_initialized() else range(torch.cuda.device_count())
    return [counter(index) for index in own]


def _environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    versions = {}
    for name in ("torch", "transformers", "deepspeed", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()) if cuda else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cores": os.cpu_count(),
    }


_BUILDERS: dict[str, Callable[[Request, int], Built]] = {
    "ours": _ours,
    "ours-compiled": functools.partial(_ours, compiled=True),
    "native-pp": _native_pp,
    "accelerate": _accelerate,
    "tp": _tp,
    "one-gpu": _one,
    "one-gpu-compiled": _one_compiled,
    "ours-one-gpu": _ours,
    "ours-one-gpu-compiled": functools.partial(_ours, compiled=True),
    "ours-replicas": lambda request, devices: _ours(request, devices, replicas=devices),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
