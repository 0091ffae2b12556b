#!/usr/bin/env bash
# Generation with a llama-shaped model of 16 blocks x 2048: lp_plugin beside transformers and accelerate, in turns.
# usage: examples/bench/generate_h200.sh FOLDER RESULTS [CONFIG_DIR=examples/bench/llama16] [STAGES=2] [options of bench]
# FOLDER takes the model (2.4 GB, random weights, bf16), RESULTS the figures and what was printed.
# Needs no network; torch, transformers and accelerate as installed.
set -euo pipefail
folder=${1:?folder for the model}; results=${2:?folder for results}
config=${3:-examples/bench/llama16}; stages=${4:-2}; shift $(($# < 4 ? $# : 4))
device=$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
mkdir -p "$folder" "$results"
model=$folder/$(basename "$config")
[ -d "$model" ] || python3 examples/dense16/make_model.py "$config" "$model" --device "$device"
python3 -m lp_plugin bench generate "$model" --stages "$stages" --requests 64 --prompt-tokens 128 --new-tokens 64 \
  --repeats 5 --baselines all -o "$results/generate.json" "$@" | tee "$results/generate.txt"
