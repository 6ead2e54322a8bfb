#!/usr/bin/env bash
# The first run on a GPU, in three calls of less than ten minutes each, on a cold machine without a network (docs/guide/gpu.md):
#
#   bash benchmarks/gpu_first_run.sh 1|2|3 OUT
#
# OUT is a folder: everything that must be carried away is there. gpu_steps.py has the steps and their limits; no call needs another.
# PYTHON is the interpreter with numpy, scipy, CuPy, pytest and PyTorch. WHEELS is a folder of wheels (this package, nibabel, isal), which
# are unpacked into build/gpu-wheels. RECORD is what gpu_record.py has written.
set -u
case ${1:-} in 1 | 2 | 3) ;; *) set -- ;; esac
if [ $# -ne 2 ]; then
    echo "usage: bash benchmarks/gpu_first_run.sh 1|2|3 OUT" >&2
    exit 2
fi
mkdir -p "$2" || exit 1
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
wheels=${WHEELS:-build/wheels}
if compgen -G "$wheels/*.whl" >/dev/null; then
    # Beside the interpreter's packages, not among them: it may be somebody else's.
    timeout 30 "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index --upgrade --target build/gpu-wheels "$wheels"/*.whl
    export PYTHONPATH=$PWD/build/gpu-wheels${PYTHONPATH:+:$PYTHONPATH}
fi
if ! PYTHONSAFEPATH=1 "$python" -c 'import sys, importlib.util as util; sys.exit(util.find_spec("crfrefine") is None)'; then
    echo "crfrefine is not installed for $python: the checkout is used, without a compiled CPU engine to compare with"
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" -u benchmarks/gpu_steps.py "$1" "$out" --record "${RECORD:-build/gpu-record.npz}"
