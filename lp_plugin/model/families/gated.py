"""Decoders with a gated MLP: Llama and those after it."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from lp_plugin.model.architecture import Block, Norm, NormVectors, QkNorm
from lp_plugin.model.families.base import (
    Biases,
    DecoderConfig,
    Depth,
    FamilyConfig,
    Length,
    SlidingConfig,
    Width,
    WindowedConfig,
)

__all__ = ["READERS"]


class Llama(DecoderConfig):
    """The plain one."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias", mlp="mlp_bias")
    attention_bias: bool = False
    mlp_bias: bool = False


class Mistral(WindowedConfig):
    """A window in every block."""

    intermediate_size: Width | None = 14336
    num_key_value_heads: Width | None = 8
    max_position_embeddings: Length = 4096 * 32
    sliding_window: Length | None = 4096


class Phi3(WindowedConfig):
    """Packed matrices of the same total size."""

    vocab_size: Width = 32064
    hidden_size: Width = 3072
    intermediate_size: Width | None = 8192
    max_position_embeddings: Length = 4096


class Qwen2(SlidingConfig):
    """Windows, if used, in the blocks from ``max_window_layers`` on."""

    biases: ClassVar[Biases] = Biases(qkv=True)
    vocab_size: Width = 151936
    intermediate_size: Width | None = 22016
    num_key_value_heads: Width | None = 32
    max_position_embeddings: Length = 32768
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def slides(self, index: int) -> bool:
        """Later blocks."""
        return index >= self.max_window_layers

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block; none unless windows are used."""
        if not self.use_sliding_window:
            self.listed_slides()
            return (None,) * self.num_hidden_layers
        return super().windows()


class Qwen3(Qwen2):
    """Norms on queries and keys in place of biases."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias")
    qk_norm: ClassVar[QkNorm] = "head"
    head_dim: Width | None = 128
    attention_bias: bool = False


class _AttentionBias(DecoderConfig):
    """One key for a bias on all of attention."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias")
    attention_bias: bool = False


class Gemma(_AttentionBias):
    """Wide heads, tied embeddings."""

    vocab_size: Width = 256000
    hidden_size: Width = 3072
    intermediate_size: Width | None = 24576
    num_hidden_layers: Depth = 28
    num_attention_heads: Width = 16
    num_key_value_heads: Width | None = 16
    head_dim: Width | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Length = 8192
    tie_word_embeddings: bool = True
    use_bidirectional_attention: bool | None = False

    def causal(self) -> bool:
        """False for a Gemma that was made into an encoder."""
        return not self.use_bidirectional_attention


class Gemma2(Gemma, SlidingConfig):
    """Every other block slides; a norm before and after each half."""

    renamed: ClassVar[Mapping[str, str]] = {"hidden_activation": "hidden_act"}
    attention_norms: ClassVar[int] = 2
    mlp_norms: ClassVar[int] = 2
    hidden_size: Width = 2304
    intermediate_size: Width | None = 9216
    num_hidden_layers: Depth = 26
    num_attention_heads: Width = 8
    num_key_value_heads: Width | None = 4

    def slides(self, index: int) -> bool:
        """Even blocks."""
        return index % 2 == 0


class Gemma3(Gemma2):
    """Five blocks slide, the sixth does not; norms on queries and keys."""

    qk_norm: ClassVar[QkNorm] = "head"
    vocab_size: Width = 262_208
    max_position_embeddings: Length = 131_072
    sliding_window_pattern: Width = 6

    def slides(self, index: int) -> bool:
        """All but every sixth."""
        return (index + 1) % self.sliding_window_pattern != 0


class Glm(DecoderConfig):
    """Biases on query, key and value."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias")
    vocab_size: Width = 151552
    intermediate_size: Width | None = 13696
    num_hidden_layers: Depth = 40
    num_key_value_heads: Width | None = 2
    head_dim: Width | None = 128
    max_position_embeddings: Length = 131072
    attention_bias: bool = True


class Glm4(Glm):
    """A norm before and after each half."""

    attention_norms: ClassVar[int] = 2
    mlp_norms: ClassVar[int] = 2


class Olmo(_AttentionBias):
    """LayerNorms without parameters."""

    norm: ClassVar[Norm] = "layer"
    norm_vectors: ClassVar[NormVectors] = 0
    vocab_size: Width = 50304


class Olmo2(_AttentionBias):
    """Norms after each half, and over all heads' queries and keys."""

    qk_norm: ClassVar[QkNorm] = "full"
    vocab_size: Width = 50304


class Olmo3(Olmo2, SlidingConfig):
    """Three blocks slide, the fourth does not."""

    def slides(self, index: int) -> bool:
        """All but every fourth."""
        return (index + 1) % 4 != 0


