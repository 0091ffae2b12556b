"""A Hugging Face ``config.json`` read into the numbers that costs depend on.

No weights, no framework. An `Architecture` is a list of blocks, each of an attention and an MLP, between an embedding
and a head; `lp_plugin.model.layers` counts it. How a family's config is read stands in `lp_plugin.model.families`,
and is imported for the family asked for alone. The family's own defaults fill in what a config leaves out (they are
held equal to transformers' by tests that build every family on the meta device).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lp_plugin.errors import ModelConfigError, UnsupportedModelError
from lp_plugin.files import parse_json, read_text
from lp_plugin.model.families import FAMILIES
from lp_plugin.model.quantization import Quantization, read_quantization
from lp_plugin.quantity import shown

__all__ = [
    "DTYPE_BYTES",
    "Architecture",
    "Attention",
    "Block",
    "Embedding",
    "Experts",
    "Head",
    "Mlp",
    "Norm",
    "NormVectors",
    "QkNorm",
    "read_architecture",
    "read_config",
]

Norm = Literal["rms", "layer"]
NormVectors = Literal[0, 1, 2]
QkNorm = Literal["none", "head", "full"]
_MOST_BYTES = 4_000_000  # of a config.json; real ones have some thousands
_MOST_VALUES = 100_000  # in it; the longest lists have one per layer

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one stored element, for the precisions that models are run in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One attention: queries, keys, values and the output projection; multi-head, grouped, or latent."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; fewer than ``num_heads`` with grouped queries, 1 with one for all."""
    head_dim: int
    """Width of a query's and a key's head; ``num_heads * head_dim`` may differ from the hidden size."""
    value_dim: int
    """Width of a value's head."""
    query_rank: int | None = None
    """Width that queries are compressed to first, where they are (latent attention)."""
    kv_rank: int | None = None
    """Width that keys and values are compressed to together; None unless the attention is latent."""
    rope_dim: int = 0
    """The part of ``head_dim`` that is rotated and shared by all heads of a latent attention."""
    cached_heads: int | None = None
    """Key and value heads in transformers' cache where it keeps them repeated; None: ``num_kv_heads``."""
    qkv_bias: bool = False
    """Bias on the projections of the hidden state: query, key, value, or their compressions."""
    output_bias: bool = False
    """Bias on the output projection."""
    qk_norm: QkNorm = "none"
    """Norms on queries and keys: none, one head's width shared by the heads, or all heads' width."""
    qk_norm_vectors: Literal[1, 2] = 1
    """Vectors of each of these norms: 1 for a weight, 2 with a bias."""
    sinks: bool = False
    """One learned logit per head that takes up attention."""
    position_buckets: int = 0
    """Rows of a learned table of relative positions, a value per head; 0 for none."""
    window: int | None = None
    """Keys that a query can look back on, itself included; None for all. Not causal: half of it to each side."""
    cache_window: int | None = None
    """Positions that transformers' cache keeps at most; None for all."""
    causal: bool = True
    """False: a query sees what comes after it, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A feed-forward network of two matrices, or of three if it is gated."""

    inner: int
    """Inner width."""
    matrices: Literal[2, 3]
    """2: up and down; 3: gated (gate, up, down)."""
    bias: bool = False
    """Bias on each matrix."""
    activation: str = "silu"
    """transformers' name of the activation function; it decides what a backward pass needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts: a router, many equal MLPs of which each token passes a few, and shared ones."""

    expert: Mlp
    """Each of the routed experts."""
    num_experts: int
    """Routed experts."""
    per_token: int
    """Routed experts that each token passes."""
    router_bias: bool = False
    """Bias on the router."""
    shared: Mlp | None = None
    """What every token passes beside the routed experts."""
    shared_gate: bool = False
    """Whether the shared expert's output is scaled by a learned gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One transformer block."""

    attention: Attention
    """Of the tokens among themselves."""
    mlp: Mlp | Experts
    """The second half."""
    cross: Attention | None = None
    """A decoder's attention to the encoder's output."""
    attention_norms: int = 1
    """Norms over the hidden size in the attention half, before or after, cross-attention's included."""
    mlp_norms: int = 1
    """Norms over the hidden size in the MLP half."""
    parallel: bool = False
    """Attention and MLP read the same hidden state, and their outputs are added together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The table of tokens and what is added to it."""

    rows: int
    """Tokens in the vocabulary."""
    width: int
    """Width of a row; a projection follows if it differs from the hidden size."""
    shared: str | None = None
    """Layers of the same key use one table."""
    positions: int = 0
    """Rows of a stored table of positions; 0 for none."""
    late_positions: bool = False
    """Whether positions are added after the projection, and are as wide as the hidden size."""
    segments: int = 0
    """Rows of a table of token types; 0 for none."""
    norm_vectors: int = 0
    """Vectors of a norm over the sum; 0 for no norm."""
    projection: bool = False
    """A matrix from ``width`` to the hidden size."""
    projection_bias: bool = False
    """Whether that matrix has a bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """From the last hidden state to a score for each token of the vocabulary."""

    rows: int
    """Tokens in the vocabulary."""
    width: int
    """Width of a row."""
    shared: str | None = None
    """Layers of the same key use one table."""
    bias: bool = False
    """One number per token of the vocabulary."""
    projection: bool = False
    """A matrix from the hidden size to ``width`` comes first."""
    projection_bias: bool = False
    """Whether that matrix has a bias."""
    norm_vectors: int = 0
    """Vectors of a norm after that matrix; 0 for no norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A transformer: embedding, blocks, final norm, head; with an encoder before them where it has one."""

    model_type: str
    """transformers' name of the family."""
    dtype: str
    """The precision that weights are computed in, and stored in unless they are quantised."""
    quantization: Quantization | None = None
    """How matrices are stored, if not in ``dtype``."""
    hidden_size: int
    """Width of the activation that blocks hand on."""
    embedding: Embedding
    """What the first layer holds."""
    blocks: tuple[Block, ...]
    """Blocks of the decoder, or of the encoder of a model that has nothing else."""
    head: Head
    """What the last layer holds."""
    encoder_blocks: tuple[Block, ...] = ()
    """Blocks of the encoder before a decoder."""
    decoder_embedding: Embedding | None = None
    """What embeds the decoder's tokens, where an encoder precedes it."""
    final_norm: bool = True
    """Whether a norm follows the last block; with an encoder, its last block too."""
    norm: Norm = "rms"
    """RMSNorm as transformers writes it, or LayerNorm."""
    norm_vectors: NormVectors = 1
    """Vectors per norm: 1 for a weight, 2 with a bias, 0 for neither."""
    max_positions: int | None = None
    """Longest sequence in tokens; None where the architecture sets no limit."""

    @property
    def num_layers(self) -> int:
        """Transformer blocks, an encoder's included."""
        return len(self.encoder_blocks) + len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Tokens that can be asked for."""
        return self.embedding.rows

    @property
    def tied_embeddings(self) -> bool:
        """Whether the head uses the embedding's matrix."""
        return self.head.shared is not None


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
    try:
        if file.is_dir():
            file = file / "config.json"
        config = parse_json(read_text(file, _MOST_BYTES, "a config.json has some thousands"), _MOST_VALUES)
    except FileNotFoundError:
        raise ModelConfigError(
            f"{file} does not exist; give a Hugging Face model directory or its config.json "
            "(models are read from disk; nothing is downloaded)."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelConfigError(f"{file} can't be read: {error}.") from None
    except ValueError as error:
        raise ModelConfigError(f"{file} is not valid JSON: {error}; is it truncated?") from None
    if not isinstance(config, dict):
        raise ModelConfigError(f"{file} holds a JSON {type(config).__name__}; a model config is an object.")
    return config


def read_architecture(
    config: Mapping[str, Any], *, dtype: str | None = None, weight_dtype: str | None = None
) -> Architecture:
    """Reads a config into an `Architecture`.

    Of a config that nests its language model under ``text_config`` (a multimodal one), that part alone is read.

    Args:
        config: The JSON object of a ``config.json``.
        dtype: Precision to run in, instead of the config's own.
        weight_dtype: How matrices are stored, instead of the config's ``quantization_config``.

    Raises:
        UnsupportedModelError: If the family or the quantisation has no description here; lists those that have.
        ModelConfigError: If a value is missing, of the wrong type, out of bounds, or contradicts another.
    """
    config = _text_part(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelConfigError(f'the config has no "model_type"; supported are {", ".join(sorted(FAMILIES))}.')
    if model_type not in FAMILIES:
        raise UnsupportedModelError(_unsupported(model_type))
    chosen = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if not isinstance(chosen, str) or chosen not in DTYPE_BYTES:
        raise ModelConfigError(f"dtype is {shown(chosen)}; supported are {', '.join(sorted(DTYPE_BYTES))}.")
    quantization = read_quantization(config.get("quantization_config"), weight_dtype)
    family = importlib.import_module(f"lp_plugin.model.families.{FAMILIES[model_type]}").READERS[model_type]
    architecture: Architecture = family.read(config, model_type).architecture(model_type, chosen, quantization)
    return architecture


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a nested config, with what the whole says of it."""
    part = config.get("text_config")
    if not isinstance(part, Mapping) or not isinstance(part.get("model_type"), str):
        return config
    if part["model_type"] not in FAMILIES:
        return config
    above = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
    return {key: config[key] for key in above if key in config} | dict(part)


def _unsupported(model_type: str) -> str:
    near = difflib.get_close_matches(model_type, FAMILIES, n=3)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return (
        f"model_type {shown(model_type)} is not supported{meant}; supported are {', '.join(sorted(FAMILIES))}. "
        "ModelProfile.from_costs() plans any model from plain numbers."
    )
