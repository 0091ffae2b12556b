"""Encoder-decoders: T5, BART and their relatives."""

from collections.abc import Mapping
from typing import ClassVar

from lp_plugin.errors import ModelConfigError
from lp_plugin.model.architecture import Architecture, Attention, Block, Embedding, Head, Mlp, Norm, NormVectors
from lp_plugin.model.families.base import Depth, FamilyConfig, Length, Width, each
from lp_plugin.model.quantization import Quantization

__all__ = ["READERS"]


class T5(FamilyConfig):
    """RMSNorms; relative positions from a table that the first block of each half holds."""

    renamed: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    }
    vocab_size: Width = 32128
    hidden_size: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_hidden_layers: Depth = 6
    num_decoder_layers: Depth | None = None
    num_attention_heads: Width = 8
    relative_attention_num_buckets: Width = 32
    feed_forward_proj: str = "relu"

    def attention(self, index: int, *, causal: bool, buckets: bool = True) -> Attention:
        """Attention of a block."""
        return Attention(
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_heads,
            head_dim=self.d_kv,
            value_dim=self.d_kv,
            position_buckets=self.relative_attention_num_buckets if buckets and index == 0 else 0,
            causal=causal,
        )

    def mlp(self) -> Mlp:
        """Gated or not, by the name of the activation."""
        kind, _, gated = self.feed_forward_proj.partition("-")
        if gated and kind != "gated":
            raise ModelConfigError(
                f"feed_forward_proj is {self.feed_forward_proj!r}; give an activation, or gated- and an activation."
            )
        activation = {"gated-gelu": "gelu_new"}.get(self.feed_forward_proj, gated or kind)
        return Mlp(inner=self.d_ff, matrices=3 if gated else 2, activation=activation)

    def architecture(self, model_type: str, dtype: str, quantization: Quantization | None) -> Architecture:
        """Embedding and head are one table, whatever the config says of that."""
        mlp = self.mlp()
        table = Embedding(rows=self.vocab_size, width=self.hidden_size, shared="embedding")
        return Architecture(
            model_type=model_type,
            dtype=dtype,
            quantization=quantization,
            hidden_size=self.hidden_size,
            embedding=table,
            encoder_blocks=each(
                Block(attention=self.attention(index, causal=False), mlp=mlp) for index in range(self.num_hidden_layers)
            ),
            decoder_embedding=table,
            blocks=each(
                Block(
                    attention=self.attention(index, causal=True),
                    cross=self.attention(index, causal=False, buckets=False),
                    mlp=mlp,
                    attention_norms=2,
                )
                for index in range(self.num_decoder_layers or self.num_hidden_layers)
            ),
            head=Head(rows=self.vocab_size, width=self.hidden_size, shared="embedding"),
        )


class MT5(T5):
    """Gated."""

    vocab_size: Width = 250112
    d_ff: Width = 1024
    num_hidden_layers: Depth = 8
    num_attention_heads: Width = 6
    feed_forward_proj: str = "gated-gelu"


