"""Data, tensor and pipeline parallelism and their mixes, compared on one cluster."""
