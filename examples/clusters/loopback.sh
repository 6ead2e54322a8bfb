#!/usr/bin/env bash
# A scheduler and two workers as processes of their own on this machine, and a run on them: a rehearsal for a cluster.
#   loopback.sh IMAGES LOGITS OUTPUT [options of crfrefine infer]
set -euo pipefail
images=$1 logits=$2 output=$3
shift 3
folder=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null; wait; rm -rf "$folder"' EXIT

# A case that takes its worker with it twice is given up; Dask's own default is four times.
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=1
# What Dask measures of itself costs more than it does for the cases.
export DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL=500ms DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False
python -m dask scheduler --host 127.0.0.1 --port 0 --dashboard-address 127.0.0.1:0 --scheduler-file "$folder/scheduler.json" &
python -m dask worker --scheduler-file "$folder/scheduler.json" --nworkers 2 --nthreads 1 --memory-limit 2GiB &

until [ -s "$folder/scheduler.json" ]; do sleep 0.2; done
python -m crfrefine infer -i "$images" -p "$logits" -o "$output" --dask "$folder/scheduler.json" --threads 1 "$@"
