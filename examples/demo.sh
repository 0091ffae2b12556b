#!/usr/bin/env bash
# The main job on CPUs, end to end: a small sibling of the reference model, planned, run over 4 Gloo processes on a
# real text, and checked against the unpartitioned Hugging Face model. Usage: examples/demo.sh [FOLDER]
set -euo pipefail
out=${1:-demo-output}
text=examples/text/alice.txt
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} CUDA_VISIBLE_DEVICES= TRANSFORMERS_VERBOSITY=error
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

mkdir -p "$out"
rm -rf "$out/model" "$out/scores.jsonl.partial"  # what an interrupted demo left
say "1. The reference model on 16 H100s, planned from its config.json alone"
lp-plugin plan examples/dense16 --cluster h100-sxm:16 --batch 1024 --sequence 10000 -o "$out/plan.json"
lp-plugin explain "$out/plan.json" --picture "$out/plan.png" > /dev/null
say "2. Should it be pipelined at all?"
lp-plugin plan --strategy all examples/dense16 --cluster h100-sxm:16 --batch 1024 --sequence 10000 \
  --picture "$out/strategies.png"
say "3. Its small sibling, made with random weights: $out/model"
python examples/dense16/make_model.py examples/dense16/small "$out/model"
say "4. Layers timed, planned, and $text scored over 4 processes"
lp-plugin run "$out/model" --input "$text" --stages 4 \
  --output "$out/scores.jsonl" --timeline "$out/timeline.png" --report "$out/report.json"
say "5. The same documents through the unpartitioned Hugging Face model"
python examples/check_scores.py "$out/model" "$text" "$out/scores.jsonl" "$out/report.json"
say "Look at $out/: plan.png, strategies.png, timeline.png, scores.jsonl, report.json"
