#!/usr/bin/env bash
# The first run on a GPU with the interpreter that has CuPy: PYTHON=python3.12 bash benchmarks/gpu_first_run.sh 1|2|3 OUT
exec "${PYTHON:-python3}" -u "$(dirname "$0")/gpu_first_run.py" "$@"
