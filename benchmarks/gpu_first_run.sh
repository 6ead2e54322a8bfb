#!/usr/bin/env bash
# The first run on a GPU, in three parts that each end well within ten minutes, on a machine without a network (docs/guide/gpu.md):
#
#   bash benchmarks/gpu_first_run.sh 1 OUT    checks, the tests that need a GPU, compute-sanitizer
#   bash benchmarks/gpu_first_run.sh 2 OUT    times of the brain, coarse to fine, and of the whole head
#   bash benchmarks/gpu_first_run.sh 3 OUT    times of a CT
#
# OUT is a folder: everything that must be carried away is there (part1.json, part1.log, ...). `all` does the three in order, and stops
# where one fails. PYTHON is the interpreter that has numpy, scipy, CuPy, pytest and PyTorch. WHEEL, if it is set, is a wheel of this
# package (make wheel-for), which is unpacked into build/gpu-wheel. Without a wheel and without an installed package, the checkout itself is
# used, which has no compiled CPU engine.
# Nothing is written into docs/: that is done where OUT was carried to, by
#
#   python benchmarks/gpu.py --from-record OUT/part2.json OUT/part3.json --write
set -u
part=${1:-}
out=${2:-}
python=${PYTHON:-python3}
case $part in 1 | 2 | 3 | all) ;; *) part= ;; esac
if [ -z "$part" ] || [ -z "$out" ]; then
    echo "usage: bash benchmarks/gpu_first_run.sh 1|2|3|all OUT" >&2
    exit 2
fi
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
wheel=${WHEEL:-}
if [ -n "$wheel" ]; then
    wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
fi
cd "$(dirname "$0")/.." || exit 1

if [ -n "$wheel" ]; then
    # Beside the interpreter's packages, not among them: it may be somebody else's.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index --upgrade --target build/gpu-wheel "$wheel" || exit 1
    export PYTHONPATH=$PWD/build/gpu-wheel${PYTHONPATH:+:$PYTHONPATH}
fi
if ! PYTHONSAFEPATH=1 "$python" -c 'import crfrefine' 2>/dev/null; then
    echo "crfrefine is not installed for $python: the checkout is used, without a compiled CPU engine"
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi

# run NUMBER OPTIONS...: the record and all that is said go to OUT.
run() {
    local number=$1
    shift
    echo "part $number: gpu.py $*"
    "$python" -u benchmarks/gpu.py -o "$out/part$number.json" "$@" 2>&1 | tee "$out/part$number.log"
    return "${PIPESTATUS[0]}"
}

part1() { run 1 --check-only --tests --sanitize; }
part2() { run 2 --workloads Lm L Lm-mid Lm-fine Lm-1.5mm; }
part3() { run 3 --workloads CT; }

case $part in
1) part1 ;;
2) part2 ;;
3) part3 ;;
all) part1 && part2 && part3 ;;
esac || exit 1
