"""Decoders whose MLP has two matrices, in sequence or in parallel; those after GPT-2's keys are in `gpt`."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from lp_plugin.errors import ModelConfigError
from lp_plugin.model.architecture import Attention, Block, Embedding, Head, Mlp, Norm, NormVectors, QkNorm
from lp_plugin.model.families.base import Biases, DecoderConfig, Depth, FamilyConfig, Length, Width, WindowedConfig

__all__ = ["EVERYWHERE", "READERS", "PlainConfig"]

EVERYWHERE = Biases(qkv=True, output=True, mlp=True)


class PlainConfig(DecoderConfig):
    """LayerNorms with biases, an MLP that is not gated."""

    norm: ClassVar[Norm] = "layer"
    norm_vectors: ClassVar[NormVectors] = 2
    gated: ClassVar[bool] = False
    reads_head_dim: ClassVar[bool] = False
    reads_kv_heads: ClassVar[bool] = False
    hidden_act: str = "gelu"


class Starcoder2(PlainConfig, WindowedConfig):
    """Grouped queries."""

    biases: ClassVar[Biases] = Biases(qkv="use_bias", output="use_bias", mlp="use_bias")
    reads_head_dim: ClassVar[bool] = True
    reads_kv_heads: ClassVar[bool] = True
    vocab_size: Width = 49152
    hidden_size: Width = 3072
    intermediate_size: Width | None = 12288
    num_hidden_layers: Depth = 30
    num_attention_heads: Width = 24
    num_key_value_heads: Width | None = 2
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Length = 4096
    tie_word_embeddings: bool = True
    use_bias: bool = True


class Nemotron(PlainConfig):
    """LayerNorms whose weight is stored less one; squared ReLU."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias", mlp="mlp_bias")
    reads_head_dim: ClassVar[bool] = True
    reads_kv_heads: ClassVar[bool] = True
    vocab_size: Width = 256000
    hidden_size: Width = 6144
    intermediate_size: Width | None = 24576
    num_attention_heads: Width = 48
    hidden_act: str = "relu2"
    max_position_embeddings: Length = 4096
    attention_bias: bool = False
    mlp_bias: bool = False


class Arcee(DecoderConfig):
    """Llama with squared ReLU in place of the gate."""

    gated: ClassVar[bool] = False
    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias", mlp="mlp_bias")
    hidden_size: Width = 2560
    intermediate_size: Width | None = 18432
    hidden_act: str = "relu2"
    max_position_embeddings: Length = 4096
    attention_bias: bool = False
    mlp_bias: bool = False


class GPTNeoX(PlainConfig):
    """Attention and MLP in parallel, each after a norm of its own, or in sequence."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias", mlp=True)
    vocab_size: Width = 50432
    hidden_size: Width = 6144
    intermediate_size: Width | None = 24576
    num_hidden_layers: Depth = 44
    num_attention_heads: Width = 64
    attention_bias: bool = True
    use_parallel_residual: bool = True

    def block(self, index: int, window: int | None) -> Block:
        """In parallel or in sequence."""
        return dataclasses.replace(super().block(index, window), parallel=self.use_parallel_residual)


class Phi(PlainConfig):
    """Attention and MLP in parallel after one norm; a bias even on the head."""

    biases: ClassVar[Biases] = EVERYWHERE
    parallel: ClassVar[bool] = True
    mlp_norms: ClassVar[int] = 0
    head_bias: ClassVar[bool] = True
    reads_head_dim: ClassVar[bool] = True
    reads_kv_heads: ClassVar[bool] = True
    vocab_size: Width = 51200
    hidden_size: Width = 2048
    intermediate_size: Width | None = 8192
    num_hidden_layers: Depth = 24
    hidden_act: str = "gelu_new"
    qk_layernorm: bool = False

    def query_key_norm(self) -> QkNorm:
        """One that all heads share, if asked for."""
        return "head" if self.qk_layernorm else "none"

    def attention(self, index: int, window: int | None) -> Attention:
        """The norms on queries and keys have biases, too."""
        return dataclasses.replace(super().attention(index, window), qk_norm_vectors=2)


class Opt(PlainConfig):
    """Tables of two rows more than positions; a narrower vocabulary in one size; norms after the halves in it."""

    renamed: ClassVar[Mapping[str, str]] = {
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "_remove_final_layer_norm": "remove_final_layer_norm",
    }
    biases: ClassVar[Biases] = Biases(qkv="enable_bias", output="enable_bias", mlp="enable_bias")
    vocab_size: Width = 50272
    hidden_size: Width = 768
    intermediate_size: Width | None = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    hidden_act: str = "relu"
    max_position_embeddings: Width = 2048
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    word_embed_proj_dim: Width | None = None
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True

    def embedding(self) -> Embedding:
        """Tokens of their own width, projected, and positions."""
        width = self.word_embed_proj_dim or self.hidden_size
        return Embedding(
            rows=self.vocab_size,
            width=width,
            shared=self.shared(),
            positions=self.max_position_embeddings + 2,
            late_positions=True,
            projection=width != self.hidden_size,
        )

    def head(self) -> Head:
        """Projected back first."""
        width = self.word_embed_proj_dim or self.hidden_size
        return Head(rows=self.vocab_size, width=width, shared=self.shared(), projection=width != self.hidden_size)

    def vectors(self) -> NormVectors:
        """None if norms have no parameters."""
        return 2 if self.layer_norm_elementwise_affine else 0

    def has_final_norm(self) -> bool:
        """None if norms come after the halves."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm


