"""Scores texts with a pipelined model: which of them does it find likeliest, per token?

    python examples/score.py MODEL_DIR TEXT_FILE                              # one process, one stage
    torchrun --nproc-per-node 4 examples/score.py MODEL_DIR TEXT_FILE         # four stages
    torchrun --nproc-per-node 4 examples/score.py MODEL_DIR TEXT_FILE --tensor-parallel 2

For files of any size, with a journal and a report, there is ``lp-plugin run``.
"""

import argparse
import os
from pathlib import Path

from transformers import AutoTokenizer

from lp_plugin.integrations.transformers import load


def main() -> None:
    """Prints the lines of a file, likeliest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    arguments = parser.parse_args()
    texts = [line for line in arguments.texts.read_text(encoding="utf-8").splitlines() if line.strip()]

    with load(arguments.model, tensor_parallel=arguments.tensor_parallel) as model:
        scores = model.score(texts)
        boundaries = model.plan.boundaries

    if os.environ.get("RANK", "0") == "0":  # every process has the scores
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        lengths = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]  # the first token is not scored
        per_token = [score / max(length, 1) for score, length in zip(scores, lengths, strict=True)]
        print(f"boundaries {boundaries}")
        for index in sorted(range(len(texts)), key=lambda index: -per_token[index]):
            print(f"{scores[index]:12.4f} {per_token[index]:9.4f} a token  {texts[index]}")


if __name__ == "__main__":
    main()
