"""Cuts a text into documents of equal length, over and over, for measurements on real text.

python examples/text/make_documents.py OUTPUT.jsonl --count 320 --characters 2047
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Writes the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("alice.txt"))
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--characters", type=int, default=2047)
    arguments = parser.parse_args()
    text = " ".join(arguments.text.read_text(encoding="utf-8").split())
    repeated = text * (2 + arguments.characters // len(text))
    with arguments.output.open("w", encoding="utf-8") as stream:
        for index in range(arguments.count):
            start = index * 997 % len(text)  # a prime stride, so that documents differ
            record = {"id": index, "text": repeated[start : start + arguments.characters]}
            stream.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
