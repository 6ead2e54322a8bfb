#!/usr/bin/env bash
# Refine a folder as a job array of Slurm, and submit the parts again that have cases left.
#
#     slurm_array.sh IMAGES LOGITS REFINED [OPTIONS OF crfrefine infer]
#
# PARTS (default 8) is the number of jobs, TRIES (default 3) how often a part is submitted at most.
# SBATCH_OPTIONS are further options of sbatch, such as "--partition=cpu --account=lab".
set -euo pipefail

images=${1:?the folder of the images} logits=${2:?that of the logits} refined=${3:?that of the results}
shift 3
parts=${PARTS:-8}
read -r -a options <<< "${SBATCH_OPTIONS:---cpus-per-task=4 --mem=8G --time=00:30:00}"

# Each job is this command; Slurm's number of the job is that of the part.
printf -v command '%q ' crfrefine infer -i "$images" -p "$logits" -o "$refined" \
  --continue --quiet --num-parts "$parts" "$@"
mkdir -p "$refined"

array="0-$((parts - 1))"
for ((try = 0; try < ${TRIES:-3}; try++)); do
  # --wait returns when all jobs have ended; its status tells of failed ones, as does `status`.
  sbatch --wait --array="$array" --signal=B:TERM@60 "${options[@]}" \
    --wrap "exec $command --part-id \$SLURM_ARRAY_TASK_ID" || true
  if state=$(crfrefine status "$refined"); then
    echo "$state"
    exit 0
  fi
  # The last line of the state names the parts that have cases left.
  array=$(sed -n 's/.*--array=\([0-9,-]*\).*/\1/p' <<< "$state")
  if [[ -z "$array" ]]; then
    break
  fi
done
echo "$state"
exit 1
