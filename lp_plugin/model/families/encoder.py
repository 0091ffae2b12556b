"""Encoders with a head that fills in masked tokens."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from lp_plugin.errors import ModelConfigError
from lp_plugin.model.architecture import Block, Embedding, Head, Norm, NormVectors
from lp_plugin.model.families.base import Biases, Depth, FamilyConfig, SlidingConfig, Width
from lp_plugin.model.families.plain import EVERYWHERE, PlainConfig

__all__ = ["READERS"]


class Bert(PlainConfig):
    """Norms after the halves; tables of positions and token types; a head with a matrix and a norm of its own."""

    biases: ClassVar[Biases] = EVERYWHERE
    head_bias: ClassVar[bool] = True
    vocab_size: Width = 30522
    hidden_size: Width = 768
    intermediate_size: Width | None = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    max_position_embeddings: Width = 512
    tie_word_embeddings: bool = True
    type_vocab_size: Width = 2
    is_decoder: bool = False
    add_cross_attention: bool = False

    def causal(self) -> bool:
        """False, unless it was made into a decoder."""
        return self.is_decoder

    def has_final_norm(self) -> bool:
        """Each block ends with one."""
        return False

    def table_width(self) -> int:
        """Width of an embedded token."""
        return self.hidden_size

    def embedding(self) -> Embedding:
        """Tokens, positions, types and a norm."""
        width = self.table_width()
        return Embedding(
            rows=self.vocab_size,
            width=width,
            shared=self.shared(),
            positions=self.max_position_embeddings,
            segments=self.type_vocab_size,
            norm_vectors=2,
            projection=width != self.hidden_size,
            projection_bias=width != self.hidden_size,
        )

    def head(self) -> Head:
        """A matrix, a norm and the table."""
        return Head(
            rows=self.vocab_size,
            width=self.table_width(),
            shared=self.shared(),
            bias=True,
            projection=True,
            projection_bias=True,
            norm_vectors=2,
        )

    def block(self, index: int, window: int | None) -> Block:
        """A decoder's cross-attention is not described."""
        if self.add_cross_attention:
            raise ModelConfigError("add_cross_attention is true; such a model is not described, set it to false.")
        return super().block(index, window)


class XlmRoberta(Bert):
    """Positions start after the padding token's."""

    pad_token_id: int | None = 1

    def positions(self) -> int | None:
        """Rows of the table that tokens can have."""
        return self.max_position_embeddings - (self.pad_token_id or 0) - 1


class Roberta(XlmRoberta):
    """Another vocabulary."""

    vocab_size: Width = 50265


class Electra(Bert):
    """Narrower tables, projected; the head projects back."""

    embedding_size: Width = 128
    hidden_size: Width = 256
    intermediate_size: Width | None = 1024
    num_attention_heads: Width = 4

    def table_width(self) -> int:
        """Width of an embedded token."""
        return self.embedding_size


class DistilBert(Bert):
    """No token types."""

    renamed: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "activation": "hidden_act",
    }
    num_hidden_layers: Depth = 6

    def embedding(self) -> Embedding:
        """Tokens and positions."""
        return dataclasses.replace(super().embedding(), segments=0)


class ModernBert(SlidingConfig):
    """Gated MLPs, rotary positions; of three blocks two look at a window; the first has no norm before attention."""

    renamed: ClassVar[Mapping[str, str]] = {"hidden_activation": "hidden_act"}
    norm: ClassVar[Norm] = "layer"
    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias", mlp="mlp_bias")
    reads_head_dim: ClassVar[bool] = False
    reads_kv_heads: ClassVar[bool] = False
    vocab_size: Width = 50368
    hidden_size: Width = 768
    intermediate_size: Width | None = 1152
    num_hidden_layers: Depth = 22
    num_attention_heads: Width = 12
    hidden_act: str = "gelu"
    max_position_embeddings: Width = 8192
    tie_word_embeddings: bool = True
    local_attention: Width = 128
    global_attn_every_n_layers: Width = 3
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    classifier_bias: bool = False
    decoder_bias: bool = True

    def causal(self) -> bool:
        """False."""
        return False

    def slides(self, index: int) -> bool:
        """All but every n-th, from the first on."""
        return index % self.global_attn_every_n_layers != 0

    def windows(self) -> tuple[int | None, ...]:
        """Half the window lies on each side of a token."""
        listed = self.listed_slides()
        slides = listed if listed is not None else [self.slides(index) for index in range(self.num_hidden_layers)]
        return tuple(self.local_attention if slide else None for slide in slides)

    def block(self, index: int, window: int | None) -> Block:
        """The embedding's norm serves the first block."""
        return dataclasses.replace(super().block(index, window), attention_norms=int(index > 0))

    def embedding(self) -> Embedding:
        """With a norm."""
        return dataclasses.replace(super().embedding(), norm_vectors=self.vectors())

    def vectors(self) -> NormVectors:
        """With a bias, if asked for."""
        return 2 if self.norm_bias else 1

    def head(self) -> Head:
        """A matrix, a norm and the table."""
        return Head(
            rows=self.vocab_size,
            width=self.hidden_size,
            shared=self.shared(),
            bias=self.decoder_bias,
            projection=True,
            projection_bias=self.classifier_bias,
            norm_vectors=self.vectors(),
        )


READERS: Mapping[str, type[FamilyConfig]] = {
    "bert": Bert,
    "camembert": XlmRoberta,
    "distilbert": DistilBert,
    "electra": Electra,
    "modernbert": ModernBert,
    "roberta": Roberta,
    "xlm-roberta": XlmRoberta,
}
"""``model_type`` -> how its config is read."""
