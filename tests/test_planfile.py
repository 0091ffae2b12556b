"""Plan files: what is written comes back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import STEADY, clusters, cost_profiles, profiles, workloads
from test_solve import FREE, device

from lp_plugin import (
    Cluster,
    ModelProfile,
    Plan,
    PlanFileError,
    Workload,
    load_plan,
    make_plan,
    save_plan,
)
from lp_plugin.files import write_atomically
from lp_plugin.objective import Constraints
from lp_plugin.planfile import SCHEMA_VERSION, check_model
from lp_plugin.planner import best_plan
from lp_plugin.solver.solve import evaluate

Edit = Callable[[dict[str, Any]], object]
CONSTRAINTS = st.builds(
    Constraints,
    max_latency_seconds=st.none() | st.floats(10, 1e300),
    min_tokens_per_second=st.none() | st.integers(1, 2) | st.floats(1e-9, 1),
    max_memory_bytes=st.none() | st.integers(10**4, 2**53),
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    profile = ModelProfile.from_costs([1, 2, 3], weight_bytes=[4, 5, 6])
    return make_plan(profile, Cluster.homogeneous(device(10, 1000), 2, FREE), Workload(batch=4, sequence=2))


@pytest.fixture
def file(plan: Plan, tmp_path: Path) -> Path:
    save_plan(plan, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_any_plan_comes_back_equal_and_is_written_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("plans")

    @STEADY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        profile, cluster = data.draw(profiles() | cost_profiles()), data.draw(clusters(roomy=True, groups=True))
        workload, constraints = data.draw(workloads(cut=False)), data.draw(CONSTRAINTS)
        assume(len(cluster.devices) <= profile.num_layers)
        objective = data.draw(st.sampled_from(["throughput", "latency", "memory"]))
        plan = best_plan(profile, cluster, workload, objective, constraints)
        assume(plan is not None)
        save_plan(plan, folder / "once.json")
        loaded = load_plan(folder / "once.json")
        assert loaded == plan
        assert loaded.tokens_per_second == plan.tokens_per_second
        save_plan(loaded, folder / "again.json")
        assert (folder / "again.json").read_bytes() == (folder / "once.json").read_bytes()
        check_model(loaded, profile, folder / "once.json")

    check()


def test_a_plan_of_given_boundaries_comes_back(tmp_path: Path) -> None:
    """It has no objective, and need not fit."""
    profile = ModelProfile.from_costs([1, 2, 3], weight_bytes=[4, 5, 10**6])
    workload = Workload(phase="train", batch=4, sequence=2, micro_batch=2, checkpointing=True, data_parallel=3)
    made = evaluate(profile, Cluster.homogeneous(device(10, 1000), 2, FREE), workload, [0, 1, 3])
    assert made.uniform_seconds is None
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_a_path_may_be_text(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, str(tmp_path / "plan.json"))
    assert load_plan(str(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize("name", ["naïve 日本", "[x]", "", 'quo"te', "a\nb"])
def test_any_name_survives(name: str, tmp_path: Path) -> None:
    profile = ModelProfile.from_costs([1, 2], names=[name, "b"], name=name)
    made = make_plan(profile, Cluster.homogeneous(device(1000), 1), Workload(batch=1, sequence=1))
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_whole_numbers_in_other_types_survive(tmp_path: Path) -> None:
    """1.5e9 for bytes is easily written."""
    profile = ModelProfile.from_costs([1, 2], weight_bytes=[5.0, 5.0])
    made = make_plan(profile, Cluster.homogeneous(device(1000), 1), Workload(batch=1, sequence=1))
    save_plan(made, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_truncation_anywhere_is_an_error(file: Path) -> None:
    content = file.read_bytes()
    for length in range(len(content) - 1):  # without the last line's end it is still whole
        file.write_bytes(content[:length])
        with pytest.raises(PlanFileError, match="truncated"):
            load_plan(file)


def test_a_file_too_large_to_be_a_plan(file: Path) -> None:
    with file.open("ab") as stream:
        stream.truncate(64 * 2**20 + 1)  # sparse: takes no space
    with pytest.raises(
        PlanFileError, match="it has 67,108,865 bytes, but at most 16,777,216 are read; make the plan again"
    ):
        load_plan(file)


def test_a_path_that_is_none() -> None:
    with pytest.raises(PlanFileError, match="can't be read"):
        load_plan("a\0b")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"absent.json does not exist; make it with 'lp-plugin plan"):
        load_plan(tmp_path / "absent.json")
    with pytest.raises(PlanFileError, match="can't be read"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"null", b"[]", b"3", b'"plan"', b"{}", b"[" * 200_000, b"1" * 5000],
    ids=["not UTF-8", "null", "list", "number", "text", "empty object", "nested too deep", "a huge number"],
)
def test_other_content(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(PlanFileError, match=r"plan\.json"):
        load_plan(file)


def swap_layers(content: dict[str, Any]) -> None:
    content["stages"][0]["layers"], content["stages"][1]["layers"] = ["layer 2"], ["layer 0", "layer 1"]


def move_cut(content: dict[str, Any]) -> None:
    """Boundaries and stages agree with one another, but not with the stages' own layers and figures."""
    old = content["boundaries"][1]
    new = 3 - old
    content["boundaries"][1] = content["stages"][0]["stop"] = content["stages"][1]["start"] = new