class Falcon(PlainConfig):
    """Old and new: one key head or groups, in sequence or in parallel after one or two norms."""

    renamed: ClassVar[Mapping[str, str]] = {
        "ffn_hidden_size": "intermediate_size",
        "num_kv_heads": "num_key_value_heads",
        "activation": "hidden_act",
        "n_embed": "hidden_size",
    }
    biases: ClassVar[Biases] = Biases(qkv="bias", output="bias", mlp="bias")
    vocab_size: Width = 65024
    hidden_size: Width = 4544
    intermediate_size: Width | None = None
    num_attention_heads: Width = 71
    tie_word_embeddings: bool = True
    new_decoder_architecture: bool | None = False
    multi_query: bool | None = True
    parallel_attn: bool | None = True
    num_ln_in_parallel_attn: int | None = None
    bias: bool | None = False

    def kv_heads(self) -> int:
        """Groups in the new architecture, one or all in the old."""
        if self.new_decoder_architecture:
            return self.num_key_value_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads

    def attention(self, index: int, window: int | None) -> Attention:
        """The new architecture repeats keys and values for every query head before it caches them."""
        repeated = self.num_attention_heads if self.new_decoder_architecture else None
        return dataclasses.replace(super().attention(index, window), cached_heads=repeated)

    def block(self, index: int, window: int | None) -> Block:
        """In parallel after one norm or two, or in sequence."""
        block = super().block(index, window)
        if not self.parallel_attn:
            if self.new_decoder_architecture:
                raise ModelConfigError(
                    "falcon config: new_decoder_architecture is true, but parallel_attn is false; transformers can't "
                    "run that, set parallel_attn to true."
                )
            return block
        norms = self.num_ln_in_parallel_attn
        both = norms == 2 or (norms is None and bool(self.new_decoder_architecture))
        return dataclasses.replace(block, parallel=True, mlp_norms=int(both))


class Bloom(PlainConfig):
    """Positions by ALiBi, without a limit; a norm on the embedding."""

    renamed: ClassVar[Mapping[str, str]] = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embed": "hidden_size",
    }
    biases: ClassVar[Biases] = EVERYWHERE
    vocab_size: Width = 250880
    hidden_size: Width = 64
    intermediate_size: Width | None = None
    num_hidden_layers: Depth = 2
    num_attention_heads: Width = 8
    tie_word_embeddings: bool = True

    def mlp(self, index: int) -> Mlp:
        """Four times the hidden size."""
        del index
        return self.dense_mlp(4 * self.hidden_size)

    def embedding(self) -> Embedding:
        """With a norm."""
        return dataclasses.replace(super().embedding(), norm_vectors=2)

    def positions(self) -> int | None:
        """No limit."""
        return None


class Mpt(PlainConfig):
    """No biases at all, not even in norms; positions by ALiBi."""

    renamed: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
    }
    norm_vectors: ClassVar[NormVectors] = 1
    vocab_size: Width = 50368
    hidden_size: Width = 2048
    num_hidden_layers: Depth = 24
    num_attention_heads: Width = 16
    max_position_embeddings: Length = 2048
    tie_word_embeddings: bool = True

    def mlp(self, index: int) -> Mlp:
        """Four times the hidden size."""
        del index
        return self.dense_mlp(4 * self.hidden_size)


READERS: Mapping[str, type[FamilyConfig]] = {
    "arcee": Arcee,
    "bloom": Bloom,
    "falcon": Falcon,
    "gpt_neox": GPTNeoX,
    "mpt": Mpt,
    "nemotron": Nemotron,
    "opt": Opt,
    "phi": Phi,
    "starcoder2": Starcoder2,
}
"""``model_type`` -> how its config is read."""
