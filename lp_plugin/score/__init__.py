"""The scoring job of ``lp-plugin run``: documents in, log-likelihoods out."""
