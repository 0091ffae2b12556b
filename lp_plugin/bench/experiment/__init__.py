"""The experiment of `lp-plugin bench FILE.toml`: configurations side by side, measured, explained and reported."""
