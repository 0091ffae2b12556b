"""An `Architecture` counted, layer by layer.

Everything is counted for one member of a tensor-parallel group. The cut follows transformers' own plans
(``base_model_tp_plan``): query, key, value, gate and up by columns, output and down by rows; norms, routers,
latent compressions and the biases after products by rows stay whole on each device; key and value heads are
shared out, or repeated where they are fewer than devices; every expert's inner width is cut. Embedding and head
are cut over the vocabulary, filled up to a multiple of the devices (Shoeybi et al., Megatron-LM, section 3);
losses and samples are taken from the shards, so that the head exchanges a number or two per token, which is not
counted. Tables of positions and token types stay whole. Activations as wide as the hidden size are whole on each
device, inner ones are cut.

An encoder-decoder is a chain: embedding, the encoder's blocks and norm, the decoder's embedding, its blocks, norm
and head. The source has as many tokens as the target. What follows the encoder hands on the encoder's output as
long as a later block reads it. The cross-attention's keys and values count as computed for every token, although a
decoder that has cached them computes them once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from lp_plugin.model.architecture import DTYPE_BYTES, Architecture, Block, Embedding, Experts
from lp_plugin.model.halves import Half, attention_half, mlp_half, norm_saved_bytes
from lp_plugin.model.layer_cost import LayerCost

__all__ = ["Granularity", "count_layers"]

Granularity = Literal["layer", "sublayer"]


def count_layers(
    architecture: Architecture, *, granularity: Granularity = "layer", tensor_parallel: int = 1
) -> tuple[LayerCost, ...]:
    """The layers of a model, in its own order.

    Args:
        architecture: What to count.
        granularity: ``sublayer`` cuts each block into attention and MLP, unless both work on the same input.
        tensor_parallel: Devices that share each layer.

    Returns:
        The costs of one of these devices.

    Raises:
        WorkloadError: If heads or an inner width can't be shared out among the devices.
    """
    return tuple(_Counter(architecture, granularity, tensor_parallel).layers())


class _Counter:
    """Counts the layers of one architecture for one member of a group."""

    def __init__(self, architecture: Architecture, granularity: Granularity, group: int) -> None:
        self.architecture = architecture
        self.granularity = granularity
        self.group = group
        self.size = DTYPE_BYTES[architecture.dtype]
        self.hidden_bytes = architecture.hidden_size * self.size

    def layers(self) -> Iterator[LayerCost]:
        """The chain."""
        architecture = self.architecture
        encoder = architecture.encoder_blocks
        source = self.embedding("embedding", architecture.embedding)
        if not encoder:
            yield source
            yield from self.blocks("block", architecture.blocks)
        else:
            yield dataclasses.replace(source, runs_once=True)
            for layer in self.blocks("encoder block", encoder):
                yield dataclasses.replace(layer, runs_once=True)
            if architecture.final_norm:
                yield dataclasses.replace(self.norm("encoder norm"), runs_once=True)
            if architecture.decoder_embedding is not None:
                yield self.embedding("decoder embedding", architecture.decoder_embedding, carried=1)
            yield from self.blocks("decoder block", architecture.blocks, first=len(encoder), carried=1)
        if architecture.final_norm:
            yield self.norm("norm")
        yield self.head()

    def blocks(self, name: str, blocks: tuple[Block, ...], *, first: int = 0, carried: int = 0) -> Iterator[LayerCost]:
        """Layers of a run of blocks; each but the last hands on ``carried`` hidden states beside its own."""
        counted: dict[int, tuple[LayerCost, ...]] = {}
        for index, block in enumerate(blocks):
            layers = counted.get(id(block)) or counted.setdefault(id(block), self.block(block))
            extra = carried * self.hidden_bytes if index + 1 < len(blocks) else 0
            for layer in layers:
                yield dataclasses.replace(
                    layer,
                    name=f"{name} {index}" if layer.kind == "block" else f"{name} {index} {layer.kind}",
                    block=first + index,
                    output_bytes_per_token=layer.output_bytes_per_token + extra,
                )

    def block(self, block: Block) -> tuple[LayerCost, ...]:
        """One block, whole or in halves."""
        halves = (
            self.half("attention", block, attention_half(self.architecture, block, self.group)),
            self.half("mlp", block, mlp_half(self.architecture, block, self.group)),
        )
        if self.granularity == "sublayer" and not block.parallel:
            return halves
        return (_joined(*halves, parallel=block.parallel),)

    def half(self, kind: str, block: Block, half: Half) -> LayerCost:
        """Costs of the counts of half a block."""
        size, quantization = self.size, self.architecture.quantization
        experts_only = quantization is not None and quantization.experts_only
        stored = half.matrices * size
        expert_bytes = half.expert_matrices * size
        if quantization is not None:
            stored = stored if experts_only else quantization.stored_bytes(half.matrices)
            expert_bytes = quantization.stored_bytes(half.expert_matrices)
        expert_bytes += half.expert_plain * size
        traffic = stored + half.plain * size
        mixture = block.mlp if kind == "mlp" and isinstance(block.mlp, Experts) else None
        attends = kind == "attention"
        expert_parameters = half.expert_matrices + half.expert_plain
        reduces = half.num_all_reduces if self.group > 1 else 0
        return LayerCost(
            name=kind,
            kind=kind,
            parameters=half.matrices + half.plain + expert_parameters,
            weight_bytes=traffic + expert_bytes,
            weight_traffic_bytes=traffic,
            traffic_bytes_per_token=float(half.traffic * size),
            flops_per_token=2.0 * half.active,
            flops_per_pair=float(half.pair_flops),
            flops_per_cross_pair=float(half.cross_pair_flops),
            window=block.attention.window if attends else None,
            causal=block.attention.causal,
            output_bytes_per_token=float(self.hidden_bytes),
            buffer_bytes_per_token=float(half.alive * size),
            kv_bytes_per_token=half.cache * size,
            kv_window=block.attention.cache_window if attends else None,
            expert_bytes=expert_bytes,
            expert_parameters=expert_parameters,
            num_experts=mixture.num_experts if mixture else 0,
            experts_per_token=mixture.per_token if mixture else 0,
            saved_bytes_per_token=float(half.saved_bytes),
            num_all_reduces=reduces,
            all_reduce_bytes_per_token=float(reduces * self.hidden_bytes),
        )

    def embedding(self, name: str, embedding: Embedding, *, carried: int = 0) -> LayerCost:
        """Tables that are looked up, not read; then a norm and a projection where there are any."""
        hidden, width, size = self.architecture.hidden_size, embedding.width, self.size
        table = -(-embedding.rows // self.group) * width
        positions = embedding.positions * (hidden if embedding.late_positions else width)
        dense = embedding.norm_vectors * width
        if embedding.projection:
            dense += width * hidden + embedding.projection_bias * hidden
        parameters = table + positions + embedding.segments * width + dense
        looked_up = 1 + (embedding.positions > 0) + (embedding.segments > 0)
        traffic = (looked_up + (embedding.norm_vectors > 0)) * 2 * width + embedding.projection * (width + hidden)
        saved = 8 + (width * size + 2 * 4 if embedding.norm_vectors else 0) + embedding.projection * width * size
        reduces = int(self.group > 1)
        return LayerCost(
            name=name,
            kind="embedding",
            parameters=parameters,
            weight_bytes=parameters * size,
            shared_key=embedding.shared,
            shared_bytes=table * size if embedding.shared else 0,
            weight_traffic_bytes=dense * size,
            traffic_bytes_per_token=float(traffic * size),
            flops_per_token=2.0 * width * hidden if embedding.projection else 0.0,
            output_bytes_per_token=float((1 + carried) * self.hidden_bytes),
            saved_bytes_per_token=float(saved),
            num_all_reduces=reduces,
            all_reduce_bytes_per_token=float(reduces * width * size),
        )

    def norm(self, name: str) -> LayerCost:
        """The norm after the last block."""
        parameters = self.architecture.norm_vectors * self.architecture.hidden_size
        return LayerCost(
            name=name,
            kind="norm",
            parameters=parameters,
            weight_bytes=parameters * self.size,
            weight_traffic_bytes=parameters * self.size,
            traffic_bytes_per_token=2.0 * self.hidden_bytes,
            output_bytes_per_token=float(self.hidden_bytes),
            saved_bytes_per_token=float(norm_saved_bytes(self.architecture, self.architecture.hidden_size)),
        )

    def head(self) -> LayerCost:
        """From hidden states to log-probabilities, which are taken in float32.

        A float32 copy of the logits and its log-softmax are written and read; the log-softmax is kept for the
        backward pass.
        """
        head, hidden, size = self.architecture.head, self.architecture.hidden_size, self.size
        rows = -(-head.rows // self.group)
        table = rows * head.width
        projection = hidden * head.width if head.projection else 0
        vectors = head.bias * rows + head.projection_bias * head.width + head.norm_vectors * head.width
        parameters = table + projection + vectors
        before = (hidden + head.width if head.projection else 0) + (2 * head.width if head.norm_vectors else 0)
        kept = head.width + (hidden if head.projection else 0) + (2 * head.width if head.norm_vectors else 0)
        return LayerCost(
            name="head",
            kind="head",
            parameters=parameters,
            weight_bytes=parameters * size,
            shared_key=head.shared,
            shared_bytes=table * size if head.shared else 0,
            weight_traffic_bytes=parameters * size,
            traffic_bytes_per_token=float((before + head.width + 2 * rows) * size + 4 * 4 * rows),
            flops_per_token=2.0 * (table + projection),
            output_bytes_per_token=float(rows * size),
            buffer_bytes_per_token=float(rows * 2 * 4),
            saved_bytes_per_token=float(kept * size + 4 * rows),
        )


def _joined(attention: LayerCost, mlp: LayerCost, *, parallel: bool) -> LayerCost:
    """The whole block of two halves: sums, but the larger buffer; halves in parallel share one all-reduce."""
    return dataclasses.replace(
        attention,
        kind="block",
        parameters=attention.parameters + mlp.parameters,
        weight_bytes=attention.weight_bytes + mlp.weight_bytes,
        weight_traffic_bytes=attention.weight_traffic_bytes + mlp.weight_traffic_bytes,
        traffic_bytes_per_token=attention.traffic_bytes_per_token + mlp.traffic_bytes_per_token,
        flops_per_token=attention.flops_per_token + mlp.flops_per_token,
        buffer_bytes_per_token=max(attention.buffer_bytes_per_token, mlp.buffer_bytes_per_token),
        expert_bytes=mlp.expert_bytes,
        expert_parameters=mlp.expert_parameters,
        num_experts=mlp.num_experts,
        experts_per_token=mlp.experts_per_token,
        saved_bytes_per_token=attention.saved_bytes_per_token + mlp.saved_bytes_per_token,
        num_all_reduces=attention.num_all_reduces + (0 if parallel else mlp.num_all_reduces),
        all_reduce_bytes_per_token=attention.all_reduce_bytes_per_token
        + (0.0 if parallel else mlp.all_reduce_bytes_per_token),
    )
