"""The halves of a transformer block counted: attention and MLP, each with its norms and its residual addition.

All is counted for one member of a tensor-parallel group, as `lp_plugin.model.layers` says. A product of `n` inputs and
`m` outputs reads `n` and writes `m` elements per token; query, key and value, read from the same input, read it
once. Of attention no scores are kept or moved, as in FlashAttention (Dao et al., 2022).

What autograd keeps for the backward pass, per token and without dropout: the input of each group of matrices that
read the same; of an RMSNorm its input in float32 and its normalised value, as transformers writes it out in
elementary operations; of a LayerNorm its input; queries, keys, values, output and one float32 per head of
attention; and of the MLP what its activation function needs (`_KEPT`), its product with the other branch if it is
gated, and the input of the last matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lp_plugin.errors import WorkloadError
from lp_plugin.model.architecture import DTYPE_BYTES, Architecture, Attention, Block, Experts, Mlp

__all__ = ["Half", "attention_half", "mlp_half", "norm_saved_bytes"]

_KEPT: Mapping[str, int] = {"relu": 1, "gelu_new": 5, "gelu_fast": 8}
"""Activation function -> inner tensors that autograd keeps, what is handed to the next matrix included. Functions
with a kernel of their own keep input and output, 2; ReLU its output; those written out in elementary operations
more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """Counts of half a block, or of a whole one; elements are of the model's precision."""

    matrices: int = 0
    """Weights in matrices that can be quantised, routed experts left out."""
    plain: int = 0
    """Parameters that are never quantised: biases, norms, routers, sinks."""
    expert_matrices: int = 0
    """Weights in matrices of routed experts."""
    expert_plain: int = 0
    """Biases of routed experts."""
    active: int = 0
    """Weights that each token is multiplied with."""
    traffic: int = 0
    """Elements read and written per token."""
    alive: int = 0
    """Elements per token alive at once."""
    saved_bytes: int = 0
    """Bytes per token that autograd keeps."""
    pair_flops: int = 0
    """FLOPs per query and key."""
    cross_pair_flops: int = 0
    """FLOPs per query and source token."""
    cache: int = 0
    """Elements that the KV cache keeps per token."""
    num_all_reduces: int = 0
    """All-reduces of a hidden state."""


def norm_saved_bytes(architecture: Architecture, width: int) -> int:
    """Bytes per token that autograd keeps of a norm over so many elements."""
    size = DTYPE_BYTES[architecture.dtype]
    if architecture.norm == "rms":
        return width * (4 + size) + 4
    return width * size + 2 * 4


def attention_half(architecture: Architecture, block: Block, group: int) -> Half:
    """Attention of a block, its cross-attention included.

    Args:
        architecture: What the block is of.
        block: The block.
        group: Devices that share it.

    Raises:
        WorkloadError: If heads can't be shared out among the devices.
    """
    hidden, size = architecture.hidden_size, DTYPE_BYTES[architecture.dtype]
    attentions = [block.attention] if block.cross is None else [block.attention, block.cross]
    parts = [
        (_latent if attention.kv_rank is not None else _attention)(architecture, attention, group)
        for attention in attentions
    ]
    norms = block.attention_norms
    inputs = len(parts) * hidden * size
    return Half(
        matrices=sum(part.matrices for part in parts),
        plain=sum(part.plain for part in parts) + norms * architecture.norm_vectors * hidden,
        active=sum(part.active for part in parts),
        traffic=sum(part.traffic + 3 * hidden for part in parts) + norms * 2 * hidden,
        alive=2 * hidden + max(part.alive for part in parts),
        saved_bytes=sum(part.saved_bytes for part in parts) + inputs + norms * norm_saved_bytes(architecture, hidden),
        pair_flops=parts[0].pair_flops,
        cross_pair_flops=sum(part.pair_flops for part in parts[1:]),
        cache=sum(part.cache for part in parts) if block.attention.causal else 0,
        num_all_reduces=len(parts),
    )


def mlp_half(architecture: Architecture, block: Block, group: int) -> Half:
    """MLP of a block, or its experts.

    Args:
        architecture: What the block is of.
        block: The block.
        group: Devices that share it.

    Raises:
        WorkloadError: If an inner width can't be shared out among the devices.
    """
    hidden, size = architecture.hidden_size, DTYPE_BYTES[architecture.dtype]
    part = (
        _experts(architecture, block.mlp, group)
        if isinstance(block.mlp, Experts)
        else _mlp(architecture, block.mlp, group)
    )
    norms = block.mlp_norms
    input_bytes = 0 if block.parallel and norms == 0 else hidden * size  # else attention keeps the same one
    return Half(
        matrices=part.matrices,
        plain=part.plain + norms * architecture.norm_vectors * hidden,
        expert_matrices=part.expert_matrices,
        expert_plain=part.expert_plain,
        active=part.active,
        traffic=part.traffic + (norms * 2 + 3) * hidden,
        alive=2 * hidden + part.alive,
        saved_bytes=part.saved_bytes + input_bytes + norms * norm_saved_bytes(architecture, hidden),
        num_all_reduces=1,
    )


