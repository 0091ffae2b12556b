"""A Hugging Face ``config.json`` read into the numbers that costs depend on.

No weights, no framework: the family's own default fills in what a config leaves out (they are held equal to
transformers' by a test that builds every family on the meta device).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from lp_plugin.errors import ModelConfigError, UnsupportedModelError

__all__ = ["DTYPE_BYTES", "FAMILIES", "Architecture", "read_architecture", "read_config"]

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one stored element, for the precisions that models are run in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A dense decoder: embedding, ``num_layers`` equal-shaped blocks, final norm, head."""

    model_type: str
    """transformers' name of the family."""
    dtype: str
    """The precision that weights are stored and computed in."""
    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    """Width of the activation that blocks hand on."""
    num_layers: int
    """Transformer blocks."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; fewer than ``num_heads`` with grouped queries."""
    head_dim: int
    """Width of one head; ``num_heads * head_dim`` may differ from ``hidden_size``."""
    intermediate_size: int
    """Inner width of the MLP."""
    mlp_matrices: Literal[2, 3]
    """2: up and down; 3: gated (gate, up, down)."""
    max_positions: int
    """Longest sequence in tokens."""
    tied_embeddings: bool
    """Whether the head uses the embedding's matrix."""
    norm_vectors: Literal[1, 2] = 1
    """Vectors per norm: 1 for RMSNorm (weight), 2 for LayerNorm (weight and bias)."""
    learned_positions: bool = False
    """Whether the embedding layer holds a position table."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Bias on the MLP's matrices."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, shared by the heads."""
    windows: tuple[int | None, ...] = ()
    """Per block, the tokens a query can look back on; None for all of them."""


class _DecoderConfig(BaseModel):
    """The keys that the families share; a subclass sets its own defaults and differences."""

    model_config = ConfigDict(extra="ignore", strict=True)
    norm_vectors: ClassVar[Literal[1, 2]] = 1
    mlp_matrices: ClassVar[Literal[2, 3]] = 3

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt | None = 11008
    num_hidden_layers: PositiveInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False

    def differences(self) -> dict[str, Any]:
        """The fields of `Architecture` in which the family differs from the plain decoder."""
        return {}

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block."""
        return (None,) * self.num_hidden_layers

    def architecture(self, model_type: str, dtype: str) -> Architecture:
        """The numbers that costs depend on."""
        kv_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ModelConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and head_dim is not given; correct one of the three."
            )
        if self.num_attention_heads % kv_heads:
            raise ModelConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}; correct one of them."
            )
        return Architecture(
            model_type=model_type,
            dtype=dtype,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=kv_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size or 4 * self.hidden_size,
            mlp_matrices=self.mlp_matrices,
            max_positions=self.max_position_embeddings,
            tied_embeddings=self.tie_word_embeddings,
            norm_vectors=self.norm_vectors,
            windows=self.windows(),
            **self.differences(),
        )


class _Llama(_DecoderConfig):
    attention_bias: bool = False
    mlp_bias: bool = False

    def differences(self) -> dict[str, Any]:
        return {
            "qkv_bias": self.attention_bias,
            "output_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }


class _Mistral(_DecoderConfig):
    intermediate_size: PositiveInt | None = 14336
    num_key_value_heads: PositiveInt | None = 8
    max_position_embeddings: PositiveInt = 4096 * 32
    sliding_window: PositiveInt | None = 4096

    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


class _Qwen2(_DecoderConfig):
    vocab_size: PositiveInt = 151936
    intermediate_size: PositiveInt | None = 22016
    num_key_value_heads: PositiveInt | None = 32
    max_position_embeddings: PositiveInt = 32768
    use_sliding_window: bool = False
    sliding_window: PositiveInt | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def differences(self) -> dict[str, Any]:
        return {"qkv_bias": True}

    def windows(self) -> tuple[int | None, ...]:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ModelConfigError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers; give one each."
            )
        slides = (
            [kind == "sliding_attention" for kind in self.layer_types]
            if self.layer_types is not None
            else [index >= self.max_window_layers for index in range(self.num_hidden_layers)]
        )
        return tuple(self.sliding_window if self.use_sliding_window and slide else None for slide in slides)


class _Qwen3(_Qwen2):
    head_dim: PositiveInt | None = 128
    attention_bias: bool = False

    def differences(self) -> dict[str, Any]:
        return {"qkv_bias": self.attention_bias, "output_bias": self.attention_bias, "qk_norm": True}


class _Starcoder2(_DecoderConfig):
    norm_vectors: ClassVar[Literal[1, 2]] = 2
    mlp_matrices: ClassVar[Literal[2, 3]] = 2
    vocab_size: PositiveInt = 49152
    hidden_size: PositiveInt = 3072
    intermediate_size: PositiveInt | None = 12288
    num_hidden_layers: PositiveInt = 30
    num_attention_heads: PositiveInt = 24
    num_key_value_heads: PositiveInt | None = 2
    max_position_embeddings: PositiveInt = 4096
    tie_word_embeddings: bool = True
    use_bias: bool = True
    sliding_window: PositiveInt | None = None

    def differences(self) -> dict[str, Any]:
        return {"qkv_bias": self.use_bias, "output_bias": self.use_bias, "mlp_bias": self.use_bias}

    def windows(self) -> tuple[int | None, ...]:
        return (self.sliding_window,) * self.num_hidden_layers


class _GPTNeoX(_DecoderConfig):
    norm_vectors: ClassVar[Literal[1, 2]] = 2
    mlp_matrices: ClassVar[Literal[2, 3]] = 2
    vocab_size: PositiveInt = 50432
    hidden_size: PositiveInt = 6144
    intermediate_size: PositiveInt | None = 24576
    num_hidden_layers: PositiveInt = 44
    num_attention_heads: PositiveInt = 64
    attention_bias: bool = True

    def differences(self) -> dict[str, Any]:
        return {"qkv_bias": self.attention_bias, "output_bias": self.attention_bias, "mlp_bias": True}


class _GPT2(_DecoderConfig):
    norm_vectors: ClassVar[Literal[1, 2]] = 2
    mlp_matrices: ClassVar[Literal[2, 3]] = 2
    vocab_size: PositiveInt = 50257
    hidden_size: PositiveInt = Field(default=768, alias="n_embd")
    intermediate_size: PositiveInt | None = Field(default=None, alias="n_inner")
    num_hidden_layers: PositiveInt = Field(default=12, alias="n_layer")
    num_attention_heads: PositiveInt = Field(default=12, alias="n_head")
    max_position_embeddings: PositiveInt = Field(default=1024, alias="n_positions")
    tie_word_embeddings: bool = True

    def differences(self) -> dict[str, Any]:
        biases = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
        return {"learned_positions": True, **biases}


FAMILIES: Mapping[str, type[_DecoderConfig]] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPTNeoX,
    "llama": _Llama,
    "mistral": _Mistral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "starcoder2": _Starcoder2,
}
"""transformers' ``model_type`` -> how its ``config.json`` is read."""


