"""Scores the documents of a finished ``lp-plugin run`` again with the unpartitioned Hugging Face model.

    python examples/check_scores.py MODEL_DIR INPUT SCORES REPORT [--limit 16]

Twice: on the rows that the run used (padded alike: the difference should be exactly 0), and each document alone and
unpadded, where float32 may round differently. Ends with code 1 if a difference exceeds its bound.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lp_plugin.job.documents import read_documents, tokenize
from lp_plugin.model.architecture import read_architecture, read_config
from lp_plugin.score.batches import make_steps
from lp_plugin.score.likelihood import log_likelihoods


def main() -> None:
    """Compares and prints both differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "input", "scores", "report"):
        parser.add_argument(name)
    parser.add_argument("--limit", type=int, default=None, help="steps to compare (all)")
    arguments = parser.parse_args()
    report = json.loads(Path(arguments.report).read_text(encoding="utf-8"))
    lines = Path(arguments.scores).read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line)["log_likelihood"] for line in lines]

    torch.set_num_threads(report["threads"])  # another number would add in another order
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, report["dtype"])).to(device).eval()
    )
    architecture = read_architecture(read_config(arguments.model))
    documents = tokenize(
        read_documents(arguments.input), arguments.model, architecture.max_positions, architecture.vocab_size
    )

    def score(inputs: torch.Tensor, labels: torch.Tensor) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=inputs.to(device), use_cache=False).logits
        return log_likelihoods(logits, labels.to(device)).tolist()

    steps = make_steps(
        documents.lengths,
        range(len(documents)),
        tokens_per_micro_batch=report["tokens_per_micro_batch"],
        num_stages=len(report["hosts"]),
        max_positions=architecture.max_positions,
    )
    same_rows = alone = bound = 0.0
    compared = 0
    for step in steps[: arguments.limit]:
        for number, indices in enumerate(step.micro_batches):
            inputs = torch.from_numpy(step.inputs(documents, number))
            labels = torch.from_numpy(step.labels(documents, number))
            values = score(inputs, labels)
            for row, index in enumerate(indices):
                length = len(documents[index])
                single = score(inputs[row : row + 1, :length], labels[row : row + 1, :length])[0]
                same_rows = max(same_rows, abs(values[row] - scores[index]))
                alone = max(alone, abs(single - scores[index]))
                # rounding: one unit in the last place per layer and token
                rounding = torch.finfo(model.dtype).eps * architecture.num_layers * length
                bound = max(bound, rounding)
                compared += 1
    print(f"{compared} documents against the unpartitioned Hugging Face model in {report['dtype']}:")
    print(f"  largest difference on the same rows:        {same_rows:.3g} (expected 0)")
    print(f"  largest difference, each document unpadded: {alone:.3g} (bound {bound:.3g}, eps x layers x tokens)")
    sys.exit(0 if same_rows == 0 and alone <= bound else 1)


if __name__ == "__main__":
    main()
