"""A plan as accelerate's device map: transformers spreads the model over this process's GPUs as planned.

    python examples/accelerate_map.py MODEL_DIR --cluster h200:2

accelerate runs one device after another: this saves memory, not time. Without GPUs everything lands on the CPU.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM

from lp_plugin import Cluster, ModelProfile, Workload, make_plan
from lp_plugin.integrations.formats import export_partition


def main() -> None:
    """Prints how many modules each device gets, and the most likely next token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cluster", required=True, help="this process's devices, like h200:2")
    arguments = parser.parse_args()

    profile = ModelProfile.from_config(arguments.model)
    plan = make_plan(profile, Cluster.parse(arguments.cluster), Workload(batch=8, sequence=64))
    device_map = json.loads(export_partition(plan, "accelerate"))
    for stage in range(plan.num_stages):
        print(f"device {stage}: {', '.join(name for name, device in device_map.items() if device == stage)}")
    if torch.cuda.device_count() < plan.num_stages:
        device_map = dict.fromkeys(device_map, "cpu")

    model = AutoModelForCausalLM.from_pretrained(arguments.model, device_map=device_map, dtype="auto").eval()
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3, 4]], device=model.device), use_cache=False).logits
    print(f"next token: {int(logits[0, -1].argmax())}")


if __name__ == "__main__":
    main()
