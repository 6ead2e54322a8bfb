#!/usr/bin/env bash
# Refine each volume of a folder by itself, and go on after one that fails.
#
#     each_volume.sh IMAGES LOGITS REFINED [OPTIONS OF crfrefine infer]
#
# The network's output of IMAGES/NAME is LOGITS/NAME. Volumes that failed are listed in
# REFINED/failed.txt; the exit status is 1 if there are any. A volume with a result is skipped.
set -euo pipefail

images=${1:?the folder of the images} logits=${2:?that of the logits} refined=${3:?that of the results}
shift 3
shopt -s nullglob
volumes=("$images"/*.nii.gz)
if ((${#volumes[@]} == 0)); then
  echo "$images: no .nii.gz there" >&2
  exit 2
fi
mkdir -p "$refined"
failed="$refined/failed.txt"
: > "$failed"
for image in "${volumes[@]}"; do
  name=$(basename "$image")
  if [[ -e "$refined/$name" ]]; then
    continue
  fi
  status=0
  crfrefine infer -i "$image" -p "$logits/$name" -o "$refined/$name" --quiet "$@" || status=$?
  # 1: this volume failed. Anything else ends the loop: wrong usage (2), or Ctrl-C (130).
  if ((status > 1)); then
    exit "$status"
  elif ((status == 1)); then
    echo "$name" >> "$failed"
  fi
done

if [[ -s "$failed" ]]; then
  echo "failed, and listed in $failed: $(wc -l < "$failed")" >&2
  exit 1
fi
rm "$failed"
