"""train.py with one import and one word more: ``partition_method="cache-aware"``.

    torchrun --nproc-per-node 2 examples/train/train_import.py --deepspeed_config examples/train/ds.json

The configuration's "lp_plugin" section is not read; `lp_plugin.integrations.deepspeed.configure` would.
"""

import torch
from deepspeed.pipe import PipelineModule
from train import loss_fn, make_layers, start, train

import lp_plugin.integrations.deepspeed  # noqa: F401 - adds the partition methods

if __name__ == "__main__":
    arguments = start()
    stages = torch.distributed.get_world_size()
    module = PipelineModule(layers=make_layers(), num_stages=stages, loss_fn=loss_fn, partition_method="cache-aware")
    train(module, arguments)