def _attention(architecture: Architecture, attention: Attention, group: int) -> Half:
    """Multi-head or grouped."""
    hidden, size = architecture.hidden_size, DTYPE_BYTES[architecture.dtype]
    heads = _share("num_attention_heads", attention.num_heads, group)
    kv_heads = _share_kv(attention.num_kv_heads, group)
    query, key, value = heads * attention.head_dim, kv_heads * attention.head_dim, kv_heads * attention.value_dim
    output = heads * attention.value_dim
    projected = query + key + value
    cached = kv_heads if attention.cached_heads is None else _share_kv(attention.cached_heads, group)
    all_heads = attention.num_heads + attention.num_kv_heads
    normed = {"none": 0, "head": 2, "full": all_heads}[attention.qk_norm] * attention.head_dim
    matrices = hidden * projected + output * hidden
    return Half(
        matrices=matrices,
        plain=attention.qkv_bias * projected
        + attention.output_bias * hidden
        + attention.qk_norm_vectors * normed
        + attention.sinks * heads
        + attention.position_buckets * heads,
        active=matrices,
        traffic=(hidden + projected) + (2 * (query + key) if normed else 0) + (projected + output) + (output + hidden),
        alive=projected + output,
        saved_bytes=(projected + output) * size
        + 4 * heads
        + (norm_saved_bytes(architecture, query + key) if normed else 0),
        pair_flops=2 * heads * (attention.head_dim + attention.value_dim),
        cache=cached * (attention.head_dim + attention.value_dim),
    )


def _latent(architecture: Architecture, attention: Attention, group: int) -> Half:
    """Latent: compressed, normalised, expanded; compressions are whole on every device, and so is the cache."""
    hidden, size = architecture.hidden_size, DTYPE_BYTES[architecture.dtype]
    heads = _share("num_attention_heads", attention.num_heads, group)
    q_rank, kv_rank, rope = attention.query_rank or 0, attention.kv_rank or 0, attention.rope_dim
    query, value = heads * attention.head_dim, heads * attention.value_dim
    expanded = heads * (attention.head_dim - rope) + value
    matrices = hidden * (q_rank + kv_rank + rope) + kv_rank * expanded + value * hidden
    matrices += (q_rank or hidden) * query
    compressed = q_rank + kv_rank + rope
    ranks = (q_rank > 0) + 1
    return Half(
        matrices=matrices,
        plain=attention.qkv_bias * compressed + attention.output_bias * hidden + (q_rank + kv_rank),
        active=matrices,
        traffic=(hidden + compressed)
        + 2 * (q_rank + kv_rank)  # norms
        + ((q_rank or hidden) + query)
        + (kv_rank + expanded)
        + (expanded + rope + query)  # keys are put together from both their parts
        + (2 * query + 2 * value)  # attention
        + (value + hidden),
        alive=compressed + expanded + 2 * query + value,
        saved_bytes=(q_rank + kv_rank + 2 * query + expanded + value) * size
        + 4 * heads
        + norm_saved_bytes(architecture, q_rank + kv_rank)
        + 4 * (ranks - 1),
        pair_flops=2 * heads * (attention.head_dim + attention.value_dim),
        cache=kv_rank + rope,
    )


def _mlp(architecture: Architecture, mlp: Mlp, group: int) -> Half:
    """Two or three matrices."""
    hidden = architecture.hidden_size
    inner = _share("intermediate_size", mlp.inner, group)
    matrices = mlp.matrices * hidden * inner
    kept = _KEPT.get(mlp.activation, 2) + 2 * (mlp.matrices - 2)
    return Half(
        matrices=matrices,
        plain=mlp.bias * (hidden + (mlp.matrices - 1) * inner),
        active=matrices,
        traffic=(mlp.matrices - 1) * (hidden + inner) + mlp.matrices * inner + (inner + hidden),
        alive=mlp.matrices * inner,
        saved_bytes=kept * inner * DTYPE_BYTES[architecture.dtype],
    )


def _experts(architecture: Architecture, experts: Experts, group: int) -> Half:
    """Each token's copy goes through each of its experts; its shared expert, if any, comes after."""
    hidden, size = architecture.hidden_size, DTYPE_BYTES[architecture.dtype]
    one, chosen = _mlp(architecture, experts.expert, group), experts.per_token
    shared = Half() if experts.shared is None else _mlp(architecture, experts.shared, group)
    router = hidden * experts.num_experts
    gate = hidden if experts.shared_gate else 0
    return Half(
        matrices=shared.matrices,
        plain=router + experts.router_bias * experts.num_experts + shared.plain + gate,
        expert_matrices=experts.num_experts * one.matrices,
        expert_plain=experts.num_experts * one.plain,
        active=router + chosen * one.active + shared.active + gate,
        traffic=(hidden + experts.num_experts) + chosen * (one.traffic + 4 * hidden) + shared.traffic,
        alive=max(experts.num_experts + chosen * (hidden + one.alive), hidden + shared.alive),
        saved_bytes=4 * experts.num_experts + chosen * (one.saved_bytes + 2 * hidden * size) + shared.saved_bytes,
    )


def _share(what: str, count: int, group: int) -> int:
    if count % group:
        raise WorkloadError(
            f"tensor_parallel is {group}, but {what} is {count}, which {group} devices can't share equally; "
            f"give a divisor of {count}."
        )
    return count // group


def _share_kv(heads: int, group: int) -> int:
    """Key and value heads of one device: its share, or one that others hold, too."""
    if heads % group and group % heads:
        raise WorkloadError(
            f"tensor_parallel is {group}, but num_key_value_heads is {heads}; {group} devices can neither share them "
            "nor repeat them equally. Give a divisor or a multiple."
        )
    return max(1, heads // group)
