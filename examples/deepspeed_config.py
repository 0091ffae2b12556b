"""Plugs a Hugging Face model into a DeepSpeed configuration that is there already.

    python examples/deepspeed_config.py MODEL_DIR --deepspeed_config examples/train/ds.json
    deepspeed --num_gpus 2 examples/deepspeed_config.py MODEL_DIR --deepspeed_config ds.json

The configuration's precision and micro-batch are used, and its "lp_plugin" section says how the layers are placed; what
belongs to training (optimizer, ZeRO) is left out. `HFPipelineModule` is an ordinary DeepSpeed PipelineModule, for those
who want the engine itself.
"""

import argparse
import os

from lp_plugin.integrations.transformers import load


def main() -> None:
    """Scores a sentence and says how the model was placed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--deepspeed_config", required=True)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    arguments = parser.parse_args()

    with load(arguments.model, config=arguments.deepspeed_config) as model:
        (score,) = model.score(["The rabbit-hole went straight on like a tunnel for some way."])
        if os.environ.get("RANK", "0") == "0":
            workload = model.plan.workload
            print(f"{model.plan.dtype}, {workload.chosen_micro_batch} rows a micro-batch")
            for number, stage in enumerate(model.plan.stages):
                print(f"stage {number}: layers {stage.start} .. {stage.stop - 1} on {stage.device}")
            print(f"log-likelihood {score:.4f}")


if __name__ == "__main__":
    main()