def read_config(path: str | Path) -> dict[str, Any]:
    """The contents of a ``config.json``.

    Args:
        path: The file, or the model directory that holds it.

    Returns:
        The JSON object, not yet checked.

    Raises:
        ModelConfigError: If it is missing, unreadable, or not a JSON object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelConfigError(
            f"{file} does not exist; give a Hugging Face model directory or its config.json "
            "(models are read from disk; nothing is downloaded)."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelConfigError(f"{file} can't be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file} is not valid JSON: {error}; is it truncated?") from None
    if not isinstance(config, dict):
        raise ModelConfigError(f"{file} holds a JSON {type(config).__name__}; a model config is an object.")
    return config


def read_architecture(config: Mapping[str, Any], *, dtype: str | None = None) -> Architecture:
    """Reads a decoder's config into an `Architecture`.

    Args:
        config: The JSON object of a ``config.json``.
        dtype: Precision to run in, instead of the config's own.

    Raises:
        UnsupportedModelError: If the family has no description here; lists those that have.
        ModelConfigError: If a value is missing, of the wrong type, or contradicts another.
    """
    model_type = config.get("model_type")
    supported = ", ".join(sorted(FAMILIES))
    if not isinstance(model_type, str):
        raise ModelConfigError(f'the config has no "model_type"; supported are {supported}.')
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported are {supported}. "
            "ModelProfile.from_costs() plans any model from plain numbers."
        )
    chosen = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(chosen, str) or chosen not in DTYPE_BYTES:
        raise ModelConfigError(f"dtype is {chosen!r}; supported are {', '.join(sorted(DTYPE_BYTES))}.")
    try:
        parsed = FAMILIES[model_type].model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ModelConfigError(f"{model_type} config: {key} is {first['input']!r}: {first['msg'].lower()}.") from None
    return parsed.architecture(model_type, chosen)
