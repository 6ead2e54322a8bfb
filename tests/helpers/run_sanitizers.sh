#!/bin/sh
# The C++ engine with sanitizers: make test-sanitizers. Two commands:
#   run_sanitizers.sh build BIN NAME...   compile the engine once for each of address (overflows, use after free, undefined behavior) and thread
#                                         (data races) into build/sanitize; BIN has python, cmake and ninja
#   run_sanitizers.sh test BIN NAME       run short tests with that engine, chosen by words of their names
set -eu
what=$1
bin=$2
shift 2
helpers=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$helpers/../.." && pwd)
build=$root/build/sanitize
compiler=${CXX:-c++}

library() { "$compiler" -print-file-name="$1"; } # a path, or the name alone where the compiler has none

for needed in libasan.so libtsan.so; do
  if [ "$(library $needed)" = $needed ]; then
    echo "NOT RUN, the engine under sanitizers: $compiler has no $needed; gcc comes with it"
    if [ "${STRICT:-OFF}" = ON ]; then exit 1; fi
    exit 0
  fi
done

if [ "$what" = build ]; then
  unset MAKEFLAGS # Ninja has no part in the jobs of make.
  mkdir -p "$build"
  targets=
  for name in "$@"; do targets="$targets _engine_$name"; done
  # No build type: the flags of CMakeLists.txt and no others; what a report shows of the stack needs the symbols that a release is stripped of.
  PATH=$bin:$PATH cmake -G Ninja -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=None "-DCRFREFINE_SANITIZE=address;thread" \
    -DPython_EXECUTABLE="$bin/python" > "$build/log"
  # shellcheck disable=SC2086
  PATH=$bin:$PATH ninja -C "$build" $targets >> "$build/log" || { tail -n 30 "$build/log"; exit 1; }
  exit 0
fi

name=$1
# The package's own Python around that engine and no other.
site=$build/site-$name
rm -rf "$site"
mkdir -p "$site"
cp -R "$root/crfrefine" "$site/"
rm -f "$site"/crfrefine/*.so
cp -R "$root/configs" "$root/kernels" "$build/$name"/*.so "$site/crfrefine/"
# Instrumented code takes ten times as long: those that work on several threads, and for memory those that compare with sums over all pairs,
# with a plain transcription or the other precision, on odd grids, and those of wrong arguments and of changed arrays.
chosen="threads or zeros or streamed"
sanitizer=libtsan.so
# ThreadSanitizer looks at the files that have such tests alone: what others import takes longer under it than the tests.
words=$(echo "$chosen" | sed 's/ or /|/g')
files=$(cd "$root" && grep -lE "^def test_\w*($words)" tests/engines/test_[!c]*.py tests/refinement/*.py)
if [ "$name" = address ]; then
  sanitizer=libasan.so
  files="tests/engines tests/refinement"
  chosen="$chosen or brute_force or transcribed or documented or float32 or float64 or exchanged or origin or receives or refused or any_blobs or ends_no_process"
fi
# ThreadSanitizer needs its own part of the address space, which some systems give to programs at random.
fixed=
if setarch -R true 2> "$site/log"; then fixed="setarch -R"; fi
# The interpreter is not built with sanitizers, so their library comes first. What Python keeps to its end is no leak. A report goes to the
# standard error, and the worker ends with it: pytest must not hold that back, and names the test.
cd "$root"
echo "tests under the sanitizer: $name"
# shellcheck disable=SC2086
exec $fixed env "LD_PRELOAD=$(library $sanitizer) $(library libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  "TSAN_OPTIONS=halt_on_error=1:exitcode=66:suppressions=$helpers/tsan_suppressions.txt" \
  "PYTHONPATH=$site" PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CRFREFINE_CPU_LEVEL=baseline \
  "$bin/python" -m pytest -v --no-header --capture=sys -p no:cacheprovider -n 2 \
  -m "not long" -k "($chosen) and not cuda and not torch" $files
