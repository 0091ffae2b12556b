"""A DeepSpeed pipeline training script that knows nothing of lp_plugin.

    torchrun --nproc-per-node 2 examples/train/train.py --deepspeed_config examples/train/ds.json

The same script, unchanged, with the partition that the configuration's "lp_plugin" section asks for:

    torchrun --nproc-per-node 2 --no-python \
        lp-plugin launch examples/train/train.py --deepspeed_config examples/train/ds.json

The last stage prints the boundaries and the loss of each step as one line of JSON.
"""

import argparse
import itertools
import json
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule

VOCABULARY, SEQUENCE = 4096, 16
WIDTHS = (128, 128, 512, 64, 64, 64)
"""Of the hidden layers; their costs differ by a factor of 64."""


class Dense(torch.nn.Sequential):
    """A linear layer and its activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(torch.nn.Linear(inputs, outputs), torch.nn.GELU())


def make_layers() -> list[LayerSpec]:
    """An embedding, hidden layers of uneven widths and a head; nothing is built yet."""
    hidden = [LayerSpec(Dense, inputs, outputs) for inputs, outputs in itertools.pairwise(WIDTHS)]
    embedding = LayerSpec(torch.nn.Embedding, VOCABULARY, WIDTHS[0])
    return [embedding, *hidden, LayerSpec(torch.nn.Linear, WIDTHS[-1], VOCABULARY)]


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over all tokens."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_batches(micro_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless micro-batches of tokens, the same on every rank and in every run; the label is the token's successor."""
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(VOCABULARY, (micro_batch, SEQUENCE), generator=generator)
        yield tokens, (tokens + 1) % VOCABULARY


def start() -> argparse.Namespace:
    """Reads the command line and joins the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by DeepSpeed's launcher")
    arguments = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    return arguments


def train(module: PipelineModule, arguments: argparse.Namespace) -> None:
    """Trains for some steps and prints the losses."""
    engine, *_ = deepspeed.initialize(args=arguments, model=module, model_parameters=module.parameters())
    batches = make_batches(engine.train_micro_batch_size_per_gpu())
    losses = [float(engine.train_batch(batches)) for _ in range(arguments.steps)]
    if engine.is_last_stage():
        print(json.dumps({"parts": list(map(int, module.parts)), "losses": losses}), flush=True)
    torch.distributed.barrier()  # else a thread of Gloo's may still hold a tensor when Python ends, and abort
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = start()
    stages = torch.distributed.get_world_size()
    train(PipelineModule(layers=make_layers(), num_stages=stages, loss_fn=loss_fn), given)
