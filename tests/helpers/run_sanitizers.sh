#!/bin/sh
# Build the C++ engine with sanitizers and run tests of it: make test-sanitizers. Arguments: the folder of python, cmake and ninja, then
# address,undefined (overflows, use after free, undefined behavior) or thread (data races), or both.
set -eu
bin=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
status=0
for sanitizers in "$@"; do
  name=${sanitizers%%,*}
  build=$root/build/sanitize-$name
  site=$build/site
  PATH=$bin:$PATH "$bin/cmake" -G Ninja -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DCRFREFINE_SANITIZE="$sanitizers" \
    -DPython_EXECUTABLE="$bin/python" > "$build.log"
  PATH=$bin:$PATH "$bin/cmake" --build "$build" >> "$build.log" || { tail -n 30 "$build.log"; exit 1; }
  # The package's own Python around that engine and no other.
  rm -rf "$site"
  mkdir -p "$site"
  cp -R "$root/crfrefine" "$site/"
  rm -f "$site"/crfrefine/*.so
  "$bin/cmake" --install "$build" --prefix "$site" >> "$build.log"
  if [ "$name" = thread ]; then
    library=libtsan.so
    # What runs on several threads.
    set_of_tests="test_zero_channels.py test_planned_filters.py test_volume.py test_channel_labels.py"
  else
    library=libasan.so
    set_of_tests="test_mean_field.py test_lattice_passes.py test_spatial.py test_zero_channels.py test_channel_labels.py test_volume.py"
  fi
  tests=
  for file in $set_of_tests; do tests="$tests $root/tests/engines/$file"; done
  echo "tests under $sanitizers"
  # The interpreter is not built with sanitizers, so their library comes first. What Python keeps to its end is no leak.
  # shellcheck disable=SC2086
  LD_PRELOAD="$(${CXX:-c++} -print-file-name=$library) $(${CXX:-c++} -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    TSAN_OPTIONS=halt_on_error=1:exitcode=66:suppressions="$root/tests/helpers/tsan_suppressions.txt" \
    PYTHONPATH="$site" PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 CRFREFINE_CPU_LEVEL=baseline \
    "$bin/python" -m pytest -q -p no:cacheprovider -p no:xdist --rootdir "$root" -k "not cuda" $tests || status=1
done
exit $status
