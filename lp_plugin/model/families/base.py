"""What all families share: checked keys, bounds, and the plain decoder that a family differs from."""

import reprlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lp_plugin.errors import ModelConfigError
from lp_plugin.model.architecture import (
    Architecture,
    Attention,
    Block,
    Embedding,
    Experts,
    Head,
    Mlp,
    Norm,
    NormVectors,
    QkNorm,
)
from lp_plugin.model.quantization import Quantization

__all__ = [
    "Biases",
    "DecoderConfig",
    "Depth",
    "FamilyConfig",
    "Length",
    "SlidingConfig",
    "Width",
    "WindowedConfig",
    "each",
]

Width = Annotated[int, Field(gt=0, le=2**24)]
"""A size of a tensor. The bound is far above any model and keeps sums of products exact."""
Depth = Annotated[int, Field(gt=0, le=4_096)]
"""A number of blocks."""
Length = Annotated[int, Field(gt=0, le=2**31)]
"""A number of tokens."""

_KINDS = {"full_attention": False, "attention": False, "sliding_attention": True}
"""Entry of ``layer_types`` -> whether the block slides."""


_ATTRIBUTES = {"hidden_size", "max_position_embeddings", "num_attention_heads", "num_experts", "num_hidden_layers"}
"""Shared keys that transformers takes in place of a family's own key."""


class Biases(NamedTuple):
    """Which projections of a block have a bias: always, never, or as the key of that name says."""

    qkv: bool | str = False
    output: bool | str = False
    mlp: bool | str = False


class FamilyConfig(BaseModel):
    """A family's config. Keys it does not list are ignored, as transformers ignores them."""

    model_config = ConfigDict(extra="ignore", strict=True, defer_build=True)
    renamed: ClassVar[Mapping[str, str]] = {}
    """The family's own key -> the key that all families share."""
    norm: ClassVar[Norm] = "rms"
    norm_vectors: ClassVar[NormVectors] = 1

    @classmethod
    def read(cls, config: Mapping[str, Any], model_type: str) -> Self:
        """Checks a config.

        Raises:
            ModelConfigError: If a value is missing, of the wrong type or out of bounds; names the user's key.
        """
        foreign = {*cls.renamed, *cls.renamed.values()} - _ATTRIBUTES
        own = {key: config[key] for key in config if key not in foreign}
        written = {new: old for old, new in cls.renamed.items() if old in config and new not in own}
        own |= {new: config[old] for new, old in written.items()}
        try:
            return cls.model_validate(own)
        except ValidationError as error:
            first = error.errors()[0]
            head, *rest = (str(part) for part in first["loc"])
            key = ".".join([written.get(head, head), *rest])
            value = reprlib.repr(first["input"])
            raise ModelConfigError(f"{model_type} config: {key} is {value}: {first['msg'].lower()}.") from None

    @abstractmethod
    def architecture(self, model_type: str, dtype: str, quantization: Quantization | None) -> Architecture:
        """The numbers that costs depend on."""


