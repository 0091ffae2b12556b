"""Partitions as other engines write them: what each can express, and what they read back."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
from chains import COUNTED, NAMED, Cut, Layer, can_express, chain, cuts, plans
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import STEADY

from lp_plugin import PartitionFormatError, Plan
from lp_plugin.exchange.counts import block_starts, blocks_per_stage, boundaries_from_counts
from lp_plugin.integrations.formats import FORMATS, export_partition, expressible, import_partition

# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@STEADY
@given(drawn=plans())
def test_a_plan_comes_back_or_is_refused_with_a_reason(name: str, drawn: tuple[str, Plan]) -> None:
    family, plan = drawn
    reason = expressible(plan, name)
    assert (reason is None) == can_express(plan, name)
    if reason is not None:
        with pytest.raises(PartitionFormatError) as caught:
            export_partition(plan, name)
        assert str(caught.value) == reason
        return
    text = export_partition(plan, name)
    assert "\n" not in text
    again = import_partition(text, plan.layers, name, num_stages=plan.num_stages, model_type=family)
    assert again == plan.boundaries
    assert all(type(bound) is int for bound in again)
    assert import_partition(f" {text}\n", plan.layers, name, model_type=family) == plan.boundaries


@pytest.mark.parametrize("name", FORMATS)
@STEADY
@given(cut=cuts())
def test_the_reason_names_a_stage_and_a_partition_that_works(name: str, cut: Cut) -> None:
    reason = expressible(cut, name, model_type="llama")
    assert (reason is None) == can_express(cut, name)
    if reason is None:
        return
    assert re.search(r"stage \d+ ", reason)
    found = re.search(r"Near it and expressible: boundaries \[([0-9, ]+)\]\.$", reason)
    if found is None:
        most = int(re.search(r"into at most (\d+) stages", reason)[1])  # type: ignore[index]
        assert most < len(cut.boundaries) - 1
        return
    near = Cut(cut.layers, tuple(int(bound) for bound in found[1].split(",")))
    assert len(near.boundaries) == len(cut.boundaries)
    assert can_express(near, name)
    assert expressible(near, name, model_type="llama") is None


@pytest.mark.parametrize(
    ("name", "boundaries", "near"),
    [
        ("vllm", (0, 1, 6, 14, 19), (0, 2, 6, 14, 19)),
        ("vllm", (0, 6, 10, 18, 19), (0, 6, 10, 16, 19)),
        ("vllm", (0, 1, 2, 3, 19), (0, 2, 3, 4, 19)),
        ("vllm", (0, 6, 15, 16, 17, 18, 19), (0, 6, 13, 14, 15, 16, 19)),
        ("megatron", (0, 1, 9, 18, 19), (0, 1, 9, 17, 19)),
    ],
)
def test_the_partition_offered_is_near(name: str, boundaries: tuple[int, ...], near: tuple[int, ...]) -> None:
    reason = expressible(Cut(chain(16), boundaries), name)
    assert reason is not None
    assert reason.endswith(f" Near it and expressible: boundaries {list(near)}.")


def test_the_partition_offered_for_halves_moves_by_one() -> None:
    reason = expressible(Cut(chain(4, halves=True), (0, 4, 6, 11)), "torch", model_type="llama") or ""
    assert reason == (
        "torch can't express this partition: stage 1 begins inside block 1, between 'block 1 attention' and "
        "'block 1 mlp', and it cuts between whole blocks only. Near it and expressible: boundaries [0, 3, 5, 11]."
    )


@STEADY
@given(cut=cuts())
def test_sublayer_boundaries_survive_where_they_are_not_inside_blocks(cut: Cut) -> None:
    for name in FORMATS:
        if can_express(cut, name):
            text = export_partition(cut, name, model_type="gpt2")
            assert import_partition(text, cut.layers, name, model_type="gpt2") == cut.boundaries


@STEADY
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=8), halves=st.booleans())
def test_counts_and_boundaries_are_the_same_thing(counts: list[int], halves: bool) -> None:
    layers = chain(sum(counts), halves=halves)
    boundaries = boundaries_from_counts(layers, counts)
    assert blocks_per_stage(layers, boundaries) == tuple(counts)
    assert (boundaries[0], boundaries[-1]) == (0, len(layers))
    stages = [layers[start:stop] for start, stop in itertools.pairwise(boundaries)]
    assert [len({layer.block for layer in stage} - {None}) for stage in stages] == counts
    assert stages[0][0].kind == "embedding"
    assert [layer.kind for layer in stages[-1][-2:]] == ["norm", "head"]


def test_what_the_texts_look_like() -> None:
    cut = Cut(chain(16), (0, 6, 10, 14, 19))
    alone = Cut(chain(3), (0, 1, 2, 4, 6))
    small = Cut(chain(2), (0, 2, 5))
    assert export_partition(cut, "deepspeed") == "[0, 6, 10, 14, 19]"
    assert export_partition(cut, "megatron") == "Et*5|t*4|t*4|t*3L"
    assert export_partition(alone, "megatron") == "E|t|t*2|L"
    for name in COUNTED:
        assert export_partition(cut, name) == "5,4,4,3"
    assert json.loads(export_partition(small, "torch", model_type="gpt2")) == [
        ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.drop"],
        ["transformer.h.1", "transformer.ln_f", "lm_head"],
    ]
    assert json.loads(export_partition(small, "accelerate", model_type="llama")) == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "lm_head": 1,
        "model.rotary_emb": 0,
    }


# --- the engines' own readers, written again from their documents ---------------------------------------------------


def engine_ranges(text: str, num_blocks: int, num_stages: int) -> list[range]:
    """vLLM's and SGLang's reading of the variable: each rank's blocks."""
    counts = [int(part) for part in text.split(",")]
    assert len(counts) == num_stages
    assert sum(counts) == num_blocks
    return [range(sum(counts[:rank]), sum(counts[: rank + 1])) for rank in range(num_stages)]