EDITS: dict[str, tuple[str, Edit]] = {
    "boundaries moved": ("boundaries", lambda c: c.update(boundaries=[0, 3 - c["boundaries"][1], 3])),
    "boundaries falling": ("boundaries", lambda c: c.update(boundaries=[0, 3, 2])),
    "boundaries with an empty stage": ("boundaries", lambda c: c.update(boundaries=[0, 0, 3])),
    "boundaries of another model": ("boundaries", lambda c: c.update(boundaries=[0, 2, 4])),
    "boundaries not from 0": ("boundaries", lambda c: c.update(boundaries=[1, 2, 3])),
    "boundaries too few": ("boundaries", lambda c: c.update(boundaries=[0, 3])),
    "boundaries empty": ("boundaries", lambda c: c.update(boundaries=[])),
    "boundaries text": ("boundaries", lambda c: c.update(boundaries="0, 2, 3")),
    "boundaries not whole": ("boundaries.1", lambda c: c.update(boundaries=[0, 2.0, 3])),
    "boundaries huge": ("boundaries.2", lambda c: c.update(boundaries=[0, 2, 10**40])),
    "stages missing": ("boundaries", lambda c: c["stages"].pop()),
    "stages none": ("boundaries", lambda c: c.update(stages=[], boundaries=[0], layers=[])),
    "layers missing": ("layers", lambda c: c["layers"].pop()),
    "cut moved everywhere": ("layers", move_cut),
    "stages' layers swapped": ("layers", swap_layers),
    "stage's layer renamed": ("stages.0.layers", lambda c: c["stages"][0]["layers"].__setitem__(0, "other")),
    "model digest short": ("model_digest", lambda c: c.update(model_digest="abc")),
    "model digest not hexadecimal": ("model_digest", lambda c: c.update(model_digest="z" * 64)),
    "cluster digest missing": ("cluster_digest", lambda c: c.pop("cluster_digest")),
    "workload digest": ("workload_digest", lambda c: c.update(workload_digest="0" * 64)),
    "batch": ("workload", lambda c: c["workload"].update(batch=5)),
    "batch huge": ("workload.*batch", lambda c: c["workload"].update(batch=10**400)),
    "micro-batch": ("workload", lambda c: c["workload"].update(micro_batch=3)),
    "micro-batch above batch": ("micro_batch", lambda c: c["workload"].update(micro_batch=500)),
    "micro-batch missing": ("workload.micro_batch", lambda c: c["workload"].pop("micro_batch")),
    "micro-batch open": ("workload.micro_batch", lambda c: c["workload"].update(micro_batch=None)),
    "phase": ("workload", lambda c: c["workload"].update(phase="decode")),
    "phase unknown": ("workload.phase", lambda c: c["workload"].update(phase="fast")),
    "checkpointing in prefill": ("checkpointing", lambda c: c["workload"].update(checkpointing=True)),
    "zero stage": ("zero_stage", lambda c: c["workload"].update(zero_stage=3)),
    "objective unknown": ("objective", lambda c: c.update(objective="speed")),
    "latency not a number": ("max_latency_seconds", lambda c: c["constraints"].update(max_latency_seconds=math.nan)),
    "rate negative": ("min_tokens_per_second", lambda c: c["constraints"].update(min_tokens_per_second=-1.0)),
    "sequences not whole": ("constraints.min_sequences", lambda c: c["constraints"].update(min_sequences=1.5)),
    "memory zero": ("max_memory_bytes", lambda c: c["constraints"].update(max_memory_bytes=0)),
    "tier a number": ("constraints.tier", lambda c: c["constraints"].update(tier=2)),
    "tensor parallel zero": ("tensor_parallel", lambda c: c.update(tensor_parallel=0)),
    "extra key": ("extra", lambda c: c.update(extra=1)),
    "extra key in a stage": ("stages.0.extra", lambda c: c["stages"][0].update(extra=1)),
    "extra key in the workload": ("workload.extra", lambda c: c["workload"].update(extra=1)),
    "extra key that can't be written": ("a key", lambda c: c.update({"\ud800": 1})),
    "extra key of great length": (r"x\.\.\. \(", lambda c: c.update({"x" * 10**6: 1})),
    "key missing": ("notes", lambda c: c.pop("notes")),
    "another schema version": ("schema version", lambda c: c.update(schema_version=SCHEMA_VERSION + 1)),
    "schema version 0": ("schema version", lambda c: c.update(schema_version=0)),
    "schema version as text": ("schema version", lambda c: c.update(schema_version=str(SCHEMA_VERSION))),
    "schema version as a fraction": ("schema_version", lambda c: c.update(schema_version=float(SCHEMA_VERSION))),
    "schema version true": ("schema version", lambda c: c.update(schema_version=True)),
    "schema version missing": ("schema version", lambda c: c.pop("schema_version")),
    "negative bytes": ("stages.0.weight_bytes", lambda c: c["stages"][0].update(weight_bytes=-1)),
    "bytes as text": ("stages.0.weight_bytes", lambda c: c["stages"][0].update(weight_bytes="4")),
    "bytes true": ("stages.0.kv_bytes", lambda c: c["stages"][0].update(kv_bytes=True)),
    "bytes without end": ("stages.0.traffic_bytes", lambda c: c["stages"][0].update(traffic_bytes=10**400)),
    "bytes of a layer": ("layers.1.buffer_bytes", lambda c: c["layers"][1].update(buffer_bytes=0.5)),
    "block negative": ("layers.0.block", lambda c: c["layers"][0].update(block=-1)),
    "no capacity": ("stages.0.capacity_bytes", lambda c: c["stages"][0].update(capacity_bytes=0)),
    "more hits than all": ("stages.1.hit_fraction", lambda c: c["stages"][1].update(hit_fraction=1.5)),
    "hits not a number": ("stages.1.hit_fraction", lambda c: c["stages"][1].update(hit_fraction=math.nan)),
    "seconds not finite": ("compute_seconds", lambda c: c["stages"][0].update(compute_seconds=math.inf)),
    "seconds not a number": ("resident_seconds", lambda c: c["stages"][0].update(resident_seconds=math.nan)),
    "seconds negative": ("lower_bound_seconds", lambda c: c.update(lower_bound_seconds=-1.0)),
    "a bound above what is bounded": ("lower_bound_seconds", lambda c: c.update(lower_bound_seconds=1e9)),
    "uniform seconds text": ("uniform_seconds", lambda c: c.update(uniform_seconds="fast")),
    "dtype unknown": ("dtype", lambda c: c.update(dtype="float7")),
    "notes not text": ("notes.0", lambda c: c.update(notes=[1])),
    "name can't be written": ("model_name", lambda c: c.update(model_name="\ud800")),
}


