"""vLLM: ``VLLM_PP_LAYER_PARTITION=5,4,4,4``, read by ``vllm/distributed/utils.py``, ``get_pp_indices``."""

from lp_plugin.integrations.counts import counts_format

__all__ = ["FORMAT"]

FORMAT = counts_format("vllm", variable="VLLM_PP_LAYER_PARTITION")
"""Decoder layers per stage; the embedding is on the first, norm and head are on the last."""