class SmolLM3(Llama, SlidingConfig):
    """Windows, if used, in the blocks without rotary positions."""

    vocab_size: Width = 128256
    hidden_size: Width = 2048
    num_hidden_layers: Depth = 36
    num_attention_heads: Width = 16
    num_key_value_heads: Width | None = 4
    max_position_embeddings: Length = 32768
    tie_word_embeddings: bool = True
    sliding_window: Length | None = None
    use_sliding_window: bool = False
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Width = 4

    def slides(self, index: int) -> bool:
        """Blocks without rotary positions."""
        if self.no_rope_layers is not None and index < len(self.no_rope_layers):
            return self.use_sliding_window and not self.no_rope_layers[index]
        return self.use_sliding_window and (index + 1) % self.no_rope_layer_interval == 0


class Exaone4(SlidingConfig):
    """Three blocks slide, the fourth does not; norms after each half, and on queries and keys."""

    qk_norm: ClassVar[QkNorm] = "head"
    vocab_size: Width = 102400
    intermediate_size: Width | None = 16384
    num_key_value_heads: Width | None = 32
    sliding_window_pattern: int | str | None = 4

    def slides(self, index: int) -> bool:
        """All but the last of a pattern; a pattern in letters is spelled out by ``layer_types``."""
        pattern = self.sliding_window_pattern
        return not isinstance(pattern, int) or pattern < 1 or (index + 1) % pattern != 0


class Ernie(DecoderConfig):
    """One key for all biases."""

    biases: ClassVar[Biases] = Biases(qkv="use_bias", output="use_bias", mlp="use_bias")
    vocab_size: Width = 103424
    hidden_size: Width = 1024
    intermediate_size: Width | None = 3072
    num_hidden_layers: Depth = 18
    num_attention_heads: Width = 16
    num_key_value_heads: Width | None = 2
    head_dim: Width | None = 128
    max_position_embeddings: Length = 131072
    tie_word_embeddings: bool = True
    use_bias: bool = False


class SeedOss(DecoderConfig):
    """A key for each kind of bias."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_out_bias", mlp="mlp_bias")
    vocab_size: Width = 155136
    intermediate_size: Width | None = 27648
    num_hidden_layers: Depth = 64
    num_attention_heads: Width = 80
    num_key_value_heads: Width | None = 8
    head_dim: Width | None = 128
    max_position_embeddings: Length = 524288
    attention_bias: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = False


class StableLm(DecoderConfig):
    """LayerNorms; attention and MLP in sequence, or in parallel after one norm."""

    norm: ClassVar[Norm] = "layer"
    norm_vectors: ClassVar[NormVectors] = 2
    biases: ClassVar[Biases] = Biases(qkv="use_qkv_bias")
    reads_head_dim: ClassVar[bool] = False
    vocab_size: Width = 50304
    hidden_size: Width = 2560
    intermediate_size: Width | None = 6912
    num_key_value_heads: Width | None = 32
    max_position_embeddings: Length = 4096
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False

    def query_key_norm(self) -> QkNorm:
        """One for each head, if asked for."""
        return "full" if self.qk_layernorm else "none"

    def block(self, index: int, window: int | None) -> Block:
        """In parallel, both halves read one norm."""
        block = super().block(index, window)
        return dataclasses.replace(block, parallel=True, mlp_norms=0) if self.use_parallel_residual else block


class _CohereBase(_AttentionBias):
    """Attention and MLP in parallel after one LayerNorm without bias."""

    norm: ClassVar[Norm] = "layer"
    parallel: ClassVar[bool] = True
    mlp_norms: ClassVar[int] = 0
    vocab_size: Width = 256000
    hidden_size: Width = 8192
    intermediate_size: Width | None = 22528
    num_hidden_layers: Depth = 40
    num_attention_heads: Width = 64
    max_position_embeddings: Length = 8192
    tie_word_embeddings: bool = True


class Cohere(_CohereBase):
    """Norms on queries and keys, if asked for."""

    use_qk_norm: bool | None = False

    def query_key_norm(self) -> QkNorm:
        """One for each head, if asked for."""
        return "full" if self.use_qk_norm else "none"


class Cohere2(_CohereBase, SlidingConfig):
    """Three blocks slide, the fourth does not."""

    sliding_window_pattern: Width = 4

    def slides(self, index: int) -> bool:
        """All but the last of a pattern."""
        return (index + 1) % self.sliding_window_pattern != 0


READERS: Mapping[str, type[FamilyConfig]] = {
    "cohere": Cohere,
    "cohere2": Cohere2,
    "ernie4_5": Ernie,
    "exaone4": Exaone4,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "glm": Glm,
    "glm4": Glm4,
    "granite": Llama,
    "llama": Llama,
    "mistral": Mistral,
    "olmo": Olmo,
    "olmo2": Olmo2,
    "olmo3": Olmo3,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "seed_oss": SeedOss,
    "smollm3": SmolLM3,
    "stablelm": StableLm,
}
"""``model_type`` -> how its config is read."""
