"""Train a Hugging Face model on a text, in a pipeline that is planned for training; stop and go on as you like.

    python examples/dense16/make_model.py examples/dense16/small /tmp/small
    torchrun --nproc-per-node 2 examples/train/text.py /tmp/small /tmp/trained

Every 20 steps DeepSpeed saves a checkpoint. Started again, with as many processes as you like, it goes on from the
newest. At the end ``/tmp/trained/model`` is a model directory:

    lp-plugin generate /tmp/trained/model --prompts prompts.jsonl --stages 2 --max-new-tokens 64
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch

from lp_plugin.integrations.deepspeed.checkpoints import resume
from lp_plugin.integrations.deepspeed.engine import init_distributed, quiet
from lp_plugin.integrations.transformers.training import HFTrainingModule

CONFIG = Path(__file__).with_name("text.json")
TEXT = Path(__file__).parent.parent / "text" / "alice.txt"
TOKENS, FIRST = 128, 256  # of a row; what the byte tokenizer begins with


def rows(text: bytes, step: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A step's micro-batches of ``count`` random pieces of the text; the same whenever and wherever it is taken."""
    data, generator = torch.tensor(list(text)), torch.Generator().manual_seed(step)
    while True:
        starts = torch.randint(len(text) - TOKENS, (count,), generator=generator)
        pieces = [torch.cat([torch.tensor([FIRST]), data[start : start + TOKENS - 1]]) for start in starts]
        yield torch.stack(pieces), torch.stack(pieces)


def main() -> None:
    """Trains, saves, exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    init_distributed()
    stages = torch.distributed.get_world_size()
    with quiet():
        module = HFTrainingModule(arguments.model, num_stages=stages, config=CONFIG, sequence=TOKENS)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=str(CONFIG))
    first = resume(engine, arguments.output / "checkpoints")
    text = TEXT.read_bytes()
    for step in range(first, arguments.steps):
        loss = float(engine.train_batch(rows(text, step, engine.train_micro_batch_size_per_gpu())))
        if engine.global_rank == 0 and (step % 5 == 0 or step + 1 == arguments.steps):
            print(f"step {step + 1}: loss {loss:.3f}, boundaries {module.parts}", flush=True)
        if (step + 1) % 20 == 0:
            engine.save_checkpoint(str(arguments.output / "checkpoints"))
    module.save(arguments.output / "model")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
