"""Forward passes through DeepSpeed's pipeline engine, without what its ``eval_batch`` costs.

::

    pipeline = ForwardPipeline(engine, num_micro_batches=8, rows=4, tokens=512)
    logits = pipeline.run(token_ids)  # on the last stage

`schedule` holds the instructions and their order, `hops` the messages between stages, `stage_work` what one rank does
with one micro-batch, `whole_rows` transformers' passes without a question to the device, `capture` CUDA graphs and the
choice for or against them; `pipeline` puts them together.
"""

from lp_plugin.integrations.deepspeed.forward.pipeline import Execution, ForwardPipeline

__all__ = ["Execution", "ForwardPipeline"]