def layout_stages(text: str) -> list[str]:
    """Megatron's reading of a layout: groups are written out first, then single symbols."""
    text = text.replace(",", "")
    while "(" in text:
        start, stop = text.index("("), text.index(")")
        times = re.match(r"\*(\d+)", text[stop + 1 :])
        assert times is not None
        text = text[:start] + text[start + 1 : stop] * int(times[1]) + text[stop + 1 + times.end() :]
    while "*" in text:
        times = re.search(r"(.)\*(\d+)", text)
        assert times is not None
        text = text[: times.start()] + times[1] * int(times[2]) + text[times.end() :]
    assert set(text) <= set("EtLm|")
    return text.split("|")


@STEADY
@given(drawn=plans())
def test_engines_read_what_was_planned(drawn: tuple[str, Plan]) -> None:
    _, plan = drawn
    num_blocks = len(block_starts(plan.layers)) - 1
    planned = [
        sorted({layer.block for layer in plan.layers[start:stop] if layer.block is not None})
        for start, stop in itertools.pairwise(plan.boundaries)
    ]
    if can_express(plan, "vllm"):
        for name in COUNTED:
            ranges = engine_ranges(export_partition(plan, name), num_blocks, plan.num_stages)
            assert [list(each) for each in ranges] == planned
    if can_express(plan, "megatron"):
        stages = layout_stages(export_partition(plan, "megatron"))
        assert [stage.count("t") for stage in stages] == [len(each) for each in planned]
        assert ["E" in stage for stage in stages] == [bound == 0 for bound in plan.boundaries[:-1]]
        assert ["L" in stage for stage in stages] == [bound == len(plan.layers) for bound in plan.boundaries[1:]]


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """Texts of Megatron's grammar, most of them with something wrong in the order or number of layers."""
    symbols = st.sampled_from(["t", "t", "t", "|", "t|", "E", "L", "tt", "m"])

    def piece(depth: int) -> str:
        text = draw(symbols) if draw(st.booleans()) or not depth else "".join(piece(0) for _ in range(draw(sizes)))
        if len(text) > 1 and depth and draw(st.booleans()):
            return f"({text})*{draw(repeats)}"
        return f"{text}*{draw(repeats)}" if not text[-1].isdigit() and draw(st.booleans()) else text

    sizes, repeats = st.integers(1, 3), st.integers(0, 3)
    middle = [piece(1) for _ in range(draw(sizes))]
    text = draw(st.sampled_from(["", ","])).join(middle)
    return f"E{text}L" if draw(st.booleans()) else text


@STEADY
@given(text=layouts())
def test_layouts_are_read_as_megatron_reads_them(text: str) -> None:
    stages = layout_stages(text)
    flat = "".join(stages)
    num_blocks = flat.count("t")
    assume(num_blocks)
    layers = chain(num_blocks)
    valid = all(stages) and re.fullmatch("Et+L", flat)
    if not valid:
        with pytest.raises(PartitionFormatError, match=r"^megatron: "):
            import_partition(text, layers, "megatron")
        return
    names = "".join({"embedding": "E", "block": "t", "norm": "", "head": "L"}[layer.kind] for layer in layers)
    boundaries = import_partition(text, layers, "megatron", num_stages=len(stages))
    assert boundaries[0] == 0
    for stage, (start, stop) in zip(stages, itertools.pairwise(boundaries), strict=True):
        letters = [{"embedding": "E", "block": "t", "head": "L"}.get(layer.kind, "") for layer in layers[start:stop]]
        assert "".join(letters) == stage
    assert names == flat


