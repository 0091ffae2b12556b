#!/usr/bin/env bash
# One job over several SLURM hosts; the same command goes on where it stopped, so --requeue may start it again.
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-task 1 examples/slurm.sh run MODEL_DIR --input documents.jsonl --stages 16
#SBATCH --job-name=lp-plugin
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# --kill-on-bad-exit: a task that fails takes its step with it, on hosts that lost their connection, too
exec srun --kill-on-bad-exit=1 lp-plugin "$@"
