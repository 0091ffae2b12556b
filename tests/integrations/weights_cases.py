"""One process of a job of two: tensor-parallel stages against the whole model, and saving together.

    torchrun --nproc-per-node 2 weights_cases.py FOLDER

``FOLDER/0.json`` and ``FOLDER/1.json`` hold a result per case and rank; an exception is a result too.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, make_batch, make_config, make_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PretrainedConfig, PreTrainedModel

from lp_plugin.integrations.transformers.decoder import DecoderStage, num_layers
from lp_plugin.integrations.transformers.save import save_model
from lp_plugin.integrations.transformers.tensor_parallel import shard_stage
from lp_plugin.integrations.transformers.weights import load_stage

RANK = int(os.environ.get("RANK", "0"))
BLOCKS = 3
NEW_TOKENS = 6
WITHOUT_PLAN = ("gpt2", "opt", "falcon", "bloom")
PLANNED = [family for family, (kind, _) in FAMILIES.items() if kind not in WITHOUT_PLAN]
"""Families that transformers has a tensor-parallel plan for."""
SPREAD = ("llama", "llama-tied", "mixtral", "gpt_neox", "gpt2", "opt-350m")
"""Saved by two stages."""
GATHERED = ("llama-tied", "qwen3_moe", "starcoder2")
"""Saved by two ranks that share a stage."""
REFUSED = {
    "key heads": ("llama", {"num_key_value_heads": 1}),
    "heads": ("gpt_neox", {"num_attention_heads": 1}),
    "width": ("llama", {"intermediate_size": 127}),
    "experts' width": ("mixtral", {"intermediate_size": 127}),
    **{family: (family, {}) for family in WITHOUT_PLAN},
}
"""What can't be cut in two: family and changes to its configuration."""
Result = dict[str, Any]


def saved_model(family: str, folder: Path) -> PreTrainedModel:
    """A model that rank 0 has saved in ``folder / family``."""
    model = make_model(make_config(family, BLOCKS))
    if RANK == 0:
        model.save_pretrained(folder / family)
    torch.distributed.barrier()
    return model


def stages(
    config: PretrainedConfig, directory: Path, mesh: DeviceMesh, boundaries: tuple[int, ...], *, halves: bool = False
) -> list[DecoderStage]:
    """All stages, each of them this rank's part."""
    made = []
    for bounds in itertools.pairwise(boundaries):
        stage = DecoderStage(config, *bounds, halves=halves)
        shard_stage(stage, mesh)
        load_stage(stage, directory, "cpu", torch.float32)
        made.append(stage.eval())
    return made


