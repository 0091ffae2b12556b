"""Two real processes: tensor-parallel stages against the whole model, and saving together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BIN, Start
from weights_cases import GATHERED, PLANNED, REFUSED, SPREAD, WITHOUT_PLAN

from lp_plugin.integrations.transformers.tensor_parallel import Cut

Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Ranks:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("weights")
    script = Path(__file__).with_name("weights_cases.py")
    start(BIN / "torchrun", "--standalone", "--nproc-per-node", "2", script, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("size", [4, 12, 97, 128])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_parts_are_those_of_chunk(size: int, num_ranks: int) -> None:
    numbers = torch.arange(size)
    for packed in (each for each in (1, 2) if size % each == 0):
        blocks = [torch.chunk(block, num_ranks) for block in torch.chunk(numbers, packed)]
        for rank in range(num_ranks):
            cut = Cut(dim=0, size=size, packed=packed, rank=rank, num_ranks=num_ranks, mesh=None)
            expected = [block[rank].tolist() if rank < len(block) else [] for block in blocks]
            assert [list(range(*span)) for span in cut.spans] == expected
            assert cut.length == sum(len(part) for part in expected)


@pytest.mark.parametrize("family", [*PLANNED, "halves"])
def test_parallel_stages_give_the_whole_models_logits_and_tokens(ranks: Ranks, family: str) -> None:
    first, second = (rank[f"parallel {family}"] for rank in ranks)
    assert first["logits"] == second["logits"]
    for seen in (first, second):
        assert seen["difference"] < 1e-5, seen
        assert seen["equal tokens"]


@pytest.mark.parametrize("family", PLANNED)
def test_each_rank_holds_half(ranks: Ranks, family: str) -> None:
    """And norms, routers and the biases of products by rows whole."""
    for rank in ranks:
        assert 0.5 <= rank[f"parallel {family}"]["share"] < 0.51


@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("key heads", "WorkloadError", "1 key and value heads can't be shared evenly by 2 tensor-parallel ranks"),
        ("heads", "WorkloadError", "1 attention heads can't be shared evenly by 2 tensor-parallel ranks"),
        ("width", "WorkloadError", "is 127 wide, which 2 tensor-parallel ranks can't share evenly"),
        ("experts' width", "WorkloadError", "is 127 wide, which 2 tensor-parallel ranks can't share evenly"),
        *((name, "UnsupportedModelError", f"no tensor-parallel plan for model_type '{name}'") for name in WITHOUT_PLAN),
    ],
)
def test_what_cannot_be_shared_is_refused(ranks: Ranks, case: str, error: str, says: str) -> None:
    assert case in REFUSED
    for rank in ranks:
        assert rank[f"refused {case}"]["error"] == error
        assert says in rank[f"refused {case}"]["message"]


@pytest.mark.parametrize("family", SPREAD)
def test_stages_of_two_processes_are_saved_as_one_model(ranks: Ranks, family: str) -> None:
    files = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    for rank in ranks:
        seen = rank[f"saved {family}"]
        assert seen["equal"], seen
        assert set(seen["files"]) == {"config.json", "generation_config.json"} | files
        assert seen["index"]


@pytest.mark.parametrize("family", GATHERED)
def test_shared_tensors_are_saved_whole(ranks: Ranks, family: str) -> None:
    for rank in ranks:
        seen = rank[f"gathered {family}"]
        assert seen["equal"], seen
        assert seen["files"] == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_process_that_cannot_write_is_named_by_both(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["cannot save"]["error"] == "RuntimeEnvironmentError"
        assert "process 0 couldn't prepare the directory: NotADirectoryError" in rank["cannot save"]["message"]
