"""Benchmarks: figures beside those of other tools, from one run."""
