#!/usr/bin/env bash
# A job array without Dask: every task takes its part of the cases. Submit it again after the walltime: --continue does the rest.
#   sbatch slurm_array.sh IMAGES LOGITS OUTPUT
#SBATCH --array=0-7
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=00:30:00
#SBATCH --signal=B:TERM@60
set -euo pipefail
exec crfrefine infer -i "$1" -p "$2" -o "$3" --continue --quiet \
    --num-parts "$SLURM_ARRAY_TASK_COUNT" --part-id "$SLURM_ARRAY_TASK_ID"
