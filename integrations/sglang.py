"""SGLang: ``SGLANG_PP_LAYER_PARTITION=5,4,4,4``, read by ``sglang/srt/distributed/utils.py``, ``get_pp_indices``."""

from lp_plugin.integrations.counts import counts_format

__all__ = ["FORMAT"]

FORMAT = counts_format("sglang", variable="SGLANG_PP_LAYER_PARTITION")
"""Decoder layers per stage; the embedding is on the first, norm and head are on the last."""
