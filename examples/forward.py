"""A batch of forward passes by `ForwardPipeline` and by DeepSpeed's own ``eval_batch``: same engine, same results.

    torchrun --nproc-per-node 2 examples/forward.py MODEL_DIR
    torchrun --nproc-per-node 2 examples/forward.py MODEL_DIR --micro-batches 32 --tokens 16 --execution graphs

For token ids of one shape, without padding. For texts of any length there is score.py, or ``lp-plugin run``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lp_plugin import Workload
from lp_plugin.integrations.deepspeed.engine import build_engine, join_or_start, quiet
from lp_plugin.integrations.deepspeed.forward import ForwardPipeline
from lp_plugin.integrations.transformers.pipeline import HFPipelineModule


def seconds(run: Callable[[], Any]) -> float:
    """Of one batch on this rank, all ranks beginning together."""
    torch.distributed.barrier()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Prints, on the last stage, how far results differ, and how long each takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("--micro-batches", 8), ("--rows", 1), ("--tokens", 64), ("--repeats", 5)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--execution", choices=("auto", "eager", "graphs", "compiled"), default="auto")
    given = parser.parse_args()
    shape = (given.micro_batches, given.rows, given.tokens)

    join_or_start()
    with quiet():
        module = HFPipelineModule(
            given.model,
            num_stages=torch.distributed.get_world_size(),
            workload=Workload(batch=given.micro_batches * given.rows, sequence=given.tokens, micro_batch=given.rows),
            partition_method="cache-aware",
        )
    engine = build_engine(
        module, micro_batch=given.rows, num_micro_batches=given.micro_batches, dtype=module.lp_profile.dtype
    )
    tokens = torch.randint(module.hf_config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(engine.device)
    pipeline = ForwardPipeline(
        engine, num_micro_batches=given.micro_batches, rows=given.rows, tokens=given.tokens, execution=given.execution
    )

    def stock() -> Any:
        feed = iter([(each, each) for each in tokens])  # eval_batch wants labels, and leaves them alone here
        return engine.eval_batch(feed, compute_loss=False, reduce_output=None, bcast_loss=False)

    expected, logits = stock(), pipeline.run(tokens)
    if logits is not None and expected is not None:  # on the last stage
        difference = float((logits - torch.stack(expected)).abs().max())
        print(f"{pipeline.execution}: logits {list(logits.shape)}, largest difference from eval_batch {difference:g}")
    pairs = [(seconds(stock), seconds(lambda: pipeline.run(tokens))) for _ in range(given.repeats)]
    theirs, ours = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
    if logits is not None:
        print(f"a batch takes {theirs:.1f} ms with eval_batch, {ours:.1f} ms with ForwardPipeline")
    pipeline.release()  # before the process groups that its graphs use
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