class Bart(FamilyConfig):
    """Norms after the halves and on the embeddings; tables of two rows more than positions."""

    renamed: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "encoder_layers": "num_hidden_layers",
        "encoder_attention_heads": "num_attention_heads",
    }
    norm: ClassVar[Norm] = "layer"
    norm_vectors: ClassVar[NormVectors] = 2
    final_norm: ClassVar[bool] = False
    embedding_norm: ClassVar[int] = 2
    extra_positions: ClassVar[int | None] = 2
    """Rows of the table beyond the positions; None if there is no table."""

    vocab_size: Width = 50265
    max_position_embeddings: Width = 1024
    hidden_size: Width = 1024
    num_hidden_layers: Depth = 12
    encoder_ffn_dim: Width = 4096
    num_attention_heads: Width = 16
    decoder_layers: Depth = 12
    decoder_ffn_dim: Width = 4096
    decoder_attention_heads: Width = 16
    activation_function: str = "gelu"
    tie_word_embeddings: bool = True

    def attention(self, heads: int, *, causal: bool) -> Attention:
        """Attention of a block."""
        if self.hidden_size % heads:
            raise ModelConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of {heads} heads; correct one of them."
            )
        width = self.hidden_size // heads
        return Attention(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width,
            value_dim=width,
            qkv_bias=True,
            output_bias=True,
            causal=causal,
        )

    def mlp(self, inner: int) -> Mlp:
        """With biases."""
        return Mlp(inner=inner, matrices=2, bias=True, activation=self.activation_function)

    def embedding(self, rows: int, shared: str | None) -> Embedding:
        """Of the encoder or of the decoder."""
        extra = self.extra_positions
        return Embedding(
            rows=rows,
            width=self.hidden_size,
            shared=shared,
            positions=0 if extra is None else self.max_position_embeddings + extra,
            norm_vectors=self.embedding_norm,
        )

    def tables(self) -> tuple[Embedding, Embedding, Head]:
        """The encoder's and the decoder's embedding and the head, which are one table."""
        if not self.tie_word_embeddings:
            raise ModelConfigError(
                "tie_word_embeddings is false, but the family has one table for encoder, decoder and head; "
                "set it to true."
            )
        table = self.embedding(self.vocab_size, "embedding")
        return table, table, Head(rows=self.vocab_size, width=self.hidden_size, shared="embedding")

    def architecture(self, model_type: str, dtype: str, quantization: Quantization | None) -> Architecture:
        """The numbers that costs depend on."""
        source, target, head = self.tables()
        encoder = Block(
            attention=self.attention(self.num_attention_heads, causal=False),
            mlp=self.mlp(self.encoder_ffn_dim),
        )
        decoder = Block(
            attention=self.attention(self.decoder_attention_heads, causal=True),
            cross=self.attention(self.decoder_attention_heads, causal=False),
            mlp=self.mlp(self.decoder_ffn_dim),
            attention_norms=2,
        )
        return Architecture(
            model_type=model_type,
            dtype=dtype,
            quantization=quantization,
            hidden_size=self.hidden_size,
            embedding=source,
            encoder_blocks=(encoder,) * self.num_hidden_layers,
            decoder_embedding=target,
            blocks=(decoder,) * self.decoder_layers,
            head=head,
            final_norm=self.final_norm,
            norm=self.norm,
            norm_vectors=self.norm_vectors,
            max_positions=self.max_position_embeddings,
        )


class MBart(Bart):
    """Norms before the halves, too, and after the last block."""

    final_norm: ClassVar[bool] = True


class Pegasus(Bart):
    """Norms before the halves; a table of positions that is computed, but stored."""

    final_norm: ClassVar[bool] = True
    embedding_norm: ClassVar[int] = 0
    extra_positions: ClassVar[int | None] = 0


class M2M100(Pegasus):
    """Positions are computed, and not stored."""

    extra_positions: ClassVar[int | None] = None
    vocab_size: Width = 128112
    max_position_embeddings: Length = 1024
    activation_function: str = "relu"


class Marian(Bart):
    """Norms after the halves alone; encoder and decoder may have vocabularies of their own."""

    embedding_norm: ClassVar[int] = 0
    extra_positions: ClassVar[int | None] = 0
    vocab_size: Width = 58101
    decoder_vocab_size: Width | None = None
    share_encoder_decoder_embeddings: bool = True

    def tables(self) -> tuple[Embedding, Embedding, Head]:
        """One table for all, or one for the encoder and one for decoder and head."""
        if self.share_encoder_decoder_embeddings:
            return super().tables()
        rows = self.decoder_vocab_size or self.vocab_size
        key = "decoder embedding" if self.tie_word_embeddings else None
        return (
            self.embedding(self.vocab_size, None),
            self.embedding(rows, key),
            Head(rows=rows, width=self.hidden_size, shared=key),
        )


READERS: Mapping[str, type[FamilyConfig]] = {
    "bart": Bart,
    "m2m_100": M2M100,
    "marian": Marian,
    "mbart": MBart,
    "mt5": MT5,
    "pegasus": Pegasus,
    "t5": T5,
}
"""``model_type`` -> how its config is read."""
