#!/usr/bin/env bash
# Fit the CRF to labeled cases, refine others, and keep the result only if it is shown to help.
#
#     train_and_judge.sh STUDY TEST RESULT
#
# STUDY and TEST have folders images, logits and labels; no case is in both. RESULT gets the
# parameters, the report, and `masks`: the refined label maps, or the network's own where the CRF
# is not shown to help on the cases of TEST.
set -euo pipefail

study=${1:?the labeled cases to learn from} test=${2:?those to judge on} result=${3:?the folder to write}
mkdir -p "$result"

crfrefine train-crf "$study" -o "$result/params.toml" --resume
crfrefine infer -i "$test/images" -p "$test/logits" -o "$result/refined" \
  -c "$result/params.toml" --continue
crfrefine evaluate "$result/refined" "$test/labels" --baseline "network=$test/logits" \
  -o "$result/report"

# The exit status of this test is the verdict: 0 if the refinement helps.
helps() {
  python3 -c 'import json, sys
verdict = json.load(open(sys.argv[1]))["verdict"]
sys.exit(verdict is None or verdict["outcome"] != "helps")' "$1"
}

rm -rf "$result/masks"
if helps "$result/report/summary.json"; then
  cp -r "$result/refined" "$result/masks"
  echo "$result/masks: refined"
else
  crfrefine convert "$test/logits" "$result/masks" --to labels --output-format .nii.gz --quiet
  echo "$result/masks: the network's own, as the CRF is not shown to help"
fi
