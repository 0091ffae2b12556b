"""Continues prompts with a pipelined model and prints the first one's text as it comes.

    python examples/generate.py MODEL_DIR "Once upon a time" "In the beginning"
    torchrun --nproc-per-node 2 examples/generate.py MODEL_DIR "Once upon a time" --sample --seed 7

The tokens are those of transformers' ``generate`` on each prompt alone, also when they are drawn, whatever the number
of processes. For files of prompts there is ``lp-plugin generate``.
"""

import argparse
import os
import sys

from lp_plugin.integrations.transformers import load


def main() -> None:
    """Prints each prompt and what follows it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def show(index: int, piece: str) -> None:
        if index == 0:
            print(piece, end="", file=sys.stderr, flush=True)

    with load(arguments.model) as model:
        texts = model.generate(
            arguments.prompts,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.sample,
            seed=arguments.seed,
            on_text=show,
        )

    if os.environ.get("RANK", "0") == "0":  # every process has the texts
        print(file=sys.stderr)
        for prompt, text in zip(arguments.prompts, texts, strict=True):
            print(f"{prompt} | {text!r}")


if __name__ == "__main__":
    main()