@pytest.mark.parametrize(("field", "edit"), EDITS.values(), ids=EDITS)
def test_an_edited_plan_is_refused_and_the_field_named(file: Path, field: str, edit: Edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(PlanFileError, match=rf"plan\.json.*{field}") as caught:
        load_plan(file)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_versions_are_named(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 999}))
    with pytest.raises(PlanFileError, match=f"schema version 999; this lp_plugin reads {SCHEMA_VERSION}"):
        load_plan(file)


def test_a_plan_for_another_model_is_refused(plan: Plan) -> None:
    check_model(plan, ModelProfile.from_costs([9, 9, 9], weight_bytes=[4, 5, 6]), "plan.json")  # other times only
    with pytest.raises(PlanFileError, match=r"plan.json was made for costs"):
        check_model(plan, ModelProfile.from_costs([1, 2, 3], weight_bytes=[4, 5, 7]), "plan.json")
    with pytest.raises(PlanFileError, match=r"plan.json was made for costs \(3 layers.*not for other \(4 layers"):
        check_model(plan, ModelProfile.from_costs([1] * 4, name="other"), "plan.json")


def test_a_new_plan_replaces_the_old_one(plan: Plan, file: Path) -> None:
    renamed = dataclasses.replace(plan, model_name="new")
    save_plan(renamed, file)
    assert load_plan(file) == renamed
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    plan: Plan, file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before, open_before = file.read_bytes(), len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(PlanFileError, match=r"can't be written to .*plan.json: No space left on device"):
            save_plan(dataclasses.replace(plan, model_name="new"), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_folder_that_is_not_there(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"can't be written to .*No such file"):
        save_plan(plan, tmp_path / "absent" / "plan.json")


def test_a_folder_in_the_files_place(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PlanFileError, match="can't be written"):
        save_plan(plan, tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0, 0o666)])
def test_the_file_is_as_readable_as_any_other(
    plan: Plan, tmp_path: Path, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    save_plan(plan, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == mode
    assert umask(mask) == mask  # and the process's own mask is what it was


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_atomically(tmp_path / "notes", "ü\r\n日本\n")
    assert (tmp_path / "notes").read_bytes() == "ü\r\n日本\n".encode()
