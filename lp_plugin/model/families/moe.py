"""Decoders in which some or all blocks have a mixture of experts."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from lp_plugin.errors import ModelConfigError
from lp_plugin.model.architecture import Attention, Experts, Head, Mlp, Norm, NormVectors, QkNorm
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

__all__ = ["READERS", "MixtureConfig"]

_ATTENTION = Biases(qkv="attention_bias", output="attention_bias")


class MixtureConfig(DecoderConfig):
    """A decoder with experts, of ``moe_intermediate_size`` if there is that key, else ``intermediate_size``."""

    renamed: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}
    expert_bias: ClassVar[bool] = False
    num_experts: Width = 8
    num_experts_per_tok: Width | None = 2
    moe_intermediate_size: Width | None = None

    def is_sparse(self, index: int) -> bool:
        """Whether a block has experts."""
        del index
        return True

    def mlp(self, index: int) -> Mlp | Experts:
        """Experts, or the plain MLP where a block has none."""
        dense = self.dense_mlp(self.intermediate_size or 4 * self.hidden_size)
        if not self.is_sparse(index):
            return dense
        if self.num_experts_per_tok is None or self.num_experts_per_tok > self.num_experts:
            raise ModelConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts; "
                f"give 1 to {self.num_experts}."
            )
        return self.experts(dense)

    def experts(self, dense: Mlp) -> Experts:
        """The experts of a block, given what stands in a dense one."""
        return Experts(
            expert=dataclasses.replace(dense, inner=self.moe_intermediate_size or dense.inner, bias=self.expert_bias),
            num_experts=self.num_experts,
            per_token=self.num_experts_per_tok or 1,
        )


class Mixtral(MixtureConfig, WindowedConfig):
    """Experts in every block."""

    intermediate_size: Width | None = 14336
    num_key_value_heads: Width | None = 8
    max_position_embeddings: Length = 4096 * 32


class PhiMoe(MixtureConfig, WindowedConfig):
    """LayerNorms with biases."""

    norm: ClassVar[Norm] = "layer"
    norm_vectors: ClassVar[NormVectors] = 2
    biases: ClassVar[Biases] = _ATTENTION
    vocab_size: Width = 32064
    intermediate_size: Width | None = 6400
    num_key_value_heads: Width | None = 8
    max_position_embeddings: Length = 4096 * 32
    num_experts: Width = 16
    attention_bias: bool = False
    lm_head_bias: bool = False

    def head(self) -> Head:
        """With a bias, if asked for."""
        return dataclasses.replace(super().head(), bias=self.lm_head_bias)


class Olmoe(MixtureConfig):
    """Norms over all heads' queries and keys."""

    qk_norm: ClassVar[QkNorm] = "full"
    biases: ClassVar[Biases] = _ATTENTION
    vocab_size: Width = 50304
    hidden_size: Width = 2048
    intermediate_size: Width | None = 2048
    num_hidden_layers: Depth = 16
    num_attention_heads: Width = 16
    max_position_embeddings: Length = 4096
    num_experts: Width = 64
    num_experts_per_tok: Width | None = 8
    attention_bias: bool = False


class GraniteMoe(MixtureConfig):
    """Experts in every block."""

    biases: ClassVar[Biases] = _ATTENTION
    attention_bias: bool = False


class _QwenMoe(MixtureConfig):
    """Every n-th block has experts, but for those listed."""

    vocab_size: Width = 151936
    hidden_size: Width = 2048
    num_hidden_layers: Depth = 24
    max_position_embeddings: Length = 32768
    use_sliding_window: bool = False
    decoder_sparse_step: Width = 1
    mlp_only_layers: list[int] | None = None

    def is_sparse(self, index: int) -> bool:
        """Every n-th, but for those listed."""
        return index not in (self.mlp_only_layers or ()) and (index + 1) % self.decoder_sparse_step == 0


