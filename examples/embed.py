"""Embeds texts with a pipelined encoder or decoder, and finds each one's nearest neighbour.

    python examples/embed.py MODEL_DIR TEXT_FILE
    torchrun --nproc-per-node 2 examples/embed.py MODEL_DIR TEXT_FILE

An embedding is the mean of the final hidden state over a text's tokens.
"""

import argparse
import os
from pathlib import Path

from torch.nn.functional import normalize

from lp_plugin.integrations.transformers import load


def main() -> None:
    """Prints each line of a file with the most similar other one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    arguments = parser.parse_args()
    texts = [line for line in arguments.texts.read_text(encoding="utf-8").splitlines() if line.strip()]

    with load(arguments.model) as model:
        vectors = normalize(model.embed(texts), dim=1)

    if os.environ.get("RANK", "0") == "0":  # every process has the vectors
        similarity = (vectors @ vectors.T).fill_diagonal_(-1)
        for text, row in zip(texts, similarity, strict=True):
            print(f"{float(row.max()):7.4f}  {text} | {texts[int(row.argmax())]}")


if __name__ == "__main__":
    main()
