"""train.py with our PipelineModule, which takes the configuration's "lp_plugin" section for itself alone.

torchrun --nproc-per-node 2 examples/train/train_subclass.py --deepspeed_config examples/train/ds.json
"""

import torch
from train import loss_fn, make_layers, start, train

from lp_plugin.integrations.deepspeed import PipelineModule

if __name__ == "__main__":
    arguments = start()
    stages = torch.distributed.get_world_size()
    module = PipelineModule(layers=make_layers(), num_stages=stages, loss_fn=loss_fn, config=arguments.deepspeed_config)
    train(module, arguments)
