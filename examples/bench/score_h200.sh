#!/usr/bin/env bash
# The reference model scored on 2 GPUs, on one GPU, and checked against the unpartitioned Hugging Face model.
# usage: examples/bench/score_h200.sh FOLDER RESULTS [CONFIG_DIR=examples/dense16] [COUNT=320] [CHARACTERS=2047]
# FOLDER takes the model (26 GB) and scratch files; RESULTS the JSON files and the timeline.
# STAGES="2 1" says which numbers of stages are run; those that are compared with Hugging Face are the first.
set -euo pipefail
folder=${1:?folder for the model}; results=${2:?folder for results}
config=${3:-examples/dense16}; count=${4:-320}; characters=${5:-2047}
device=$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
mkdir -p "$folder" "$results"
step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

step "environment"
python3 - "$results" <<'PY'
import json, pathlib, sys
import deepspeed, torch, transformers
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
versions = {"python": sys.version.split()[0], "torch": torch.__version__, "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda, "gpus": gpus}
if gpus:
    versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
pathlib.Path(sys.argv[1], "environment.json").write_text(json.dumps(versions, indent=2) + "\n")
print(versions)
PY
step "model"
[ -d "$folder/model" ] || python3 examples/dense16/make_model.py "$config" "$folder/model" --device "$device"
python3 examples/text/make_documents.py "$folder/documents.jsonl" --count "$count" --characters "$characters"
read -ra runs <<< "${STAGES:-2 1}"
for stages in "${runs[@]}"; do
  step "run, $stages stages"
  python3 -m lp_plugin run "$folder/model" --input "$folder/documents.jsonl" --stages $stages \
    --output "$folder/scores-$stages.jsonl" --report "$results/score-$stages.json" --timeline "$results/timeline-$stages.png"
done
step "against the unpartitioned model"
python3 examples/check_scores.py "$folder/model" "$folder/documents.jsonl" "$folder/scores-${runs[0]}.jsonl" \
  "$results/score-${runs[0]}.json" --limit 1 | tee "$results/check.txt"
step "done"
