"""One plan, many engines: partitions written as, and read from, what each engine takes.

No engine need be installed::

    text = export_partition(plan, "vllm")                                  # "5,4,4,4"
    boundaries = import_partition("Et*5|t*4|t*4|t*3L", layers, "megatron")  # for lp_plugin.solver.solve.evaluate

====================  ====================================================  =======================================
format                text                                                  can't express
====================  ====================================================  =======================================
``deepspeed``         ``[0, 5, 9, 13, 19]``, layer numbers                  nothing
``accelerate``        ``{"model.embed_tokens": 0, ...}``, a ``device_map``  a cut inside a block
``torch``             ``[["model.embed_tokens", ...], ...]``, names         a cut inside a block
``megatron``          ``Et*5|t*4|t*4|t*3L``                                 that, and norm and head apart
``vllm``, ``sglang``  ``5,4,4,4``, blocks per stage                         that, and a stage without a block
``transformers``      ``5,4,4,4``, see `...transformers.native_pp`          that, and a stage without a block
====================  ====================================================  =======================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lp_plugin.errors import PartitionFormatError
from lp_plugin.exchange.counts import MAX_CHARACTERS, NamedLayer, Partitioned, PartitionFormat, reason_against, shown
from lp_plugin.integrations import accelerate, deepspeed_parts, megatron, sglang, torch_pipelining, vllm
from lp_plugin.integrations.counts import counts_format

__all__ = ["FORMATS", "export_partition", "expressible", "import_partition"]

_ALL = (
    accelerate.FORMAT,
    deepspeed_parts.FORMAT,
    megatron.FORMAT,
    sglang.FORMAT,
    torch_pipelining.FORMAT,
    counts_format("transformers"),
    vllm.FORMAT,
)
FORMATS: Mapping[str, PartitionFormat] = {each.name: each for each in _ALL}
"""Name -> format, by name."""


def expressible(plan: Partitioned, format_name: str, *, model_type: str | None = None) -> str | None:
    """Why an engine can't express a plan's partition.

    Args:
        plan: The partition.
        format_name: One of `FORMATS`.
        model_type: The model's family, whose modules ``accelerate`` and ``torch`` name; None takes the plan's.

    Returns:
        Sentences that name the stage and a partition near it that the engine can express; None if it can.

    Raises:
        PartitionFormatError: If there is no such format.
    """
    return reason_against(plan, _format(format_name), model_type or plan.model_type)


def export_partition(plan: Partitioned, format_name: str, *, model_type: str | None = None) -> str:
    """A plan's partition as an engine takes it.

    Args:
        plan: The partition.
        format_name: One of `FORMATS`.
        model_type: The model's family, whose modules ``accelerate`` and ``torch`` name; None takes the plan's.

    Returns:
        One line.

    Raises:
        PartitionFormatError: If the engine can't express it; see `expressible`.
    """
    target = _format(format_name)
    family = model_type or plan.model_type
    reason = reason_against(plan, target, family)
    if reason is not None:
        raise PartitionFormatError(reason)
    return target.write(plan.layers, plan.boundaries, family)


def import_partition(
    text: str,
    layers: Sequence[NamedLayer],
    format_name: str,
    *,
    num_stages: int | None = None,
    model_type: str | None = None,
) -> tuple[int, ...]:
    """The boundaries that an engine's text describes.

    Args:
        text: As the engine takes it.
        layers: The model's layers (`ModelProfile.layers` or `Plan.layers`).
        format_name: One of `FORMATS`.
        num_stages: Stages that there must be; None takes as many as the text has.
        model_type: ``"model_type"`` of the model's ``config.json``; needed by ``accelerate`` and ``torch``.

    Returns:
        Half-open boundaries over ``layers``, for `lp_plugin.solver.solve.evaluate`.

    Raises:
        PartitionFormatError: If the text is wrong, or does not describe this model; says where.
    """
    source = _format(format_name)
    if len(text) > MAX_CHARACTERS:
        raise PartitionFormatError(
            f"the {format_name} text has {len(text)} characters; at most {MAX_CHARACTERS} are read."
        )
    try:
        source.check(layers, model_type)
        boundaries = source.read(text, layers, model_type)
    except PartitionFormatError as error:
        raise PartitionFormatError(f"{format_name}: {error}") from None
    if num_stages is not None and len(boundaries) - 1 != num_stages:
        raise PartitionFormatError(
            f"{format_name}: {shown(text.strip())} has {len(boundaries) - 1} stages, but {num_stages} are wanted; "
            "give one stage per device (several stages on one device are not planned)."
        )
    return boundaries


def _format(name: str) -> PartitionFormat:
    if name not in FORMATS:
        raise PartitionFormatError(f"there is no format {shown(name)}; known are {', '.join(FORMATS)}.")
    return FORMATS[name]
