"""Running out of memory becomes one explained error."""

import pytest
import torch

from lp_plugin import Cluster, ModelProfile, Workload, make_plan
from lp_plugin.errors import OutOfMemoryError
from lp_plugin.job import memory
from lp_plugin.job.place import at, set_stage, set_step


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is stage 1 of a plan."""
    monkeypatch.setattr(memory, "_expected", None)
    profile = ModelProfile.from_costs([1, 1], weight_bytes=[10**9, 3 * 10**9])
    plan = make_plan(profile, Cluster.homogeneous("h200", 2), Workload(batch=1, sequence=1))
    memory.expect(plan, 1)
    set_stage(1)
    set_step(4)
    at("forward", 2)


def test_what_torch_says_on_a_cpu_is_explained(planned: None) -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    explained = memory.explained(failed.value)
    assert isinstance(explained, OutOfMemoryError)
    said = str(explained)
    assert said.startswith(
        "out of memory at stage 1, step 4, forward of micro-batch 2; the plan predicted 3.00 GB of the 127 GB of h200. "
    )
    assert "smaller micro-batches" in said
    assert "allocate" in said.split("torch says: ")[1]
    assert "\n" not in said


def test_a_gpus_error_is_explained_without_its_advice(planned: None) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. If reserved but unallocated memory is large")
    assert str(memory.explained(error)).endswith("torch says: CUDA out of memory. Tried 2 GiB.")


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert memory.explained(error) is None