def test_the_layouts_of_megatrons_documents() -> None:
    layers = chain(61)
    with pytest.raises(PartitionFormatError, match="multi-token-prediction"):
        import_partition("Et*3|(tt|)*29,m|L", layers, "megatron")
    without = import_partition("Et*3|(tt|)*29,L", layers, "megatron", num_stages=31)
    assert without == (0, *range(4, 63, 2), 64)
    with pytest.raises(PartitionFormatError, match=re.escape("stage 1 of 'E||t|L' is empty")):
        import_partition("E||t|L", chain(1), "megatron")


# --- models that an engine has no words for ------------------------------------------------------------------------


def test_formats_without_words_for_a_model_say_so() -> None:
    plain = Cut([Layer(f"layer {index}", "layer") for index in range(4)], (0, 2, 4))
    both = Cut([*chain(2)[:3], *chain(2)], (0, 3, 8))
    twice = Cut([*chain(2), Layer("another", "head")], (0, 2, 6))
    headless = Cut(chain(2)[:-2], (0, 2, 3))
    assert export_partition(plain, "deepspeed") == "[0, 2, 4]"
    for name in FORMATS.keys() - {"deepspeed"}:
        assert "none of the 4 layers is a transformer block" in (expressible(plain, name, model_type="llama") or "")
        assert "the blocks are not one run" in (expressible(both, name, model_type="llama") or "")
        with pytest.raises(PartitionFormatError, match=f"^{name}: none of the 4 layers"):
            import_partition("2,2", plain.layers, name, model_type="llama")
    for name in NAMED:
        assert "no module name for layer 'another'" in (expressible(twice, name, model_type="llama") or "")
        assert "give the model type" in (expressible(Cut(chain(2), (0, 2, 5)), name) or "")
    assert "no layer after the last block" in (expressible(headless, "megatron") or "")
    assert expressible(headless, "vllm") is None


def test_the_stage_at_fault_is_named() -> None:
    reasons = {
        (0, 1, 6): "vllm can't express this partition: stage 0 has ['embedding'] but no block",
        (0, 4, 6): "vllm can't express this partition: stage 1 has ['norm', 'head'] but no block",
        (0, 2, 5, 6): "vllm can't express this partition: stage 2 has ['head'] but no block",
    }
    for boundaries, reason in reasons.items():
        assert (expressible(Cut(chain(3), boundaries), "vllm") or "").startswith(reason)


def test_blocks_that_are_numbered_twice_are_not_one_run() -> None:
    layers = [*chain(2)[:3], *chain(2)[1:]]
    with pytest.raises(PartitionFormatError, match="'block 0 block' follows 'block 1 block': the blocks are not one"):
        block_starts(layers)


def test_counts_of_any_size_are_typed_errors() -> None:
    with pytest.raises(PartitionFormatError, match=r"add up to a number of thousands of digits, but the model has 2"):
        boundaries_from_counts(chain(2), [10**5000, 1])


def test_unknown_formats_are_named() -> None:
    with pytest.raises(PartitionFormatError, match="no format 'vLLM'; known are accelerate, deepspeed, megatron"):
        export_partition(Cut(chain(2), (0, 5)), "vLLM")


def test_a_cut_inside_a_block_has_no_counts() -> None:
    with pytest.raises(PartitionFormatError, match="stage 1 begins inside block 0, between 'block 0 attention'"):
        blocks_per_stage(chain(2, halves=True), (0, 2, 7))


def test_texts_need_no_engine() -> None:
    code = """
import sys
for name in ("torch", "transformers", "deepspeed", "accelerate", "vllm", "sglang", "megatron"):
    sys.modules[name] = None  # importing it fails
from lp_plugin import Cluster, ModelProfile, Workload, make_plan
from lp_plugin.integrations.formats import FORMATS, export_partition, import_partition
profile = ModelProfile.from_config({"model_type": "llama", "num_hidden_layers": 8})
plan = make_plan(profile, Cluster.homogeneous("h200", 2), Workload(batch=8, sequence=1))
for name in FORMATS:
    text = export_partition(plan, name)
    assert import_partition(text, plan.layers, name, model_type="llama") == plan.boundaries
print(len(FORMATS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7"
