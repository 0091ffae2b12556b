"""An experiment of small models on 2 Gloo processes, as a file."""

from pathlib import Path

__all__ = ["ROOT", "TINY"]

ROOT = Path(__file__).parents[2]
SHRUNK = (
    "{ num_hidden_layers = 3, hidden_size = 64, intermediate_size = 128, num_attention_heads = 4, "
    "num_key_value_heads = 4 }"
)
TINY = f"""
title = "Tiny"
model = "{ROOT / "examples" / "dense16" / "small"}"
trials = 2

[[case]]
name = "prefill"
changes = {SHRUNK}
processes = 2
phase = "prefill"
batch = 5
micro_batch = 2
sequence = 16
configurations = ["tp=2", "pp=2 uniform", "pp=2 uniform stock", "pp=2 graphs", "dp=2", "1", "1 stock"]
counters = true

[[case]]
name = "decode"
changes = {SHRUNK}
processes = 2
phase = "decode"
batch = 3
sequence = 8
new_tokens = 4
configurations = ["pp=2", "dp=2", "1", "1 compiled"]
baseline = "1"

[[case]]
name = "half"
dtype = "float16"
processes = 2
phase = "prefill"
batch = 2
sequence = 8
configurations = ["dp=2"]
"""
