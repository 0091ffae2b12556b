"""The job of `lp-plugin generate`: prompts in, continuations out."""
