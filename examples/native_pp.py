"""transformers' own pipeline parallelism with our boundaries instead of its even split.

    torchrun --nproc-per-node 2 examples/native_pp.py MODEL_DIR --cluster h200:2

Only the loading differs; afterwards the model is transformers' own.
"""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, DistributedConfig

from lp_plugin import Cluster, ModelProfile, Workload, make_plan
from lp_plugin.exchange.counts import blocks_per_stage
from lp_plugin.integrations.transformers.native_pp import native_split


def main() -> None:
    """Generates a few tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cluster", required=True, help="a device per process, like h200:2")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    profile = ModelProfile.from_config(arguments.model)
    plan = make_plan(profile, Cluster.parse(arguments.cluster), Workload(phase="decode", batch=8, sequence=64))
    with native_split(plan):
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, distributed_config=DistributedConfig(pp_size=plan.num_stages), dtype="auto"
        ).eval()

    prompt = torch.tensor([[1, 2, 3, 4]], device=model.device)
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    if torch.distributed.get_rank() == 0:
        print(f"blocks per stage: {blocks_per_stage(plan.layers, plan.boundaries)}")
        print(f"tokens: {tokens[0, 4:].tolist()}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