class DecoderConfig(FamilyConfig):
    """A decoder whose blocks are a norm, an attention, a norm and an MLP; a family sets what is different."""

    gated: ClassVar[bool] = True
    biases: ClassVar[Biases] = Biases()
    qk_norm: ClassVar[QkNorm] = "none"
    attention_norms: ClassVar[int] = 1
    mlp_norms: ClassVar[int] = 1
    parallel: ClassVar[bool] = False
    head_bias: ClassVar[bool] = False
    reads_head_dim: ClassVar[bool] = True
    """Whether the family's model looks at ``head_dim``, or always divides the hidden size."""
    reads_kv_heads: ClassVar[bool] = True
    """Whether it looks at ``num_key_value_heads``, or always has as many as queries."""

    vocab_size: Width = 32000
    hidden_size: Width = 4096
    intermediate_size: Width | None = 11008
    num_hidden_layers: Depth = 32
    num_attention_heads: Width = 32
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Length = 2048
    tie_word_embeddings: bool = False

    def has_bias(self, key: bool | str) -> bool:
        """What an entry of `Biases` comes to in this config."""
        return bool(getattr(self, key)) if isinstance(key, str) else key

    def query_key_norm(self) -> QkNorm:
        """Norms on queries and keys."""
        return self.qk_norm

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block."""
        return (None,) * self.num_hidden_layers

    def cache_window(self, window: int | None) -> int | None:
        """Positions that transformers' cache keeps of a block: the window without the token that is coming."""
        return None if window is None else window - 1 or None

    def attention(self, index: int, window: int | None) -> Attention:
        """Attention of a block."""
        del index
        kv_heads = self.kv_heads()
        if self.num_attention_heads % kv_heads:
            raise ModelConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}; correct one of them."
            )
        head_dim = (self.head_dim if self.reads_head_dim else None) or self.divided_head_dim()
        return Attention(
            num_heads=self.num_attention_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=head_dim,
            qkv_bias=self.has_bias(self.biases.qkv),
            output_bias=self.has_bias(self.biases.output),
            qk_norm=self.query_key_norm(),
            window=window,
            cache_window=self.cache_window(window),
            causal=self.causal(),
        )

    def kv_heads(self) -> int:
        """Key and value heads."""
        return (self.num_key_value_heads if self.reads_kv_heads else None) or self.num_attention_heads

    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return True

    def divided_head_dim(self) -> int:
        """The hidden size shared out among the heads."""
        if self.hidden_size % self.num_attention_heads:
            raise ModelConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and head_dim is not given; correct one of the three."
            )
        return self.hidden_size // self.num_attention_heads

    def mlp(self, index: int) -> Mlp | Experts:
        """Second half of a block."""
        del index
        inner = self.intermediate_size or 4 * self.hidden_size
        return self.dense_mlp(inner)

    def dense_mlp(self, inner: int, *, gated: bool | None = None) -> Mlp:
        """A feed-forward network of that inner width, with the family's biases and activation."""
        matrices: Literal[2, 3] = 3 if (self.gated if gated is None else gated) else 2
        return Mlp(inner=inner, matrices=matrices, bias=self.has_bias(self.biases.mlp), activation=self.hidden_act)

    def block(self, index: int, window: int | None) -> Block:
        """A block, with the norms it has."""
        return Block(
            attention=self.attention(index, window),
            mlp=self.mlp(index),
            attention_norms=self.attention_norms,
            mlp_norms=self.mlp_norms,
            parallel=self.parallel,
        )

    def embedding(self) -> Embedding:
        """First layer."""
        return Embedding(rows=self.vocab_size, width=self.hidden_size, shared=self.shared())

    def head(self) -> Head:
        """Last layer."""
        return Head(rows=self.vocab_size, width=self.hidden_size, shared=self.shared(), bias=self.head_bias)

    def shared(self) -> str | None:
        """What embedding and head share."""
        return "embedding" if self.tie_word_embeddings else None

    def positions(self) -> int | None:
        """Longest sequence."""
        return self.max_position_embeddings

    def vectors(self) -> NormVectors:
        """Vectors of each norm."""
        return self.norm_vectors

    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block."""
        return True

    def architecture(self, model_type: str, dtype: str, quantization: Quantization | None) -> Architecture:
        """The numbers that costs depend on."""
        blocks = each(self.block(index, window) for index, window in enumerate(self.windows()))
        return Architecture(
            model_type=model_type,
            dtype=dtype,
            quantization=quantization,
            hidden_size=self.hidden_size,
            embedding=self.embedding(),
            blocks=blocks,
            head=self.head(),
            final_norm=self.has_final_norm(),
            norm=self.norm,
            norm_vectors=self.vectors(),
            max_positions=self.positions(),
        )


class WindowedConfig(DecoderConfig):
    """A decoder whose blocks all see a window alone, if one is given."""

    sliding_window: Length | None = None

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block."""
        return (self.sliding_window,) * self.num_hidden_layers


class SlidingConfig(DecoderConfig):
    """A decoder of which some blocks see a window alone, by ``layer_types`` or by a pattern."""

    sliding_window: Length | None = 4096
    layer_types: list[str] | None = None

    @abstractmethod
    def slides(self, index: int) -> bool:
        """Whether a block slides where ``layer_types`` does not say."""

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block."""
        window = self.sliding_window
        slides = self.listed_slides()
        if slides is None:
            slides = [window is not None and self.slides(index) for index in range(self.num_hidden_layers)]
        if window is None and any(slides):
            raise ModelConfigError(
                f"layer_types asks for sliding_attention in block {slides.index(True)}, but sliding_window is null; "
                "give it, or make the block full_attention."
            )
        return tuple(window if slide else None for slide in slides)

    def listed_slides(self) -> list[bool] | None:
        """Whether each block slides by ``layer_types``; None if it is not given."""
        if self.layer_types is None:
            return None
        if len(self.layer_types) != self.num_hidden_layers:
            raise ModelConfigError(
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers; give one each."
            )
        for index, kind in enumerate(self.layer_types):
            if kind not in _KINDS:
                raise ModelConfigError(
                    f"layer_types has {reprlib.repr(kind)} for block {index}; "
                    "known are full_attention and sliding_attention."
                )
        return [_KINDS[kind] for kind in self.layer_types]


def each(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks, equal ones as one object."""
    distinct: dict[Block, Block] = {}
    return tuple(distinct.setdefault(block, block) for block in blocks)
