"""How matrices are stored when they are quantised: bits per weight, scales included, and which matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lp_plugin.errors import ModelConfigError, UnsupportedModelError
from lp_plugin.quantity import shown

__all__ = ["WEIGHT_DTYPES", "Quantization", "read_quantization"]

_METHODS = ("awq", "bitsandbytes", "fp8", "gptq", "mxfp4")
_MAX_GROUP = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Bits of a stored weight. Biases, norms, routers, embeddings and the head stay in the model's precision."""

    weight_dtype: str
    """Name of the stored number, e.g. ``int4``."""
    bits: Fraction
    """Bits per weight, its share of scales and zero points included."""
    experts_only: bool = False
    """Whether routed experts are quantised alone."""

    def stored_bytes(self, weights: int) -> int:
        """Bytes of so many quantised weights, rounded up."""
        return -(-weights * self.bits.numerator // (8 * self.bits.denominator))


WEIGHT_DTYPES: Mapping[str, Quantization] = {
    "float8": Quantization(weight_dtype="float8", bits=Fraction(8)),
    "int8": Quantization(weight_dtype="int8", bits=Fraction(8)),
    "int4": Quantization(weight_dtype="int4", bits=4 + Fraction(16, 128)),
}
"""What ``weight_dtype`` can be asked for. 8-bit weights with a scale per row or matrix, which is not counted;
4-bit weights with one 16-bit scale for 128 of them."""


def read_quantization(config: Any, weight_dtype: str | None) -> Quantization | None:
    """What a ``quantization_config`` or a user says about stored weights.

    Counted as each method stores them, source in brackets: ``fp8`` with one float32 scale per block (transformers,
    `FineGrainedFP8Config`); ``gptq`` and ``awq`` with a 16-bit scale and a zero point per group (their papers);
    ``bitsandbytes`` in 8 bits, or in 4 with a float32 scale per 64 weights, quantised to 8 bits itself if asked for
    (Dettmers et al., QLoRA); ``mxfp4`` for routed experts, with an 8-bit scale per 32 weights (OCP Microscaling
    Formats). Lists of modules that a method leaves out are not read: all matrices of blocks count as quantised.

    Args:
        config: The config's ``quantization_config``, or None.
        weight_dtype: The user's wish, which goes first.

    Raises:
        ModelConfigError: If a value is of the wrong type or out of bounds.
        UnsupportedModelError: If the method is not one of these.
    """
    if weight_dtype is not None:
        if not isinstance(weight_dtype, str) or weight_dtype not in WEIGHT_DTYPES:
            raise ModelConfigError(
                f"weight_dtype is {shown(weight_dtype)}; supported are {', '.join(sorted(WEIGHT_DTYPES))}."
            )
        return WEIGHT_DTYPES[weight_dtype]
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ModelConfigError(f"quantization_config is a {type(config).__name__}; it must be an object.")
    method = config.get("quant_method")
    if method in ("gptq", "awq"):
        return _grouped(config)
    if method == "bitsandbytes":
        return _bitsandbytes(config)
    if method == "fp8":
        return _fp8(config)
    if method == "mxfp4":
        return Quantization(weight_dtype="float4", bits=4 + Fraction(8, 32), experts_only=True)
    raise UnsupportedModelError(
        f"quantization_config: quant_method is {shown(method)}; supported are {', '.join(_METHODS)}. "
        "Take the section out to plan for the weights as they were trained."
    )


def _grouped(config: Mapping[str, Any]) -> Quantization:
    bits = _integer(config, "bits", default=4, lowest=2, highest=8)
    group = config.get("group_size", 128)
    if group == -1:  # one group per column: its scale is not worth counting
        return Quantization(weight_dtype=f"int{bits}", bits=Fraction(bits))
    group = _integer(config, "group_size", default=128, lowest=1, highest=_MAX_GROUP)
    return Quantization(weight_dtype=f"int{bits}", bits=bits + Fraction(16 + bits, group))


def _bitsandbytes(config: Mapping[str, Any]) -> Quantization:
    if _flag(config, "load_in_4bit"):
        scale = Fraction(8, 64) + Fraction(32, 64 * 256) if _flag(config, "bnb_4bit_use_double_quant") else None
        return Quantization(weight_dtype="int4", bits=4 + (scale or Fraction(32, 64)))
    if _flag(config, "load_in_8bit"):
        return WEIGHT_DTYPES["int8"]
    raise ModelConfigError("quantization_config: bitsandbytes needs load_in_4bit or load_in_8bit; both are false.")


def _fp8(config: Mapping[str, Any]) -> Quantization:
    block = config.get("weight_block_size")
    if block is None:
        return WEIGHT_DTYPES["float8"]
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(side, int) and 0 < side <= _MAX_GROUP for side in block)
    ):
        raise ModelConfigError(
            f"quantization_config: weight_block_size is {shown(block)}; it must be two whole numbers of 1 to "
            f"{_MAX_GROUP}."
        )
    return Quantization(weight_dtype="float8", bits=8 + Fraction(32, block[0] * block[1]))


def _integer(config: Mapping[str, Any], key: str, *, default: int, lowest: int, highest: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ModelConfigError(
            f"quantization_config: {key} is {shown(value)}; it must be a whole number of {lowest} to {highest}."
        )
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ModelConfigError(f"quantization_config: {key} is {shown(value)}; it must be true or false.")
    return value