class Qwen2Moe(_QwenMoe, SlidingConfig):
    """A gated expert that all tokens share."""

    biases: ClassVar[Biases] = Biases(qkv="qkv_bias")
    intermediate_size: Width | None = 5632
    num_attention_heads: Width = 16
    num_key_value_heads: Width | None = 16
    max_window_layers: int = 28
    sliding_window: Annotated[int, Field(ge=0, le=2**31)] | None = 4096
    num_experts: Width = 60
    num_experts_per_tok: Width | None = 4
    moe_intermediate_size: Width | None = 1408
    shared_expert_intermediate_size: Width = 5632
    qkv_bias: bool = True

    def slides(self, index: int) -> bool:
        """Even blocks before ``max_window_layers``."""
        return index % 2 == 0 and index < self.max_window_layers

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block; none unless windows are used, which a window of 0 says, too."""
        if not self.use_sliding_window or not self.sliding_window:
            self.listed_slides()
            return (None,) * self.num_hidden_layers
        return super().windows()

    def experts(self, dense: Mlp) -> Experts:
        """With the shared one."""
        shared = dataclasses.replace(dense, inner=self.shared_expert_intermediate_size)
        return dataclasses.replace(super().experts(dense), shared=shared, shared_gate=True)


class Qwen3Moe(_QwenMoe, WindowedConfig):
    """Norms on queries and keys; a window in every block, if used."""

    qk_norm: ClassVar[QkNorm] = "head"
    biases: ClassVar[Biases] = _ATTENTION
    intermediate_size: Width | None = 6144
    num_key_value_heads: Width | None = 4
    sliding_window: Length | None = 4096
    num_experts: Width = 128
    num_experts_per_tok: Width | None = 8
    moe_intermediate_size: Width | None = 768
    attention_bias: bool = False

    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each block."""
        return super().windows() if self.use_sliding_window else (None,) * self.num_hidden_layers


class GptOss(MixtureConfig, SlidingConfig):
    """Biases everywhere, sinks, every other block slides."""

    biases: ClassVar[Biases] = _ATTENTION
    expert_bias: ClassVar[bool] = True
    vocab_size: Width = 201088
    hidden_size: Width = 2880
    intermediate_size: Width | None = 2880
    num_hidden_layers: Depth = 36
    num_attention_heads: Width = 64
    num_key_value_heads: Width | None = 8
    head_dim: Width | None = 64
    max_position_embeddings: Length = 131072
    sliding_window: Length | None = 128
    num_experts: Width = 128
    num_experts_per_tok: Width | None = 4
    attention_bias: bool = True

    def slides(self, index: int) -> bool:
        """Even blocks."""
        return index % 2 == 0

    def attention(self, index: int, window: int | None) -> Attention:
        """With sinks."""
        return dataclasses.replace(super().attention(index, window), sinks=True)

    def experts(self, dense: Mlp) -> Experts:
        """With a bias on the router."""
        return dataclasses.replace(super().experts(dense), router_bias=True)


class SharedExpertsConfig(MixtureConfig):
    """Experts that all tokens share, and dense blocks before those with experts."""

    moe_intermediate_size: Width | None = 2048
    n_shared_experts: Width = 1
    first_k_dense_replace: int | None = 0

    def is_sparse(self, index: int) -> bool:
        """All but the first."""
        return index >= (self.first_k_dense_replace or 0)

    def experts(self, dense: Mlp) -> Experts:
        """With the shared ones, as one MLP of their widths together."""
        mixture = super().experts(dense)
        shared = dataclasses.replace(dense, inner=mixture.expert.inner * self.n_shared_experts)
        return dataclasses.replace(mixture, shared=shared)


class Glm4Moe(SharedExpertsConfig):
    """Norms on queries and keys, if asked for."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias")
    vocab_size: Width = 151552
    intermediate_size: Width | None = 10944
    num_hidden_layers: Depth = 46
    num_attention_heads: Width = 96
    num_key_value_heads: Width | None = 8
    max_position_embeddings: Length = 131072
    num_experts: Width = 128
    num_experts_per_tok: Width | None = 8
    moe_intermediate_size: Width | None = 1408
    first_k_dense_replace: int | None = 1
    attention_bias: bool = False
    use_qk_norm: bool = False

    def query_key_norm(self) -> QkNorm:
        """One that all heads share, if asked for."""
        return "head" if self.use_qk_norm else "none"

    def divided_head_dim(self) -> int:
        """Rounded down, as transformers does."""
        return max(1, self.hidden_size // self.num_attention_heads)


READERS: Mapping[str, type[FamilyConfig]] = {
    "glm4_moe": Glm4Moe,
    "gpt_oss": GptOss,
    "granitemoe": GraniteMoe,
    "mixtral": Mixtral,
    "olmoe": Olmoe,
    "phimoe": PhiMoe,
    "qwen2_moe": Qwen2Moe,
    "qwen3_moe": Qwen3Moe,
}
"""``model_type`` -> how its config is read."""
