"""How other engines split blocks over stages when nobody tells them how: by count, never by cost.

Each rule is written from the engine's published source, named in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lp_plugin.errors import WorkloadError
from lp_plugin.exchange.counts import NamedLayer, block_starts, boundaries_from_counts
from lp_plugin.solver.solve import uniform_boundaries

__all__ = [
    "BLOCK_RULES",
    "RULES",
    "boundaries_of_rule",
    "deepspeed_uniform",
    "megatron_even",
    "sglang",
    "tensorrt_llm",
    "transformers_native",
    "vllm",
]


def vllm(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """vLLM: one more for the stages before the last, from back to front; the last never gets one.

    Source: vllm-project/vllm, ``vllm/distributed/utils.py``, ``get_pp_indices``.

    Args:
        num_blocks: Transformer blocks.
        num_stages: Pipeline stages.

    Returns:
        Blocks per stage.

    Raises:
        WorkloadError: If a stage would be empty.

    Example:
        >>> vllm(61, 8)
        (7, 7, 8, 8, 8, 8, 8, 7)
    """
    each, rest = _share(num_blocks, num_stages, "blocks")
    return tuple(each + (num_stages - 1 - rest <= stage < num_stages - 1) for stage in range(num_stages))


def sglang(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """SGLang: one more for the last stages.

    Source: sgl-project/sglang, ``python/sglang/srt/distributed/utils.py``, ``get_pp_indices``.

    Args:
        num_blocks: Transformer blocks.
        num_stages: Pipeline stages.

    Returns:
        Blocks per stage.

    Raises:
        WorkloadError: If a stage would be empty.

    Example:
        >>> sglang(61, 8)
        (7, 7, 7, 8, 8, 8, 8, 8)
    """
    each, rest = _share(num_blocks, num_stages, "blocks")
    return tuple(each + (stage >= num_stages - rest) for stage in range(num_stages))


def tensorrt_llm(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """TensorRT-LLM: one more for the first stages.

    Source: NVIDIA/TensorRT-LLM, ``tensorrt_llm/mapping.py``, ``Mapping.pp_layers`` (``torch.tensor_split``).

    Args:
        num_blocks: Transformer blocks.
        num_stages: Pipeline stages.

    Returns:
        Blocks per stage.

    Raises:
        WorkloadError: If a stage would be empty.

    Example:
        >>> tensorrt_llm(61, 8)
        (8, 8, 8, 8, 8, 7, 7, 7)
    """
    return _first_stages_more(num_blocks, num_stages)


def megatron_even(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """Megatron-LM without a layout: the same number everywhere, or it refuses.

    Source: NVIDIA/Megatron-LM, ``megatron/core/transformer/transformer_block.py``, ``get_num_layers_to_build``.

    Args:
        num_blocks: Transformer blocks.
        num_stages: Pipeline stages.

    Returns:
        Blocks per stage.

    Raises:
        WorkloadError: If the blocks can't be divided evenly.

    Example:
        >>> megatron_even(32, 4)
        (8, 8, 8, 8)
    """
    each, rest = _share(num_blocks, num_stages, "blocks")
    if rest:
        raise WorkloadError(
            f"Megatron-LM divides {num_blocks} blocks over {num_stages} stages only if none is left, but {rest} are; "
            "give a number of stages that divides them, or a --pipeline-model-parallel-layout."
        )
    return (each,) * num_stages


def transformers_native(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """Pipeline parallelism of transformers itself: one more for the first stages.

    Up to 5.23 all that was left over went to the last stage, beside the head.

    Source: huggingface/transformers 5.24, ``src/transformers/distributed/pipeline_parallel.py``,
    ``PipelineStage.layer_range_for_rank``.

    Args:
        num_blocks: Transformer blocks.
        num_stages: Pipeline stages.

    Returns:
        Blocks per stage.

    Raises:
        WorkloadError: If a stage would be empty.

    Example:
        >>> transformers_native(61, 8)
        (8, 8, 8, 8, 8, 7, 7, 7)
    """
    return _first_stages_more(num_blocks, num_stages)


def deepspeed_uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """DeepSpeed's ``partition_method="uniform"``: over the whole layer list, one more for the first stages.

    Source: deepspeedai/DeepSpeed 0.19, ``deepspeed/runtime/utils.py``, ``partition_uniform``.

    Args:
        num_layers: Layers of the PipelineModule, embedding, norm and head included.
        num_stages: Pipeline stages.

    Returns:
        Boundaries (DeepSpeed's ``parts``).

    Raises:
        WorkloadError: If a stage would be empty, which DeepSpeed itself lets pass.

    Example:
        >>> deepspeed_uniform(19, 4)
        (0, 5, 10, 15, 19)
    """
    _share(num_layers, num_stages, "layers")  # refuses empty stages
    return uniform_boundaries(num_layers, num_stages)


BLOCK_RULES: Mapping[str, Callable[[int, int], tuple[int, ...]]] = {
    "megatron_even": megatron_even,
    "sglang": sglang,
    "tensorrt_llm": tensorrt_llm,
    "transformers_native": transformers_native,
    "vllm": vllm,
}
"""Name -> rule over blocks: the embedding stays on the first stage, norm and head on the last."""
RULES: tuple[str, ...] = tuple(sorted([*BLOCK_RULES, "deepspeed_uniform"]))
"""Every rule's name."""


def boundaries_of_rule(name: str, layers: Sequence[NamedLayer], num_stages: int) -> tuple[int, ...]:
    """The boundaries that an engine's own rule gives a model.

    Args:
        name: One of `RULES`.
        layers: The model's layers.
        num_stages: Pipeline stages.

    Returns:
        Half-open, ``num_stages + 1`` numbers.

    Raises:
        WorkloadError: If the rule is unknown or can't split the model over so many stages.
        PartitionFormatError: If the layers have no blocks to count.
    """
    if name == "deepspeed_uniform":
        return deepspeed_uniform(len(layers), num_stages)
    if name not in BLOCK_RULES:
        raise WorkloadError(f"there is no rule {name!r}; known are {', '.join(RULES)}.")
    num_blocks = len(block_starts(layers)) - 1
    return boundaries_from_counts(layers, BLOCK_RULES[name](num_blocks, num_stages))


def _first_stages_more(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """As even as can be, one more for as many of the first stages as are needed."""
    each, rest = _share(num_blocks, num_stages, "blocks")
    return tuple(each + (stage < rest) for stage in range(num_stages))


def _share(count: int, num_stages: int, unit: str) -> tuple[int, int]:
    """What each stage gets at least, and what is left over."""
    if num_stages < 1:
        raise WorkloadError(f"{num_stages} stages make no pipeline; give at least 1.")
    if count < num_stages:
        raise WorkloadError(f"{num_stages} stages for {count} {unit} leave a stage empty; give at most {count} stages.")
    return divmod(count, num_stages)
