"""Decoders whose attention compresses keys and values to a latent that all heads share (DeepSeek)."""

from collections.abc import Mapping
from typing import ClassVar

from lp_plugin.model.architecture import Attention
from lp_plugin.model.families.base import Biases, Depth, FamilyConfig, Width
from lp_plugin.model.families.moe import SharedExpertsConfig

__all__ = ["READERS"]


class DeepSeekV2(SharedExpertsConfig):
    """Latent attention, experts after the first blocks.

    transformers' cache keeps the latents and the rotated part of the key, not the heads they are expanded to.
    """

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias", mlp="mlp_bias")
    vocab_size: Width = 102400
    num_experts: Width = 64
    num_experts_per_tok: Width | None = None
    moe_intermediate_size: Width | None = 1407
    n_shared_experts: Width = 2
    attention_bias: bool = False
    mlp_bias: bool = False
    kv_lora_rank: Width = 512
    q_lora_rank: Width | None = 1536
    qk_nope_head_dim: Width = 128
    qk_rope_head_dim: Width = 64
    v_head_dim: Width = 128

    def attention(self, index: int, window: int | None) -> Attention:
        """Latent."""
        del index
        return Attention(
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_heads,
            head_dim=self.qk_nope_head_dim + self.qk_rope_head_dim,
            value_dim=self.v_head_dim,
            query_rank=self.q_lora_rank,
            kv_rank=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
            qkv_bias=self.attention_bias,
            output_bias=self.attention_bias,
            window=window,
        )


class DeepSeekV3(DeepSeekV2):
    """No biases on MLPs."""

    biases: ClassVar[Biases] = Biases(qkv="attention_bias", output="attention_bias")
    vocab_size: Width = 129280
    hidden_size: Width = 7168
    intermediate_size: Width | None = 18432
    num_hidden_layers: Depth = 61
    num_attention_heads: Width = 128
    max_position_embeddings: Width = 4096
    num_experts: Width = 256
    num_experts_per_tok: Width | None = 8
    moe_intermediate_size: Width | None = 2048
    n_shared_experts: Width = 1
    first_k_dense_replace: int | None = 3


READERS: Mapping[str, type[FamilyConfig]] = {"deepseek_v2": DeepSeekV2, "deepseek_v3": DeepSeekV3}
"""``model_type`` -> how its config is read."""