def generated(parts: list[DecoderStage], ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Greedy tokens by `DecoderStage.step`."""
    rows, tokens = ids.shape
    caches = [stage.new_cache(rows, tokens + NEW_TOKENS) for stage in parts]
    mask = torch.cat([mask, mask.new_zeros(rows, NEW_TOKENS)], dim=1)
    positions = (mask[:, :tokens].cumsum(1) - 1).clamp(min=0)
    value, made = ids, []
    for number in range(NEW_TOKENS):
        hidden = value
        for stage, cache in zip(parts, caches, strict=True):
            hidden = stage.step(hidden, attention_mask=mask, position_ids=positions, cache=cache)
        value = hidden[:, -1].argmax(-1, keepdim=True)
        made.append(value)
        mask[:, tokens + number] = 1
        positions = positions[:, -1:] + 1
    return torch.cat(made, 1).tolist()


def parallel(family: str, folder: Path, mesh: DeviceMesh, *, halves: bool = False) -> Result:
    """Logits and greedy tokens of a model whose stages are cut in two, and the share of its parameters."""
    model = saved_model(family, folder)
    count = num_layers(model.config, halves=halves)
    parts = stages(model.config, folder / family, mesh, (0, 2, count - 1, count), halves=halves)
    ids, mask = make_batch("left", 0)
    value: Any = (ids, mask)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        for stage in parts:
            value = stage(value)
        tokens = generated(parts, ids, mask)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    held = sum(parameter.numel() for stage in parts for parameter in stage.parameters())
    real = mask.bool()
    return {
        "difference": float((value - expected)[real].abs().max()),
        "equal tokens": tokens == alone,
        "share": held / sum(parameter.numel() for parameter in model.state_dict().values()),
        "logits": value[-1, -1].tolist(),
    }


def refused(family: str, changes: dict[str, Any], mesh: DeviceMesh) -> Result:
    config = make_config(family, BLOCKS)
    for name, value in changes.items():
        setattr(config, name, value)
    shard_stage(DecoderStage(config, 0, num_layers(config)), mesh)
    return {}


def saved_together(family: str, folder: Path) -> Result:
    """Each rank holds a stage."""
    model = saved_model(family, folder)
    count = num_layers(model.config)
    stage = DecoderStage(model.config, *((0, 2) if RANK == 0 else (2, count)))
    load_stage(stage, folder / family, "cpu", torch.float32)
    target = folder / f"{family} in two"
    save_model(stage, target, source=folder / family, part=RANK, num_parts=2)
    return written(target, folder / family)


def saved_from_halves(family: str, folder: Path, mesh: DeviceMesh) -> Result:
    """Each rank holds half of each tensor."""
    model = saved_model(family, folder)
    (stage,) = stages(model.config, folder / family, mesh, (0, num_layers(model.config)))
    target = folder / f"{family} gathered"
    save_model(stage, target, source=folder / family, tensor_rank=RANK)
    return written(target, folder / family)


def written(target: Path, source: Path) -> Result:
    """Whether two directories hold the same tensors, the files of the first, and whether its index is right."""
    ours: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for file in target.glob("*.safetensors"):
        ours |= load_file(file)
        where |= dict.fromkeys(load_file(file), file.name)
    theirs = load_file(source / "model.safetensors")
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    result: Result = {"equal": equal, "files": sorted(file.name for file in target.iterdir())}
    index = target / "model.safetensors.index.json"
    if index.is_file():
        sizes = {
            "total_parameters": sum(tensor.numel() for tensor in theirs.values()),
            "total_size": sum(tensor.nbytes for tensor in theirs.values()),
        }
        result["index"] = json.loads(index.read_text(encoding="utf-8")) == {"metadata": sizes, "weight_map": where}
    return result


def cannot_save(folder: Path) -> Result:
    """A process whose stage can't be written: a file stands where its directory should be made."""
    model = saved_model("llama", folder)
    stage = DecoderStage(model.config, RANK, RANK + 1)
    load_stage(stage, folder / "llama", "cpu", torch.float32)
    (folder / "in the way").write_text("")
    save_model(stage, folder / "in the way" / "model", source=folder / "llama", part=RANK, num_parts=2)
    return {}


def cases(folder: Path) -> dict[str, Callable[[], Result]]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "tp"))
    found: dict[str, Callable[[], Result]] = {}
    for family in PLANNED:
        found[f"parallel {family}"] = lambda family=family: parallel(family, folder, mesh)
    found["parallel halves"] = lambda: parallel("qwen3_moe", folder, mesh, halves=True)
    for name, (family, changes) in REFUSED.items():
        found[f"refused {name}"] = lambda family=family, changes=changes: refused(family, changes, mesh)
    for family in SPREAD:
        found[f"saved {family}"] = lambda family=family: saved_together(family, folder)
    for family in GATHERED:
        found[f"gathered {family}"] = lambda family=family: saved_from_halves(family, folder, mesh)
    found["cannot save"] = lambda: cannot_save(folder)
    return found


def attempt(case: Callable[[], Result]) -> Result:
    try:
        return case()
    except Exception as error:  # noqa: BLE001 - which one it is, the test says
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    results = {name: attempt(case) for name, case in cases(folder).items()}
    (folder / f"{RANK}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
