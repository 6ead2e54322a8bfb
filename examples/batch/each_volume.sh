#!/usr/bin/env bash
# Refine each volume of a folder by itself, and go on after one that fails.
#
#     each_volume.sh IMAGES LOGITS REFINED [OPTIONS OF crfrefine infer]
#
# The network's output of IMAGES/NAME is LOGITS/NAME. Volumes that failed are listed in
# REFINED/failed.txt; the exit status is 1 if there are any. A volume whose result is there is
# skipped.
set -euo pipefail

images=${1:?the folder of the images} logits=${2:?that of the logits} refined=${3:?that of the results}
shift 3
mkdir -p "$refined"
failed="$refined/failed.txt"
: > "$failed"

shopt -s nullglob
for image in "$images"/*.nii.gz; do
  name=$(basename "$image")
  if [[ -e "$refined/$name" ]]; then
    continue
  fi
  if ! crfrefine infer -i "$image" -p "$logits/$name" -o "$refined/$name" --quiet "$@"; then
    echo "$name" >> "$failed"
  fi
done

if [[ -s "$failed" ]]; then
  echo "failed, and listed in $failed: $(wc -l < "$failed")" >&2
  exit 1
fi
rm "$failed"
