#!/usr/bin/env bash
# Refine a folder, go on after an interruption, and report what was done.
#
#     folder.sh IMAGES LOGITS REFINED [OPTIONS OF crfrefine infer]
#
# Run it again after Ctrl-C, a reboot or a full disk: cases that are done are skipped. Then the
# exit status is that of `crfrefine status`: 0 only if every case is done.
set -euo pipefail

images=${1:?the folder of the images} logits=${2:?that of the logits} refined=${3:?that of the results}
shift 3

status=0
crfrefine infer -i "$images" -p "$logits" -o "$refined" --continue --quiet \
  --statistics --summary "$refined/summary.json" "$@" || status=$?
# 1: some cases failed, and the others are done. Anything else ended the run: wrong usage (2), or a
# signal (130 for Ctrl-C). Without the folder, no case was found.
if ((status > 1)) || [[ ! -d "$refined" ]]; then
  exit "$status"
fi
crfrefine status "$refined" | tee "$refined/status.txt"
