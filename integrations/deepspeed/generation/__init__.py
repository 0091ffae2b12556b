"""Generation on DeepSpeed's pipeline engine: importing this package gives ``PipelineEngine`` a ``generate``.

::

    import lp_plugin.integrations.deepspeed.generation
    engine.generate(prompts, generation_config=GenerationConfig(max_new_tokens=64), micro_batch=32, num_slots=2)

Several micro-batches circle the ring of stages, so that all stages work; each has a KV cache of its own on every
stage. Turns are made by `slots`, carried out as DeepSpeed instructions by `passes`; `ring` sends the messages,
`slot_state` runs a pass (as a CUDA graph on GPUs, in fewer kernels by `lean`), `choosing` picks the tokens.
"""

from deepspeed.runtime.pipe.engine import PipelineEngine

from lp_plugin.integrations.deepspeed.generation.generate import generate, release

__all__ = ["generate", "release"]

PipelineEngine.generate = generate
